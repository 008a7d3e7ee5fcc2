"""Results that others published, to stand beside ours. Plain data without jax."""

from typing import NamedTuple


class Figure(NamedTuple):
    """One result and where it is from."""

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
CHAT = (
    Figure("arc_easy", 0.3876, CHAT_SOURCE),
    Figure("arc_challenge", 0.2807, CHAT_SOURCE),
    Figure("mmlu", 0.3151, CHAT_SOURCE),
    Figure("gsm8k", 0.0455, CHAT_SOURCE),
    Figure("humaneval", 0.0854, CHAT_SOURCE),
    Figure("ChatCORE", 0.0884, CHAT_SOURCE),
)
