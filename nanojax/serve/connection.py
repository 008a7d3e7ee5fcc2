"""A connection whose requests must arrive in time: uvicorn waits forever for headers that do not end."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS = 30.0  # seconds, from the connection's begin or the request's first byte


class Connection(H11Protocol):
    """uvicorn's, closed where a request's headers take longer than HEADERS. Between requests its own keep-alive limit holds."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The first request may begin."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Of headers or of a body."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget()
        elif self.waiting is None:
            self.waiting = self.loop.call_later(HEADERS, self.transport.close)

    def _forget(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None
