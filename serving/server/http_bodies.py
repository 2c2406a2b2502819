"""Request bodies: how large, how slow, and how much of them all together.

In the thread of the event loop, but for `Bodies.inflate`.
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio

from serving.server.errors import HttpError

_LINGER_SECONDS = 1.0  # In which what is too large is read on, so that its sender reads the answer
_STALL_SECONDS = 1.0  # Without a byte, after which nobody is waited for when the server drains
_PIECE_BYTES = 1 << 20


class _Body:
    """One that is being read."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size = 0
        self.last = time.monotonic()  # When something of it came
        self.scope: anyio.CancelScope | None = None  # None: nobody waits for it
        self.error: HttpError | None = None


class Bodies:
    """Reads bodies within bounds.

    When all of them together take too much memory, the one that has been waiting for its sender
    the longest is given up.
    """

    def __init__(self, max_bytes: int, max_total_bytes: int, seconds: float):
        """Sets up.

        Args:
          max_bytes: Of a body, compressed or not.
          max_total_bytes: Of all bodies, until they have been parsed.
          seconds: In which a body has to be there.
        """
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._seconds = seconds
        self._lock = threading.Lock()
        self._total = 0
        self._reading: set[_Body] = set()

    @contextlib.asynccontextmanager
    async def read(self, receive: Any, headers: Any) -> AsyncIterator[list[bytes]]:
        """Reads a body, whose memory counts until the block ends.

        Args:
          receive: ASGI's.
          headers: Of the request.

        Yields:
          The body in pieces.

        Raises:
          HttpError: It is too large, too slow, or there is no memory for it.
        """
        length = headers.get("content-length", "")
        body = _Body()
        scope = body.scope = anyio.CancelScope(deadline=anyio.current_time() + self._seconds)
        self._reading.add(body)
        try:
            with scope:
                if length.isdecimal() and int(length) > self._max_bytes:
                    if "expect" not in headers:
                        await _discard(receive)
                    raise self._too_large()
                await self._read_all(receive, body)
            if scope.cancelled_caught:
                raise body.error or HttpError(
                    408, f"the body did not arrive within {self._seconds:g} s", "slow_body"
                )
            self._reading.discard(body)
            yield body.pieces
        finally:
            self._reading.discard(body)
            body.pieces.clear()
            self._give_back(body)

    async def _read_all(self, receive: Any, body: _Body) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HttpError(499, "the client has gone")
            more = message.get("more_body", False)
            piece = message.get("body", b"")
            body.last = time.monotonic()
            body.size += len(piece)
            self._take(len(piece))
            if body.size > self._max_bytes:
                body.pieces.clear()
                self._give_back(body)
                if more:
                    await _discard(receive)
                raise self._too_large()
            body.pieces.append(piece)
            while self._total > self._max_total_bytes and body.error is None:
                stalest = min(self._reading, key=lambda each: each.last)
                self._give_up(
                    stalest, HttpError(429, "there is no memory for this body now", "memory")
                )
            if body.error is not None:
                raise body.error

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body is larger than {self._max_bytes} bytes", "large_body")

    def _take(self, size: int) -> None:
        with self._lock:
            self._total += size

    def _give_back(self, body: _Body) -> None:
        with self._lock:
            self._total -= body.size
        body.size = 0

    def _give_up(self, body: _Body, error: HttpError) -> None:
        self._reading.discard(body)
        body.error = error
        body.pieces.clear()
        self._give_back(body)
        if body.scope is not None:
            body.scope.cancel()

    def drop_stalled(self) -> None:
        """Gives up bodies whose senders are silent, since the server is to end."""
        for body in list(self._reading):
            if time.monotonic() - body.last > _STALL_SECONDS:
                self._give_up(body, HttpError(503, "the server is shutting down", "drain"))

    @contextlib.contextmanager
    def inflate(self, pieces: list[bytes], encoding: str) -> Iterator[list[bytes]]:
        """Undoes a Content-Encoding, in any thread; the memory counts until the block ends.

        Raises:
          HttpError: It is none of `gzip` and `identity`, or what comes out is too large or damaged.
        """
        if encoding.lower() in ("", "identity"):
            yield pieces
            return
        if encoding.lower() not in ("gzip", "x-gzip"):
            raise HttpError(415, f"Content-Encoding {encoding!r}: only gzip is understood")
        body = _Body()
        try:
            self._inflate(pieces, body)
            yield body.pieces
        finally:
            body.pieces.clear()
            self._give_back(body)

    def _inflate(self, pieces: list[bytes], body: _Body) -> None:
        inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            for piece in pieces:
                while piece:
                    out = inflater.decompress(piece, _PIECE_BYTES)
                    piece = inflater.unconsumed_tail
                    body.pieces.append(out)
                    body.size += len(out)
                    self._take(len(out))
                    if body.size > self._max_bytes:
                        raise self._too_large()
                    if self._total > self._max_total_bytes:
                        raise HttpError(429, "there is no memory for this body now", "memory")
        except zlib.error as error:
            raise HttpError(400, f"the body is not gzip: {error}") from None
        if not inflater.eof or inflater.unused_data:
            raise HttpError(400, "the body is not gzip: it is cut off, or more follows")
        pieces.clear()


async def _discard(receive: Any) -> None:
    with anyio.move_on_after(_LINGER_SECONDS):
        while (await receive()).get("more_body", False):
            pass
