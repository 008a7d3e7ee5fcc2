"""The official openai client against a server over a tiny model: every call, every error, and what the model would say alone."""

import concurrent.futures
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from helpers.serving import TOKENIZER, Scripted, served, service_of, slots

from nanojax import sample
from nanojax.conversation import render_for_completion
from nanojax.engine.slots import Slots
from nanojax.evaluate import likelihood
from nanojax.serve.app import BODY, Service

pytestmark = pytest.mark.long  # the module's model compiles for some seconds
HI: list[Any] = [{"role": "user", "content": "Hi, what is é?"}]


@pytest.fixture(scope="module")
def engine() -> Slots:
    return slots(rows=4)


@pytest.fixture(scope="module")
def service(engine: Slots) -> Service:
    return service_of(engine, queue=8)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


def alone(engine: Slots, prompt: list[int], count: int, **choice: Any) -> list[int]:
    """What `sample` writes after the prompt, up to an end."""
    ids = sample.generate(engine.config, engine.params, prompt, count, **choice)[0].tolist()
    ends = [i for i, id in enumerate(ids) if id in engine.stops.ends]
    return ids[: ends[0]] if ends else ids


def test_models(client: Any) -> None:
    """The list has the one model, and it is found by its name; another is not."""
    assert [m.id for m in client.models.list().data] == ["tiny"] and client.models.retrieve(
        "tiny"
    ).owned_by == "nanojax"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_chat_says_what_the_model_says_alone(client: Any, engine: Slots) -> None:
    """Greedy and drawn with a seed, whole and streamed; `n` draws apart, and the usage counts the prompt once."""
    prompt = render_for_completion(TOKENIZER, HI)
    for choice in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, seed=7)):
        want = TOKENIZER.decode(alone(engine, prompt, 20, **choice))
        ask = dict(model="tiny", messages=HI, max_completion_tokens=20, extra_body={"top_k": 0}, **choice)
        reply = client.chat.completions.create(**ask)
        assert reply.choices[0].message.content == want and reply.object == "chat.completion"
        assert reply.choices[0].finish_reason == "length" and reply.id.startswith("chatcmpl-")
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == want
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
        assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks[:-1])
        usage = chunks[-1].usage
        assert not chunks[-1].choices and (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 20)
        assert usage.prompt_tokens_details.cached_tokens == len(prompt) - 1
    reply = client.chat.completions.create(model="tiny", messages=HI, max_tokens=8, n=3, temperature=1.5, seed=1)
    assert len({c.message.content for c in reply.choices}) == 3 and [c.index for c in reply.choices] == [0, 1, 2]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 24)


def test_a_conversation_reads_only_what_is_new(client: Any) -> None:
    """The second turn of a conversation finds the first in a cache; a system message and parts are read as text."""
    text = dict(role="user", content=[dict(type="text", text="one two three"), dict(type="text", text="four")])
    turns: list[Any] = [dict(role="developer", content="Be brief."), text]
    ask = dict(model="tiny", temperature=0, max_tokens=6)
    first = client.chat.completions.create(messages=turns, **ask)
    turns += [dict(role="assistant", content=first.choices[0].message.content), dict(role="user", content="and?")]
    second = client.chat.completions.create(messages=turns, **ask)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    ids = render_for_completion(TOKENIZER, [dict(role="user", content="Be brief.\n\none two three\nfour")])
    assert first.usage.prompt_tokens == len(ids)


def test_stop_strings(client: Any) -> None:
    """A string of the greedy answer stops it before that string, whole and streamed; tokens behind it are not counted."""
    ask = dict(model="tiny", prompt="abc", temperature=0, max_tokens=30)
    text = client.completions.create(**ask).choices[0].text
    stop = text[5:7]
    reply = client.completions.create(**ask, stop=["never to be found", stop])
    assert reply.choices[0].text == text[: text.index(stop)] and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 30
    streamed = "".join(c.choices[0].text for c in client.completions.create(**ask, stop=stop, stream=True))
    assert streamed == reply.choices[0].text


def test_log_probabilities_of_a_prompt(client: Any, engine: Slots) -> None:
    """As lm-eval's local-completions asks: several prompts of ids, echoed, one token more. Sums of the continuations and
    whether they are greedy are those of nanojax.evaluate.likelihood; within 1e-3 nats."""
    rng = np.random.default_rng(3)
    prompts = [[TOKENIZER.bos, *rng.integers(0, 250, n).tolist()] for n in (5, 20, 80)]
    prompts[0] += alone(engine, prompts[0], 3)  # one that is greedy
    at = [6, 10, 70]
    reply = client.completions.create(model="tiny", prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0)
    requests = [likelihood.Request(tuple(p[:n]), (tuple(p[n:]),)) for p, n in zip(prompts, at)]
    answers = likelihood.scorer(engine.config, engine.params)(requests)
    for choice, prompt, start, [want] in zip(reply.choices, prompts, at, answers):
        found = choice.logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert len(found.tokens) == len(prompt) + 1 == len(found.text_offset)
        own, top = found.token_logprobs[start:-1], found.top_logprobs[start:-1]
        assert abs(sum(own) + want.nll.sum()) < 1e-3
        assert [mine == max(best.values()) for mine, best in zip(own, top)] == want.hits.tolist()
    assert all(answers[0][0].hits)
    reply = client.completions.create(model="tiny", prompt="abc", max_tokens=0, logprobs=2, echo=True)
    found = reply.choices[0].logprobs
    assert reply.choices[0].text == "abc" and found.tokens == ["a", "b", "c"] and found.text_offset == [0, 1, 2]
    assert found.token_logprobs[0] is None and all(len(top) in (2, 3) for top in found.top_logprobs[1:])


def test_log_probabilities_of_a_chat(client: Any) -> None:
    """Each token of the text has its own and the likeliest; at temperature 0 it is the first of these."""
    ask = dict(model="tiny", messages=HI, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3)
    tokens = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert len(tokens) == 6 and all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob for t in tokens)
    streamed = [t for c in client.chat.completions.create(**ask, stream=True) if c.choices[0].logprobs
                for t in c.choices[0].logprobs.content]  # fmt: skip
    assert [(t.token, t.logprob) for t in streamed] == [(t.token, t.logprob) for t in tokens]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    (dict(model="gpt-5"), 404, "model"),
    (dict(temperature=2.5), 400, "temperature"),
    (dict(temperature="hot"), 400, "temperature"),
    (dict(n=99), 400, "n"),
    (dict(tools=[dict(type="function", function=dict(name="f"))]), 400, "tools"),
    (dict(response_format=dict(type="json_object")), 400, "response_format"),
    (dict(presence_penalty=1.0), 400, "presence_penalty"),
    (dict(logit_bias={"5": 10}), 400, "logit_bias"),
    (dict(stop=[""]), 400, "stop"),
    (dict(top_logprobs=3), 400, "top_logprobs"),
    (dict(max_tokens=0), 400, "max_tokens"),
    (dict(extra_body=dict(min_p=0.1)), 400, "min_p"),
    (dict(messages=[]), 400, "messages"),
    (dict(messages=[dict(role="user", content="x " * 200)]), 400, "messages"),
    (dict(messages=[dict(role="tool", content="x", tool_call_id="1")]), 400, "messages[0].role"),
    (dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="data:"))])]), 400,
     "messages[0].content[0]"),
    (dict(messages=[*HI, *HI]), 422, "messages"),
    (dict(messages=[*HI, dict(role="assistant", content="x")]), 422, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "wrong", "said"),
    [
        ("chat", {"stop": ["a"] * 5}, "stop: at most 4 strings"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        ("chat", {"messages": [{"role": "user", "content": []}]}, "messages[0].content: is missing"),
        ("completions", {"prompt": []}, "prompt: is empty"),
        ("chat", {"stop": [""]}, "stop: an empty string"),
        ("chat", {"messages": []}, "messages: is empty"),
        ("completions", {"prompt": ["a", 1]}, "prompt: must be text, ids, or a list of either"),
        ("completions", {"prompt": ["a"] * 60, "n": 8}, "n: 60 prompts with n=8 are 480 answers"),
    ],
)
def test_messages_say_the_reason(client: Any, path: str, wrong: dict[str, Any], said: str) -> None:
    """The reason is named, and not the type of another form that the value might have had."""
    ask = client.chat.completions if path == "chat" else client.completions
    whole = {"messages": HI} if path == "chat" else {"prompt": "a"}
    with pytest.raises(openai.BadRequestError) as error:
        ask.create(**{"model": "tiny", **whole, **wrong})
    assert said in error.value.message


@pytest.mark.parametrize(("wrong", "status", "param"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused(client: Any, wrong: dict[str, Any], status: int, param: str) -> None:
    """What is wrong or would change the meaning: the status, the parameter by name, and an id of the request."""
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": HI, "max_tokens": 2, **wrong})
    found = error.value
    assert (found.status_code, found.param) == (status, param) and found.type and found.request_id


def test_what_says_what_happens_anyway_is_taken(client: Any) -> None:
    """Neutral values and unknown keys change nothing."""
    neutral = dict(
        presence_penalty=0, frequency_penalty=0.0, logit_bias={}, response_format={"type": "text"}, user="me"
    )
    extra = dict(repetition_penalty=1.0, min_p=0, tools=None, no_such_key=[1])
    reply = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, extra_body=extra, **neutral)
    assert reply.usage.completion_tokens <= 2


def test_busy_and_large_and_cancelled(client: Any, service: Service) -> None:
    """More than the queue holds is 429 with seconds to wait; a body over the limit 413; a client that leaves a stream, or
    an answer that it waits for, frees its row."""
    assert service.scheduler
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="tiny", prompt="x" * (BODY + 1))
    assert large.value.status_code == 413
    ask = dict(model="tiny", messages=HI, max_tokens=150, temperature=1.5, n=4)
    service.scheduler.engine.step, step = lambda limit=1: (time.sleep(0.05), step(1))[1], service.scheduler.engine.step  # type: ignore
    try:
        streams = [client.chat.completions.create(stream=True, **ask) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as busy:
            for _ in range(3):  # four are written and eight may wait
                streams.append(client.chat.completions.create(stream=True, **ask))  # noqa: PERF401
        assert 1 <= int(busy.value.response.headers["retry-after"]) <= 60 and busy.value.type == "rate_limit_error"
        for stream in streams:
            next(iter(stream))
            stream.close()
        wait_until(lambda: service.scheduler.idle)  # type: ignore
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**ask, timeout=0.3)
        wait_until(lambda: service.scheduler.idle)  # type: ignore
    finally:
        service.scheduler.engine.step = step  # type: ignore


def test_key_and_loading_and_stopping(url: str, service: Service, client: Any) -> None:
    """Without the right key 401, but for the page and /health; 503 while the model loads and while the server stops."""
    locked = Service("tiny", service.metrics, key="a secret key", hosts=frozenset(["127.0.0.1"]))
    with served(locked) as address:
        make = lambda key: openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
        with make("another") as other, pytest.raises(openai.AuthenticationError) as wrong:
            other.models.list()
        assert wrong.value.code == "invalid_api_key"
        with make("a secret key") as right:
            assert right.models.list().data
            with pytest.raises(openai.InternalServerError) as loading:
                right.chat.completions.create(model="tiny", messages=HI)
            assert loading.value.status_code == 503 and "loading" in str(loading.value)
            assert loading.value.response.headers["retry-after"]
            locked.tokenizer, locked.scheduler, locked.closing = service.tokenizer, service.scheduler, True
            with pytest.raises(openai.InternalServerError, match="stopping"):
                right.chat.completions.create(model="tiny", messages=HI)
        locked.scheduler = None


def wait_until(condition: Any, seconds: float = 20) -> None:
    """Looks every 10 ms; fails if it takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_open_webuis_requests(url: str) -> None:
    """What it sends, byte by byte as it reads: the list of models at {base}/models; a stream that it knows by its content type,
    of lines that begin `data: `, with usage before [DONE]; and unstreamed requests for a title and tags beside it."""
    base = f"{url}/v1"
    with urllib.request.urlopen(
        urllib.request.Request(f"{base}/models", headers={"Authorization": "Bearer "})
    ) as reply:
        (model,) = [one["id"] for one in json.load(reply)["data"]]
    ask: Any = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 4}

    def post(body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer "}
        return urllib.request.urlopen(
            urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(), headers)
        )

    with concurrent.futures.ThreadPoolExecutor() as pool:
        beside = [pool.submit(lambda: json.load(post(ask | {"stream": False}))) for _ in range(2)]
        with post(ask | {"stream": True, "stream_options": {"include_usage": True}}) as reply:
            assert "text/event-stream" in reply.headers["content-type"]
            lines = [line for line in reply.read().decode().split("\n") if line]
        titles = [one.result()["choices"][0]["message"]["content"] for one in beside]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert titles == ["".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)] * 2


def test_streamed_parts_are_those_of_the_whole_answer() -> None:
    """Text before and after a call of the calculator: joined by kind, the stream's parts are the whole reply's, and each delta
    with content has one. An answer that shows nothing has empty log-probabilities, not none."""
    special = TOKENIZER.special
    call = [special("<|python_start|>"), *TOKENIZER.encode("6*7"), special("<|python_end|>")]
    answer = [*TOKENIZER.encode("It is "), *call, *TOKENIZER.encode(" or so."), special("<|assistant_end|>")]
    with (
        served(service_of(Scripted(lambda prompt: answer))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        ask: Any = dict(model="tiny", messages=HI, temperature=0)
        whole: Any = client.chat.completions.create(**ask).choices[0].message
        joined: list[dict[str, str]] = []
        for chunk in client.chat.completions.create(**ask, stream=True):
            delta: Any = chunk.choices[0].delta
            parts = getattr(delta, "parts", None) or []
            assert bool(delta.content) <= bool(parts)
            for part in parts:
                if joined and joined[-1]["type"] == part["type"] == "text":
                    joined[-1]["text"] += part["text"]
                else:
                    joined.append(dict(part))
        assert joined == [dict(part) for part in whole.parts]
        assert [part["type"] for part in joined] == ["text", "python", "python_output", "text"]
    hidden = [*call, special("<|assistant_end|>")]
    with (
        served(service_of(Scripted(lambda prompt: hidden))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        choice = client.chat.completions.create(model="tiny", messages=HI, logprobs=True, max_tokens=3).choices[0]
        assert choice.logprobs is not None and choice.logprobs.content == []
