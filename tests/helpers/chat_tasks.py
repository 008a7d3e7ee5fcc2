"""Test rows of nanochat's tasks in local files, as `nanojax.tasks` reads them without the hub, and words to spell."""

import json
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"question": f"Which is {i}?", "choices": {"text": list("xyzuv")[:n], "label": labels}, "answerKey": labels[i % n]}
        for i, (n, labels) in enumerate([(3, list("ABC")), (4, list("1234")), (5, list("ABCDE")), (4, list("ABCD"))] * 2)
    ],
    "arc_challenge": [
        {"question": "Hard?", "choices": {"text": ["yes", "no", "so"], "label": list("ABC")}, "answerKey": "B"}
    ],
    "mmlu": [{"question": f"{i}+2?", "choices": ["1", "2", "3", "4"], "answer": i, "subject": "s"} for i in range(3)],
    "gsm8k": [{"question": f"What is {i}+1000?", "answer": f"<<{i}+1000={i + 1000}>>It is\n#### {i + 1000:,}"}
              for i in range(4)],
    "humaneval": [
        {"task_id": f"{i}", "prompt": f"def plus(x):\n    '''Adds {i}.'''\n", "canonical_solution": f"    return x + {i}\n",
         "test": f"def check(candidate):\n    assert candidate(7) == {7 + i}\n", "entry_point": "plus"}
        for i in (1, 2)
    ],
}  # fmt: skip
WORDS = [
    f"{a}{b}{c}" for a in ("ba", "cor", "stra", "win", "mo") for b in ("na", "wber", "ter", "do") for c in "aeinrsty"
]


def write(folder: Path, rows: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """FOLDER/TASK/test.jsonl of each task, and FOLDER/words.txt; returns the folder."""
    for task, found in (ROWS if rows is None else rows).items():
        (folder / task).mkdir(parents=True)
        (folder / task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "words.txt").write_text(" ".join(WORDS))
    return folder
