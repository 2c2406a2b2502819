"""A process that parses JSON for `json_workers`: `python -m serving.server.json_worker FD`.

Of a request it receives two lengths, what it has to know as JSON, and the body; of an answer it
sends the length, JSON, and with it a file in memory that holds the arrays.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

import numpy as np

from serving.server import json_input
from serving.server.json_input import JsonError, Kind

LENGTHS = struct.Struct(">QQ")
ALIGNMENT = 64
# What parsing may take, as a multiple of the body, which counts, too.
_MEMORY_FACTOR = 5
_MEMORY_BYTES = 32 << 20


def main() -> None:
    """Answers until the other side closes the socket."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # The server decides when it ends
    gc.disable()  # JSON has no cycles, and millions of lists to look for them in
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        while header := _receive(channel, LENGTHS.size):
            known_length, body_length = LENGTHS.unpack(header)
            try:
                known = json.loads(_receive(channel, known_length))
                with _bounded_memory(_MEMORY_FACTOR * body_length + _MEMORY_BYTES):
                    answer, file = _parse(_receive(channel, body_length), known)
            except MemoryError:
                message = f"the JSON takes more memory than {_MEMORY_FACTOR} times its length"
                answer, file = {"error": ["RESOURCE_EXHAUSTED", message]}, None
            content = json.dumps(answer).encode()
            files = [] if file is None else [file]
            socket.send_fds(channel, [struct.pack(">Q", len(content))], files)
            channel.sendall(content)
            for descriptor in files:
                os.close(descriptor)


def _receive(channel: socket.socket, length: int) -> bytes:
    """So many bytes, or none at the end."""
    content = bytearray(length)
    view, got = memoryview(content), 0
    while got < length:
        count = channel.recv_into(view[got:])
        if not count:
            return b""
        got += count
    return content  # type: ignore[return-value]  # a copy of 60 MB is not worth the name


@contextlib.contextmanager
def _bounded_memory(extra: int) -> Any:
    """Limits what the block may allocate, as far as the system can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + extra
    except OSError:
        limit = soft
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _parse(body: bytes, known: Any) -> tuple[dict[str, Any], int | None]:
    signatures = {
        name: {key: Kind(*kind) for key, kind in inputs.items()}
        for name, inputs in known["signatures"].items()
    }
    try:
        inputs = json_input.parse(body, signatures, known["max_bytes"])
    except JsonError as error:
        return {"error": [error.code, str(error)]}, None
    descriptor = os.memfd_create("arrays")
    arrays = []
    with open(descriptor, "wb", closefd=False) as file:
        for name, array in inputs.arrays.items():
            file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            arrays.append([name, array.dtype.str, array.shape, file.tell()])
            if array.dtype == np.object_:
                items = array.ravel().tolist()
                file.write(np.array([len(item) for item in items], np.int64).tobytes())
                file.writelines(items)
            else:
                file.write(np.ascontiguousarray(array).data)
        file.write(b"\0")  # None is empty, nor begins at its end
    answer = {"signature": inputs.signature, "by_row": inputs.by_row, "arrays": arrays}
    return answer, descriptor


if __name__ == "__main__":
    main()
