"""The endpoints: a request becomes jobs of the scheduler, and what these write becomes its reply, whole or as a stream."""

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanojax import cli, conversation
from nanojax.engine.generate import Calculator
from nanojax.serve import guard, page, protocol, replies, scheduler
from nanojax.serve.answer import Answer, Piece, Scored, scored
from nanojax.serve.metrics import Metrics
from nanojax.serve.protocol import ChatRequest, CompletionRequest, Refused
from nanojax.serve.scheduler import End, Event, Job, Prompt, Scheduler, Tokens
from nanojax.tokenizer import SPECIAL_TOKENS, Tokenizer

BODY = 2**20  # bytes of a request
DRAINED = 2**25  # of a larger one that are read and not kept, so that the client gets to read the answer
ARRIVAL = 30.0  # seconds in which a body must arrive
SILENCE = 10.0  # seconds after which a stream without news gets a comment, so that no proxy closes it


@dataclasses.dataclass
class Service:
    """What the endpoints need. `scheduler` is None until the model is loaded.

    tokens: of an answer at most. seconds: a request may take. chat: whether the model was trained to chat.
    """

    model: str
    metrics: Metrics
    tokens: int = 1024
    seconds: float = 600.0
    chat: bool = True
    key: str | None = None
    hosts: frozenset[str] | None = None
    tokenizer: Tokenizer | None = None
    scheduler: Scheduler | None = None
    closing: bool = False
    cut: bool = False  # whether an answer was cut because the server stops
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def state(self) -> str:
        """loading, ok, stopping or failed."""
        if self.scheduler is None:
            return "loading"
        if self.scheduler.failed:
            return "failed"
        return "stopping" if self.closing or self.scheduler.closed else "ok"


def make(service: Service) -> Starlette:
    """The application."""
    endpoints: dict[str, tuple[str, Callable[..., Any]]] = {
        "/": ("GET", page.show),
        "/health": ("GET", health),
        "/metrics": ("GET", metrics),
        "/openapi.json": ("GET", openapi),
        "/v1/models": ("GET", models),
        "/v1/models/{model:path}": ("GET", model),
        "/v1/chat/completions": ("POST", chat),
        "/v1/completions": ("POST", completions),
    }
    app = Starlette(
        routes=[Route(path, end, methods=[method]) for path, (method, end) in endpoints.items()],
        middleware=[Middleware(guard.Guard, service.metrics, service.hosts, service.key, frozenset(endpoints))],
        exception_handlers={HTTPException: guard.http_error, Refused: guard.refused_error},
    )
    app.state.service = service
    return app


async def health(request: Request) -> Response:
    """200 where requests are answered, else 503."""
    state = _service(request).state
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    service = _service(request)
    return Response(service.metrics.text(service.scheduler), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(request: Request) -> Response:
    """The description of the endpoints."""
    return JSONResponse(protocol.openapi(cli.version()))


async def models(request: Request) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_model(_service(request))]})


async def model(request: Request) -> Response:
    """The one model by its name."""
    _check_model(_service(request), request.path_params["model"])
    return JSONResponse(_model(_service(request)))


def _model(service: Service) -> dict[str, Any]:
    context = service.scheduler.engine.context if service.scheduler else None
    about = {"object": "model", "created": service.created, "owned_by": "nanojax", "max_model_len": context}
    return {"id": service.model, **about, "max_tokens": service.tokens, "chat": service.chat}


async def chat(request: Request) -> Response:
    """/v1/chat/completions."""
    service, asked, tokenizer = await _read(request, ChatRequest)
    if not service.chat:
        message = "this model was not trained to chat; ask /v1/completions for text"
        raise Refused(400, message, "model", "not_a_chat_model")
    messages = protocol.messages(asked)
    ids = await run_in_threadpool(conversation.render_for_completion, tokenizer, messages)
    limit = asked.max_completion_tokens or asked.max_tokens or service.tokens
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    return await _answer(request, Call(service, asked, [ids], ["messages"], limit, top))


async def completions(request: Request) -> Response:
    """/v1/completions. A prompt of text begins a document; one of ids is taken as it is."""
    service, asked, tokenizer = await _read(request, CompletionRequest)
    prompts = await run_in_threadpool(lambda: [_ids(tokenizer, prompt) for prompt in asked.prompts])
    names = ["prompt" if len(prompts) == 1 else f"prompt[{i}]" for i in range(len(prompts))]
    limit = 16 if asked.max_tokens is None else asked.max_tokens
    return await _answer(request, Call(service, asked, prompts, names, limit, asked.logprobs))


def _ids(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return [tokenizer.bos, *tokenizer.encode(prompt)]
    for id in prompt:
        if not 0 <= id < tokenizer.vocab_size:
            message = f"prompt: {id} is no id of a vocabulary of {tokenizer.vocab_size}"
            raise Refused(400, message, "prompt", "invalid_value")
    return prompt


def _service(request: Request) -> Service:
    return request.app.state.service


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.model:
        message = f"model: there is no {name[:100]!r}; this server has {service.model}"
        raise Refused(404, message, "model", "model_not_found")


async def _read(request: Request, kind: type[protocol.Read]) -> tuple[Service, protocol.Read, Tokenizer]:
    service = _service(request)
    type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if type != "application/json":  # a browser asks first before another site's page may send this
        raise Refused(415, "the body must be JSON: send Content-Type: application/json", code="wrong_content_type")
    body = await _body(request)
    asked = await run_in_threadpool(protocol.read, kind, body)
    _check_model(service, asked.model)
    if service.state != "ok" or service.tokenizer is None:
        raise Refused(503, f"the server is {service.state}", code="unavailable", seconds=5)
    return service, asked, service.tokenizer


async def _body(request: Request) -> bytes:
    """The body. Refused where it is too long or too slow; what is too long is not kept."""
    kept, size = bytearray(), 0
    if (length := request.headers.get("content-length", "")).isdecimal() and int(length) > DRAINED:
        raise Refused(413, f"the body is longer than {BODY} bytes", code="body_too_large")
    try:
        async with asyncio.timeout(ARRIVAL):
            async for part in request.stream():
                size += len(part)
                if size <= BODY:
                    kept += part
                elif size > DRAINED:
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {ARRIVAL:.0f} s", code="timeout") from None
    except ClientDisconnect:
        raise Refused(400, "the client left") from None
    if size > BODY:
        raise Refused(413, f"the body is longer than {BODY} bytes", code="body_too_large")
    return bytes(kept)


class Call:
    """The answers to one request: `n` to each of its prompts."""

    def __init__(
        self, service: Service, asked: protocol.Request, prompts: Sequence[list[int]], names: Sequence[str], limit: int,
        top: int | None,
    ):  # fmt: skip
        assert service.scheduler and service.tokenizer
        self.service, self.asked, self.scheduler, tokenizer = service, asked, service.scheduler, service.tokenizer
        is_chat = isinstance(asked, ChatRequest)
        self.echo = isinstance(asked, CompletionRequest) and bool(asked.echo)
        self.form = replies.Form(is_chat, service.model, tokenizer, top)
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        samples = asked.n or 1
        if len(prompts) * samples > self.scheduler.queue:
            where = "n" if samples > 1 else "prompt"
            count = f"{len(prompts)} prompts with n={samples} are {len(prompts) * samples} answers"
            raise Refused(
                400, f"{where}: {count}; a request may ask for {self.scheduler.queue}", where, "invalid_value"
            )
        seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**32
        self.jobs: list[Job] = []
        self.answers: list[Answer] = []
        self.choices: list[replies.Choice] = []
        for prompt, where in zip(prompts, names, strict=True):
            new = min(limit, service.tokens, self._room(prompt, where, limit))
            for sample in range(samples):
                index = len(self.jobs)
                job = Job(
                    prompt, new, functools.partial(self._post, index), asked.choice, seed, sample,
                    scored=top is not None, prompt_scored=self.echo and top is not None,
                    calculator=Calculator(tokenizer, 1) if is_chat else None, seconds=service.seconds,
                )  # fmt: skip
                self.jobs.append(job)
                self.answers.append(Answer(tokenizer, asked.stops, is_chat))
                self.choices.append(replies.Choice(index, self._text(prompt) if self.echo else ""))
        self.open = set(range(len(self.jobs)))

    def _room(self, prompt: list[int], where: str, limit: int) -> int:
        """Tokens that may be written after a prompt."""
        context = self.scheduler.engine.context
        if not prompt:
            raise Refused(400, f"{where}: is empty", where, "invalid_value")
        if len(prompt) + min(1, limit) > context:
            message = f"{where}: its {len(prompt)} tokens leave no room in the model's context of {context}"
            raise Refused(400, message, where, "context_length_exceeded")
        return context - len(prompt)

    def _text(self, prompt: Sequence[int]) -> str:
        tokenizer = self.form.tokenizer
        special = {tokenizer.special(name) for name in SPECIAL_TOKENS}
        return tokenizer.decode([id for id in prompt if id not in special])

    def _post(self, index: int, event: Event) -> None:
        """Called in the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

    def begin(self) -> None:
        """Queues the jobs. Refused where there is no room for them."""
        try:
            self.scheduler.submit(self.jobs)
        except scheduler.Full as full:
            raise Refused(429, str(full), code="queue_full", seconds=full.seconds) from None
        except scheduler.Closed:
            raise Refused(503, "the server is stopping", code="unavailable", seconds=5) from None

    def close(self) -> None:
        """Nobody waits for the answers that are still open."""
        if self.open:
            self.scheduler.cancel([self.jobs[index] for index in self.open])
            self.open = set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """What the answers become, piece by piece; None after a silence. A choice with `finish` has ended.

        Refused where one fails.
        """
        if self.form.top is not None and self.echo:
            for index, job in enumerate(self.jobs):
                # A text's own begin token is not part of it. Nothing that was asked for stands before the first token.
                shown = job.prompt[self._hidden(index) :]
                yield index, Piece([], [Scored(shown[0], None, [])] if shown else [])
        while self.open:
            try:
                index, event = await asyncio.wait_for(self.events.get(), SILENCE)
            except TimeoutError:
                yield None
                continue
            if index in self.open and (piece := self._piece(index, event)):
                yield index, piece

    def _hidden(self, index: int) -> int:
        asked = self.asked
        assert isinstance(asked, CompletionRequest)
        return int(isinstance(asked.prompts[index // (asked.n or 1)], str))

    def _piece(self, index: int, event: Event) -> Piece | None:
        job, answer, choice = self.jobs[index], self.answers[index], self.choices[index]
        if isinstance(event, Prompt):
            count = len(event.scores.own)
            ids = job.prompt[job.counted + 1 : job.counted + 1 + count]
            tokens = [scored(id, event.scores, i) for i, id in enumerate(ids)]
            tokens = tokens[max(0, self._hidden(index) - job.counted) :]
            job.counted += count
            return Piece([], tokens)
        if isinstance(event, Tokens):
            piece = answer.feed(event.ids, event.scores)
            if answer.stopped:
                self._finish(index, "stop")
                self.scheduler.cancel([job], "stop")
            return piece if piece.parts or piece.tokens or choice.finish else None
        assert isinstance(event, End)
        if event.reason not in ("stop", "length"):
            self.open.discard(index)
            self.service.cut |= event.reason == "cancelled"  # by the scheduler, that is: the server stops
            raise _failure(event.reason)
        piece = answer.rest()
        self._finish(index, "stop" if answer.stopped else event.reason)
        return piece

    def _finish(self, index: int, reason: str) -> None:
        self.choices[index].finish = reason
        self.open.discard(index)

    @property
    def usage(self) -> dict[str, Any]:
        prompts = self.jobs[:: self.asked.n or 1]  # a prompt counts once, however many answers it has
        return scheduler.usage(prompts, sum(answer.count for answer in self.answers))


def _failure(reason: str) -> Refused:
    if reason == "late":
        return Refused(503, "the request waited too long for its turn", code="timeout", seconds=5)
    if reason == "cancelled":
        return Refused(503, "the server is stopping", code="unavailable", seconds=5)
    return Refused(500, "the decoder failed; the server's log says how")


async def _answer(request: Request, call: Call) -> Response:
    call.begin()
    if call.asked.stream:
        return Stream(call)
    whole = asyncio.create_task(_whole(call))
    left = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([whole, left], return_when=asyncio.FIRST_COMPLETED)
        return await whole if whole.done() else Response(status_code=400)
    finally:
        whole.cancel()
        left.cancel()
        call.close()


async def _whole(call: Call) -> Response:
    async for item in call.pieces():
        if item is not None:
            call.choices[item[0]].add(item[1])
    return JSONResponse(call.form.whole(call.choices, call.usage))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A reply as server-sent events. The jobs are cancelled when the client leaves, wherever the reply is then."""

    def __init__(self, call: Call):
        self.call = call
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_events(call), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.close()


async def _events(call: Call) -> AsyncIterator[bytes]:
    form = call.form
    try:
        for choice in call.choices:
            yield guard.event(form.chunk([choice.first(form)]))
        async for item in call.pieces():
            if item is None:
                yield b": waiting\n\n"
                continue
            choice, piece = call.choices[item[0]], item[1]
            finish, choice.finish = choice.finish, None
            if piece.parts or piece.tokens:
                yield guard.event(form.chunk([choice.next(form, piece)]))
            if finish:
                choice.finish = finish
                yield guard.event(form.chunk([choice.last(form)]))
        if call.asked.include_usage:
            yield guard.event(form.chunk([], call.usage))
        yield guard.event("[DONE]")
    except Refused as refused:
        yield guard.event(replies.error(refused))
