"""Many clients at once: nothing crashes, sticks or grows, everybody has a turn, and nobody's text depends on the others."""

import concurrent.futures
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import Any

import pytest
from helpers import load
from helpers.serving import served, service_of, slots


def ask(url: str, prompt: str) -> str:
    """The same request alone."""
    body = json.dumps({"prompt": prompt, "max_tokens": 12, "temperature": 0}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["text"]


def memory(url: str) -> float:
    """Bytes of the server's process."""
    with urllib.request.urlopen(url + "/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_resident_memory_bytes"))


@pytest.mark.parametrize(
    ("clients", "rows", "seconds"),
    [pytest.param(40, 4, 2, marks=pytest.mark.long), pytest.param(200, 8, 60, marks=pytest.mark.slow)],
)
def test_many_clients(clients: int, rows: int, seconds: int) -> None:
    """Some rows and 64 places in the queue. Every answer is to the letter what it is alone, every refusal a 429 that says when
    to try again; of the clients, the one that waits longest for first tokens waits at most 5 times as long as the one that
    waits least (medians); the memory ends within 5 % of what it was after a first round; nothing is left."""
    service = service_of(slots(rows), queue=64)
    prompts = [f"{'x' * (7 * i % 90)} number {i}" for i in range(24)]
    with served(service) as url:
        alone = [ask(url, prompt) for prompt in prompts]
        run = lambda length: json.loads(
            subprocess.run(
                [sys.executable, load.__file__, url, str(clients), str(length)],
                input=json.dumps(prompts), capture_output=True, text=True, check=True, timeout=length + 90,
            ).stdout
        )  # fmt: skip
        run(seconds / 4)
        before = memory(url)
        found: list[dict[str, Any]] = run(seconds)
        assert memory(url) < 1.05 * before
        assert [wrong for client in found for wrong in client["wrong"]] == []
        for client in found:
            assert all(text == alone[which] for _, which, text in client["answers"])
        waits = [statistics.median(first for first, _, _ in c["answers"]) for c in found if c["answers"]]
        assert len(waits) == clients and max(waits) <= 5 * min(waits)
        assert clients < 100 or sum(client["refused"] for client in found) > 0
        assert service.scheduler and service.scheduler.idle


@pytest.mark.slow
@pytest.mark.timed
def test_throughput() -> None:
    """d6 on the CPU: 16 requests at a time get at least 4 times the tokens per second that one gets from the same server."""
    engine = slots(rows=16, seq=512, depth=6, width=384, head_dim=128, vocab=4096)
    with served(service_of(engine)) as url, concurrent.futures.ThreadPoolExecutor(16) as pool:

        def rate(together: int) -> float:
            begin = time.monotonic()
            tokens = sum(pool.map(lambda i: spoken(url, f"{i} of {together}", 96), range(together)))
            return tokens / (time.monotonic() - begin)

        rate(16)
        one, many = rate(1), rate(16)
        print(f"{one:.0f} tokens/s alone, {many:.0f} with 16 requests: {many / one:.1f} times")
        assert many >= 4 * one


def spoken(url: str, prompt: str, tokens: int) -> int:
    """How many tokens an answer has."""
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)["usage"]["completion_tokens"]
