"""Parses long JSON bodies in processes of their own.

Python parses with the interpreter locked: 60 MB stop every other thread, health among them, for
seconds, and may take gigabytes. A process can be bounded and ended.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from serving.server import json_input
from serving.server.errors import RequestError, deadline_exceeded, resource_exhausted
from serving.server.json_input import Inputs, JsonError, Signatures
from serving.server.json_worker import LENGTHS

_LONG_BYTES = 1 << 16  # Shorter bodies are parsed at once, within a few milliseconds
_POLL_SECONDS = 0.2
# After these, a process is as it was before.
_FAULTS_OF_BODY = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
_ROOT = Path(__file__).resolve().parents[2]


class Workers:
    """Processes that parse; all but the first are started when they are needed."""

    def __init__(self, count: int, max_bytes: int):
        """Sets up.

        Args:
          count: Of processes.
          max_bytes: What an input may take once it is unpacked.
        """
        self._max_bytes = max_bytes
        # The one that was used last is the first to be used again.
        self._places: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(count - 1):
            self._places.put(None)
        self._places.put(_Worker())

    def parse(
        self,
        body: list[bytes],
        signatures: Signatures,
        deadline: float,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Inputs:
        """Parses a body, see `json_input.parse`.

        Args:
          body: In pieces; emptied, since the memory is needed.
          signatures: Of the model.
          deadline: time.monotonic() after which nobody waits any more.
          is_wanted: Whether the client is still there.

        Raises:
          RequestError: It is no request, takes too much memory, or too long.
        """
        try:
            if sum(map(len, body)) < _LONG_BYTES:
                return json_input.parse(b"".join(body), signatures, self._max_bytes)
        except JsonError as error:
            raise RequestError(grpc.StatusCode[error.code], str(error)) from None
        try:
            place = self._places.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise deadline_exceeded("the deadline passed before the JSON was parsed") from None
        worker, keep = place, False
        try:
            worker = worker or _Worker()
            known = {"signatures": signatures, "max_bytes": self._max_bytes}
            worker.send(json.dumps(known).encode(), body, deadline)
            inputs = worker.receive(deadline, is_wanted)
            keep = True
        except RequestError as error:
            keep = error.code in _FAULTS_OF_BODY
            raise
        except TimeoutError:
            raise deadline_exceeded("the deadline passed before the JSON was parsed") from None
        except (OSError, EOFError, struct.error):
            raise resource_exhausted("the JSON could not be parsed: the parser ended") from None
        finally:
            if worker is not None and not keep:
                worker.close()
            self._places.put(worker if keep else None)
        return inputs

    def close(self) -> None:
        """Ends the processes that are idle."""
        with contextlib.suppress(queue.Empty):
            while True:
                worker = self._places.get_nowait()
                if worker is not None:
                    worker.close()


class _Worker:
    """One process, which ends with its socket."""

    def __init__(self) -> None:
        self._channel, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving.server.json_worker", str(other.fileno())],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path]),
                    "OPENBLAS_NUM_THREADS": "1",
                    # Large blocks go back to the system when they are freed, always.
                    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
                },
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def send(self, known: bytes, body: list[bytes], deadline: float) -> None:
        self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
        self._channel.sendall(LENGTHS.pack(len(known), sum(map(len, body))) + known)
        for piece in body:
            self._channel.sendall(piece)
        body.clear()

    def receive(self, deadline: float, is_wanted: Callable[[], bool]) -> Inputs:
        header = b""
        files: list[int] = []
        self._channel.settimeout(_POLL_SECONDS)
        while not header:
            if time.monotonic() >= deadline:
                raise deadline_exceeded("the deadline passed while the JSON was parsed")
            if not is_wanted():
                raise RequestError(grpc.StatusCode.CANCELLED, "the client has gone")
            with contextlib.suppress(TimeoutError):
                header, files, _, _ = socket.recv_fds(self._channel, 8, 1)
                if not header:
                    raise EOFError
        self._channel.settimeout(None)
        try:
            (length,) = struct.unpack(">Q", header)
            answer = json.loads(_receive(self._channel, length))
            if "error" in answer:
                code, message = answer["error"]
                raise RequestError(grpc.StatusCode[code], message)
            # Closed with the last array that is in it
            content = mmap.mmap(files[0], 0, access=mmap.ACCESS_READ)
            arrays = {name: _view(content, *where) for name, *where in answer["arrays"]}
        finally:
            for file in files:
                os.close(file)
        return Inputs(answer["signature"], answer["by_row"], arrays)

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()


def _receive(channel: socket.socket, length: int) -> bytes:
    content = b""
    while len(content) < length:
        piece = channel.recv(length - len(content))
        if not piece:
            raise EOFError
        content += piece
    return content


def _view(content: mmap.mmap, dtype: str, shape: list[int], offset: int) -> Any:
    count = int(np.prod(shape, dtype=np.int64))
    if dtype != "|O":
        return np.frombuffer(content, dtype, count, offset).reshape(shape)
    lengths = np.frombuffer(content, np.int64, count, offset).tolist()
    array = np.empty(count, np.object_)
    begin = offset + 8 * count
    for index, length in enumerate(lengths):
        array[index] = content[begin : begin + length]
        begin += length
    return array.reshape(shape)
