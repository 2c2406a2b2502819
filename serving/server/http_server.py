"""The HTTP server: uvicorn with httptools, and the bounds of connections that it lacks.

uvicorn ends a connection that is silent after an answer, but waits for ever for one that is silent
from the start, or sends its header byte by byte, and counts all of them as being at work. Here,
waiting connections have a limit of their own and deadlines; in the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

IDLE_SECONDS = 60.0  # Until a request begins
HEADER_SECONDS = 10.0  # Until its header is there
# In the extensions of ASGI's scope: a function that tells whether the client is still there.
IS_OPEN = "is_open"
_HEADER_BYTES = 1 << 16
_SWEEP_SECONDS = 0.25
_RESERVED_FILES = 256  # For models, gRPC's connections and the rest

CountRefusal = Callable[[str, str], None]


class _Connections:
    """Those that are open."""

    def __init__(self, limit: int, count_refusal: CountRefusal):
        self.limit = limit
        self.count_refusal = count_refusal
        self.every: set[Any] = set()
        # Without a request at work, the one that has been so for the longest first
        self.waiting: dict[Any, None] = {}

    def make_room(self) -> bool:
        """Closes the idlest if there are too many; returns whether there is room."""
        if len(self.every) <= self.limit:
            return True
        for idlest in self.waiting:
            self.count_refusal("idle", f"more than {self.limit} connections, closed the idlest")
            idlest.drop()
            return True
        return False

    def sweep(self) -> None:
        """Closes those that have waited for too long."""
        now = time.monotonic()
        for connection in list(self.waiting):
            begun = connection.header_begun
            if begun is not None and now - begun > HEADER_SECONDS:
                connection.refuse(408, f"no whole header within {HEADER_SECONDS:g} s", "header")
            elif now - connection.since > IDLE_SECONDS:
                connection.drop()


def _protocol(connections: _Connections) -> type[HttpToolsProtocol]:
    class Protocol(HttpToolsProtocol):
        """A connection.

        Attributes:
          since: When it began to wait for a request.
          header_begun: When the first byte of that came; None: none has.
        """

        since = 0.0
        header_begun: float | None = None
        _unparsed = 0  # Bytes since the parser made something of them

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connections.every.add(self)
            if connections.make_room():
                self._wait()
            else:
                self.refuse(503, "all connections are at work, try again later", "connections")

        def connection_lost(self, exc: Exception | None) -> None:
            connections.every.discard(self)
            connections.waiting.pop(self, None)
            super().connection_lost(exc)

        def _wait(self) -> None:
            self.since, self.header_begun, self._unparsed = time.monotonic(), None, 0
            connections.waiting.pop(self, None)
            connections.waiting[self] = None

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.header_begun is None:
                self.header_begun = time.monotonic()
            self._unparsed += len(data)
            super().data_received(data)
            if self._unparsed > _HEADER_BYTES and not self.transport.is_closing():
                self.refuse(431, f"a header of more than {_HEADER_BYTES} bytes", "header")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {IS_OPEN: self._is_open}

        def _is_open(self) -> bool:
            return not self.transport.is_closing()

        def on_headers_complete(self) -> None:
            self._unparsed = 0
            connections.waiting.pop(self, None)
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._unparsed = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._unparsed = 0
            self.flow.resume_reading()  # Else it would not be seen that the client goes
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # No other request was waiting in line
                self._wait()
                if self.cycle.more_body:  # Which nobody is going to read
                    self.transport.close()

        def send_400_response(self, msg: str) -> None:
            self.refuse(400, msg, "malformed")

        def refuse(self, status: int, message: str, reason: str) -> None:
            """Answers, in place of the application, and closes the connection."""
            connections.count_refusal(reason, message)
            content = json.dumps({"error": message}).encode() + b"\n"
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\nconnection: close\r\n"
                + b"content-length: %d\r\n\r\n" % len(content)
                + content
            )
            self.transport.close()
            self._wait()

        def drop(self) -> None:
            """Closes the connection, with what its client has not read, if that is so."""
            connections.waiting.pop(self, None)
            connections.every.discard(self)
            self.transport.abort()

    return Protocol


class HttpServer:
    """Serves an ASGI application, in a thread."""

    def __init__(
        self,
        app: Any,
        address: tuple[str, int],
        max_connections: int,
        count_refusal: CountRefusal,
        on_drain: Callable[[], None],
    ):
        """Takes the port.

        Args:
          app: ASGI's.
          address: Host and port.
          max_connections: At a time.
          count_refusal: Told of what was refused: a word and a sentence.
          on_drain: Called now and then, in the event loop's thread, once `drain` has begun.

        Raises:
          OSError: It is taken, or the address is not this machine's.
        """
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            self._socket = socket.create_server(address, family=family, backlog=1024)
        except OSError as error:
            raise OSError(f"{address[0]}:{address[1]} cannot be listened on: {error}") from error
        self._connections = _Connections(_within_open_files(max_connections), count_refusal)
        self._on_drain = on_drain
        # What it says of single requests, everybody could fill the log with.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            interface="asgi3",
            proxy_headers=False,
            http=_protocol(self._connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(IDLE_SECONDS) + 1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="rest", daemon=True)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        sweeper = asyncio.create_task(self._sweep())
        await self._server.serve([self._socket])
        sweeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sweeper

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._connections.sweep()
            if self._server.should_exit:
                self._on_drain()

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def drain(self, seconds: float) -> None:
        """Refuses new connections and waits for accepted requests."""
        self._server.config.timeout_graceful_shutdown = math.ceil(seconds) + 1
        self._server.should_exit = True
        self._thread.join(seconds)


def _within_open_files(connections: int) -> int:
    """Raises the limit of open files as far as it goes; so many connections fit below."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _RESERVED_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(allowed - _RESERVED_FILES, 16)
