"""Requests in OpenAI's form: what is read of them, what is ignored, and what is refused because it would change the meaning."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanojax import conversation
from nanojax.cli import UserError
from nanojax.engine.choose import Choice
from nanojax.engine.slots import TOP

MAX_SAMPLES = 8  # of `n`
MAX_STOPS = 4
DEFAULTS = (0.6, 50, 1.0)  # temperature, top_k, top_p: as `python -m nanojax.chat`
# What may be sent as long as it says what happens anyway. Keys that are not here nor below are ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "best_of": (1,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}


class Refused(Exception):
    """An answer of the status 4xx or 5xx, in OpenAI's form. `seconds`: when to try again."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, seconds: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.seconds = status, message, param, code, seconds


class Part(BaseModel):
    """A part of a message; python and python_output are the calculator's, in an assistant's message."""

    model_config = ConfigDict(strict=True)
    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class Request(BaseModel):
    """What both endpoints have."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choice(self) -> Choice:
        """How tokens are drawn."""
        given = (self.temperature, self.top_k, self.top_p)
        temperature, top_k, top_p = (default if value is None else value for value, default in zip(given, DEFAULTS))
        return Choice(temperature, max(0, top_k), max(1e-6, top_p))

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        whole = bool(self.prompt) and isinstance(self.prompt[0], int)
        return [self.prompt] if whole else list(self.prompt)  # pyright: ignore[reportReturnType]


Read = TypeVar("Read", bound=Request)


def read(kind: type[Read], body: bytes) -> Read:
    """The request in a body. Refused names the first thing that is wrong."""
    try:
        text = body.decode()
        json.loads(text, parse_constant=_no_constant)
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = _reason(error)
        parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"] if _is_place(part)]
        where = "".join(parts).lstrip(".")
        if first["type"] == "json_invalid" or not where:
            raise Refused(
                400, f"the body is not a JSON object that can be read: {first['msg']}", code="invalid_json"
            ) from None
        raise Refused(400, f"{where}: {first['msg']}", where, "invalid_value") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON that can be read: {str(error)[:200]}", code="invalid_json") from None
    for key, value in (request.model_extra or {}).items():
        if key in NEUTRAL and value is not None and value not in NEUTRAL[key]:
            raise Refused(400, f"{key}: is not supported; leave it out", key, "unsupported_parameter")
    if isinstance(request, CompletionRequest) and request.prompt == []:
        raise Refused(400, "prompt: is empty", "prompt", "invalid_value")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise Refused(400, "top_logprobs: needs logprobs to be true", "top_logprobs", "invalid_value")
    return request


def _reason(error: ValidationError) -> Any:
    """The first thing that is wrong, as pydantic tells it. Of the branches of a union the one that came furthest."""
    found = error.errors(include_url=False)
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    values = [one for one in same if not one["type"].endswith("_type")]
    first: Any = dict(found[0] if found[0] not in same or not values else values[0])
    key = first["loc"][0] if first["loc"] else ""
    if key == "prompt":
        first |= {"loc": ("prompt",), "msg": "must be text, ids, or a list of either"}
    elif key == "stop":
        what = {"too_long": f"at most {MAX_STOPS} strings", "string_too_short": "an empty string stops nothing"}
        other = first["msg"] if values else "must be a string or a list of strings"
        first |= {"loc": ("stop",), "msg": what.get(first["type"], other)}
    elif first["type"] == "too_short":
        first["msg"] = "is empty"
    return first


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _is_place(part: int | str) -> bool:
    """Pydantic names the branches of a union among the keys."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "constrained", "list"))


def messages(request: ChatRequest) -> list[conversation.Message]:
    """The request's messages as nanojax.conversation takes them, the last one the user's.

    Refused: 400 for what we cannot read, 422 for messages that are none that a model could answer.
    """
    out = []
    for i, message in enumerate(request.messages):
        where = f"messages[{i}]"
        if message.role not in ("system", "developer", "user", "assistant"):
            raise Refused(400, f"{where}.role: {message.role!r} is not supported", f"{where}.role", "unsupported_value")
        if any((message.model_extra or {}).get(key) for key in ("tool_calls", "function_call", "audio")):
            raise Refused(400, f"{where}: calls of tools are not supported", where, "unsupported_value")
        role = "system" if message.role == "developer" else message.role
        out.append({"role": role, "content": _content(message, role, where)})
    try:
        conversation.turns(out)
    except UserError as error:
        raise Refused(422, str(error), "messages", "not_a_conversation") from None
    if out[-1]["role"] != "user":
        raise Refused(422, "messages: the last one must be the user's", "messages", "not_a_conversation")
    return out


def _content(message: Message, role: str, where: str) -> Any:
    if role != "assistant" and message.content in (None, []):
        raise Refused(400, f"{where}.content: is missing", f"{where}.content", "invalid_value")
    if not isinstance(message.content, list):
        return message.content or ""
    kinds: Any = conversation.PARTS if role == "assistant" else ("text",)
    for j, part in enumerate(message.content):
        if part.type not in kinds or part.text is None:
            place = f"{where}.content[{j}]"
            raise Refused(
                400, f"{place}: a part of the type {part.type!r} is not supported", place, "unsupported_value"
            )
    if role == "assistant":
        return [{"type": part.type, "text": part.text} for part in message.content]
    return "\n".join(part.text or "" for part in message.content)


Status = Literal[400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503]


def openapi(version: str) -> dict[str, Any]:
    """The description of the endpoints that clients and fuzzers read."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, kind in (("/v1/chat/completions", ChatRequest), ("/v1/completions", CompletionRequest)):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        answer = {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        }
        paths[path] = {"post": {"requestBody": {"required": True, "content": body}, "responses": _responses(answer)}}
    for path in ("/v1/models", "/health"):
        paths[path] = {"get": {"responses": _responses({"application/json": {"schema": {"type": "object"}}})}}
    error = {"type": "object", "required": ["message", "type", "param", "code"]}
    schemas["Error"] = {"type": "object", "required": ["error"], "properties": {"error": error}}
    info = {"title": "nanojax", "version": version}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _responses(answer: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    failed = {str(status): {"description": "error", "content": error} for status in Status.__args__}
    return {"200": {"description": "answer", "content": answer}, **failed}
