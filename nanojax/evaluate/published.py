"""Results that others published, to stand beside ours. Plain data without jax."""

from typing import NamedTuple


class Figure(NamedTuple):
    """One model's result and where it is from."""

    model: str
    value: float
    source: str


CORE = (
    Figure("GPT-2 1.5B", 0.256525, "nanochat, dev/LEADERBOARD.md"),
    Figure("nanochat d20", 0.2219, "nanochat discussion 1"),
    Figure("nanochat d32", 0.3168, "nanochat discussion 8, as quoted elsewhere"),
    Figure("nanochat d12 on an RTX 4070 (8.5 B tokens)", 0.1916, "lzwjava.github.io, June 2026"),
)
CHAT_SOURCE = "nanochat discussion 1: its d20 of 561 M parameters after fine-tuning, October 2025"
CHAT = {  # of that one model: accuracy by task, and the mean of centred ones
    "arc_easy": 0.3876,
    "arc_challenge": 0.2807,
    "mmlu": 0.3151,
    "gsm8k": 0.0455,
    "humaneval": 0.0854,
    "ChatCORE": 0.0884,
}
