"""What every request passes before its endpoint: host, key, an id, a count; and errors in OpenAI's form whatever raised them."""

import hmac
import json
import logging
import re
import secrets
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanojax.serve import replies
from nanojax.serve.metrics import Metrics
from nanojax.serve.protocol import Refused

log = logging.getLogger("nanojax.serve")
OPEN = ("/", "/health", "/openapi.json")  # paths that need no key
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class Guard:
    """ASGI middleware.

    Args:
      hosts: names that the Host header may have; None = any. A page of another site that a browser was made to find at this
        address (DNS rebinding) comes with that site's name.
      key: of the Authorization header; None = none is asked for.
      paths: those that are counted by name.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, hosts: frozenset[str] | None, key: str | None, paths: frozenset[str]
    ):
        self.app, self.metrics, self.hosts, self.key, self.paths = app, metrics, hosts, key, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        id = asked if re.fullmatch(r"[\w.:-]{1,100}", asked, re.ASCII) else secrets.token_hex(16)
        path = scope["path"] if scope["path"] in self.paths else "other"
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                extra = {"x-request-id": id, **HEADERS}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self.app(scope, receive, answer)
        except Refused as refused:
            await refusal(refused)(scope, receive, answer)
        except Exception:
            log.exception("request %s failed", id)
            if not begun:
                await refusal(Refused(500, "the server failed; its log says how"))(scope, receive, answer)

    def _check(self, path: str, headers: Headers) -> None:
        host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
        if self.hosts is not None and host not in self.hosts:
            raise Refused(403, f"this server does not answer for the host {host[:100]!r}", code="wrong_host")
        if self.key is not None and path not in OPEN:
            given = headers.get("authorization", "").encode("utf-8", "replace")
            scheme, _, rest = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(rest, self.key.encode()):
                raise Refused(401, "give the server's key as Authorization: Bearer KEY", code="invalid_api_key")


def refusal(refused: Refused) -> Response:
    """The reply that is an error."""
    headers = {"retry-after": str(refused.seconds)} if refused.seconds else {}
    headers |= {"www-authenticate": "Bearer"} if refused.status == 401 else {}
    return JSONResponse(replies.error(refused), refused.status, headers)


async def http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    what = {404: f"{request.url.path[:100]}: no such path", 405: f"{request.method}: not a method of this path"}
    response = refusal(Refused(error.status_code, what.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response


async def refused_error(request: Request, error: Exception) -> Response:
    """What an endpoint refuses."""
    assert isinstance(error, Refused)
    return refusal(error)


def event(data: dict[str, Any] | str) -> bytes:
    """One event of a stream."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
