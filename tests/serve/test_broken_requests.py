"""Requests that are no requests: never a 500, never a hang, always OpenAI's form of an error; and clients that vanish."""

import contextlib
import itertools
import json
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.serving import TOKENIZER, Scripted, served, service_of

from nanojax.serve import connection
from nanojax.serve.app import BODY, Service

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 3, "logprobs": 1, "echo": True}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


@pytest.fixture(scope="module")
def service() -> Service:
    return service_of(Scripted(lambda prompt: [65] * 3000), queue=64, hosts=frozenset(["127.0.0.1"]))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield address


def post(url: str, body: bytes, seconds: float = 20, **headers: str) -> tuple[int, Any, Any]:
    """(status, JSON or text, headers) of the reply."""
    headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    reply: Any
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=seconds)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        text = reply.read().decode()
    is_json = reply.headers["content-type"] == "application/json"
    return reply.status, json.loads(text) if is_json else text, reply.headers


def holds(status: int, reply: Any) -> None:
    """A reply, or an error in OpenAI's form."""
    assert status in (200, 400, 404, 413, 422, 429), (status, reply)
    if status != 200:
        assert set(reply["error"]) == {"message", "type", "param", "code"} and reply["error"]["message"], reply


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, "", "x", "\x00", "日本", "\udc80", [],
    [[]], [None], [1], ["a"], [[1, 2], ["a"]], [[-1]], [[10**6]], {}, {"a": {}}, [{}], [{"role": "user"}],
    [{"role": "user", "content": [{"type": "text"}]}], {"include_usage": "yes"}, "a" * 5000, [0] * 5000,
]  # fmt: skip
RAW = [
    b"", b" ", b"null", b"[]", b"1", b'"x"', b"{", b"}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000,
    b'{"seed": NaN}', b'{"temperature": Infinity}', b'{"seed": ' + b"9" * 10_000 + b"}", b'{"prompt": "\\ud800"}',
    b'{"messages": [{"role": "user", "content": "\\udc00"}]}', b"{'a': 1}", b'{"a": 1,}', b"\x00" * 100,
    b'{"prompt": "a", "prompt": 5}', b'{"stream": 1}', b'{"prompt": "\xff"}', b"a" * (BODY + 5), b'{"max_tokens": 1e999}',
]  # fmt: skip


def mutated(rng: random.Random, whole: dict[str, Any]) -> bytes:
    """A request with some of its values changed, deep inside too, or its bytes."""
    request = json.loads(json.dumps(whole))
    keys = [*whole, "n", "temperature", "top_p", "top_k", "stop", "seed", "stream", "stream_options", "logprobs",
            "top_logprobs", "tools", "logit_bias", "min_p", "response_format", "best_of", "suffix", "echo"]  # fmt: skip
    for _ in range(rng.randrange(1, 4)):
        place, key = request, rng.choice(keys)
        if key == "messages" and rng.random() < 0.7 and request.get("messages"):
            place, key = request["messages"][0], rng.choice(["role", "content", "tool_calls", "name"])
        if isinstance(place, dict):
            place[key] = rng.choice(VALUES)
    text = json.dumps(request).encode()
    if rng.random() < 0.25:
        at = rng.randrange(len(text))
        text = text[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(3))) + text[at + rng.randrange(3) :]
    return text


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_malformed_bodies(url: str, service: Service, count: int) -> None:
    """Raw bytes that are no JSON, and requests with values of every wrong kind and size: answered within 20 s, never by a
    500, and afterwards the server has nothing left to do."""
    rng = random.Random(count)
    bodies = [(path, raw) for path in PATHS for raw in RAW]
    bodies += [(path, mutated(rng, whole)) for path, whole in rng.choices(list(PATHS.items()), k=count - len(bodies))]
    for path, body in bodies:
        status, reply, _ = post(url + path, body)
        if status == 200 and isinstance(reply, str):
            assert reply.startswith("data: ") and reply.endswith("data: [DONE]\n\n"), body
        else:
            holds(status, reply)
    assert service.scheduler and service.scheduler.idle
    assert post(url + "/v1/completions", json.dumps(TEXT).encode())[0] == 200


def test_headers_that_never_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed in time whether nothing comes, a byte at a time, or half of a second request; a body may take
    longer than headers."""
    monkeypatch.setattr(connection, "HEADERS", 0.3)
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(TEXT).encode()
    whole = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    whole += b"Content-Length: %d\r\n\r\n" % len(body)
    health = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for first, rest in (
        (b"", []),
        (b"", [b"G", b"E", *[b"T"] * 100]),
        (health, [b"GET /he"]),
        (whole, [b"", b"", body, b"G"]),
    ):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            begin = time.monotonic()
            client.sendall(first)
            with contextlib.suppress(OSError):  # closed by the server
                for part in rest:
                    time.sleep(0.2)
                    client.sendall(part)
            reply = b""
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(65536):
                    reply += part
            assert time.monotonic() - begin < 5, rest
            assert reply.startswith(b"HTTP/1.1 200" if first else b"")
            assert (b"text_completion" in reply) == (first == whole)


def test_deep_and_odd_bodies_say_what_is_wrong(url: str) -> None:
    """Each of the raw bodies is 400 or 413, whatever it is."""
    for raw in RAW:
        status, reply, _ = post(url + "/v1/chat/completions", raw)
        assert status == (413 if len(raw) > BODY else 400), (raw[:50], reply)


def test_other_pages_and_other_forms(url: str) -> None:
    """A host that is not this one (DNS rebinding), a form that a page elsewhere may post, a wrong path and method; no reply
    lets another origin read it, and every one has an id, the client's own where it is sane."""
    body = json.dumps(TEXT).encode()
    assert post(url + "/v1/completions", body, host="evil.example:80")[:2][0] == 403
    assert post(url + "/v1/completions", body, content_type="text/plain")[0] == 415
    assert post(url + "/v1/nothing", body)[0] == 404 and post(url + "/health", body)[0] == 405
    _, _, headers = post(url + "/v1/completions", body, origin="https://evil.example", x_request_id="mine-1")
    assert headers["x-request-id"] == "mine-1" and "access-control-allow-origin" not in headers
    assert len(post(url + "/v1/completions", body, x_request_id="a b\tc" * 50)[2]["x-request-id"]) == 32


def test_clients_that_vanish(url: str, service: Service) -> None:
    """Half a head, half a body, a stream that is not read, one that is reset after its first bytes: rows and queue are free
    again within seconds, and the server answers."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(CHAT | {"stream": True, "max_tokens": 900}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    head = f"{head}{len(body)}\r\n\r\n".encode()
    service.scheduler.engine.pause = 0.002  # type: ignore
    for sent, wait in ((head[:30], 0), (head + body[:20], 0), (head + body, 0), (head + body, 0.2)):
        for _ in range(3):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(sent)
                time.sleep(wait)
                if wait:
                    assert client.recv(100).startswith(b"HTTP/1.1 200")
    end = time.monotonic() + 5
    while not service.scheduler.idle:  # type: ignore
        assert time.monotonic() < end
        time.sleep(0.01)
    service.scheduler.engine.pause = 0.0  # type: ignore
    assert post(url + "/v1/completions", json.dumps(TEXT).encode())[0] == 200


def test_too_late(url: str, service: Service) -> None:
    """A request over its time ends with what it has, as cut; one that never began is 503 with seconds to wait."""
    service.seconds, service.scheduler.engine.pause = 0.2, 0.02  # type: ignore
    try:
        status, reply, _ = post(url + "/v1/completions", json.dumps(TEXT | {"max_tokens": 500}).encode())
        assert status == 200 and reply["choices"][0]["finish_reason"] == "length"
        assert 1 < reply["usage"]["completion_tokens"] < 100
        service.seconds = 0.0
        status, reply, headers = post(url + "/v1/completions", json.dumps(TEXT).encode())
        assert status == 503 and headers["retry-after"] and "too long" in reply["error"]["message"]
    finally:
        service.seconds, service.scheduler.engine.pause = 600.0, 0.0  # type: ignore


def test_metrics_count(url: str, service: Service) -> None:
    """Tokens, requests by status, the time to the first token and the memory, in Prometheus' text."""
    with urllib.request.urlopen(url + "/metrics") as reply:
        before = reply.read().decode()
    value = lambda text, name: next(
        (float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0
    )
    post(url + "/v1/completions", json.dumps(TEXT).encode())
    with urllib.request.urlopen(url + "/metrics") as reply:
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        after = reply.read().decode()
    grown = lambda name: value(after, name) - value(before, name)
    assert grown("nanojax_generated_tokens_total") == 3
    assert grown("nanojax_prompt_tokens_total") == 1 + len(TOKENIZER.encode("hi"))
    assert grown("nanojax_time_to_first_token_seconds_count") == 1
    assert grown('nanojax_requests_total{path="/v1/completions",status="200"}') == 1
    assert value(after, "process_resident_memory_bytes") > 1e6 and value(after, "nanojax_slots") == 4


@pytest.mark.slow
def test_schemathesis(url: str) -> None:
    """1,000 requests that schemathesis makes up for each endpoint from our OpenAPI, right and wrong: no 500, no hang."""
    schemathesis = pytest.importorskip("schemathesis", reason="the slow extra is not installed")
    from hypothesis import HealthCheck, given, settings

    operations = [found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    assert len(posts) == 2
    for operation, mode in itertools.product(posts, schemathesis.GenerationMode):

        @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None)  # pyright: ignore[reportArgumentType]
        @given(case=operation.as_strategy(generation_mode=mode))
        def fuzz(case: Any) -> None:
            reply = case.call(timeout=20)
            assert reply.status_code != 500, reply.text

        fuzz()
