"""What the server survives: in processes of their own, whose memory and end are looked at."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tensorflow_serving.apis import predict_pb2

from tests.serving.server.conftest import (
    Client,
    ServerProcess,
    StartProcess,
    arrays,
    free_port,
    predict_request,
)

PREDICT = "/tensorflow.serving.PredictionService/Predict"
GROWTH_MB = 300
CONCURRENT = 32


@pytest.fixture(scope="module")
def server(start_process: StartProcess, toys: list[Path], tmp_path_factory: Any) -> Iterator:
    base = tmp_path_factory.mktemp("faults") / "toy"
    base.mkdir()
    os.symlink(toys[1], base / "1")
    port = free_port()
    monitoring = base.parent / "monitoring"
    monitoring.write_text('prometheus_config { enable: true path: "/metrics" }')
    batching = base.parent / "batching"
    batching.write_text(
        "max_batch_size { value: 16 } batch_timeout_micros { value: 2000 } "
        "max_enqueued_batches { value: 4 } num_batch_threads { value: 4 } "
        "allowed_batch_sizes: 4 allowed_batch_sizes: 16"
    )
    with start_process(
        base,
        "--enable_batching",
        f"--batching_parameters_file={batching}",
        "--max_message_bytes=4000000",
        # What is held takes a thread of each kind.
        "--tensorflow_inter_op_parallelism=6",
        f"--max_concurrent_requests={CONCURRENT}",
        f"--rest_api_port={port}",
        f"--monitoring_config_file={monitoring}",
        "--file_system_poll_wait_seconds=0.1",
    ) as process:
        process.base = base
        process.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        yield process


def in_progress(server: ServerProcess) -> int:
    """How many predictions the server is working on."""
    page = server.http.get("/metrics").text
    (family,) = (f for f in text_string_to_metric_families(page) if "in_progress" in f.name)
    return int(family.samples[0].value)


@contextlib.contextmanager
def held(path: Path, rows: int = 1) -> Iterator[predict_pb2.PredictRequest]:
    """A request whose answer cannot come before the block ends, however slow or fast this is."""
    path.touch()
    try:
        yield predict_request("hold", path=[str(path).encode()] * rows)
    finally:
        path.unlink(missing_ok=True)


def is_well(server: ServerProcess) -> None:
    assert server.client.offset() == 1
    assert server.client.health() == "SERVING"


def png(width: int, height: int) -> bytes:
    """A black PNG, whole up to 20 million pixels and cut off beyond: a small file in any case."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    content = b""
    for _ in range(min(height, 20_000_000 // width)):
        content += packer.compress(bytes(1 + 3 * width))
    content += packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


def jpeg_that_claims(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


BOMBS = [png(30_000, 30_000), png(2**31 - 1, 2**31 - 1), jpeg_that_claims(65_000, 65_000)]
BOMBS.append(b"GIF89a" + struct.pack("<HHBBB", 65_000, 65_000, 0, 0, 0) + bytes(100))
# A small screen with frames that are larger.
FRAME = b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x44\x01\x00"
BOMBS.append(b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + 3 * FRAME + b";")
BOMBS.append(b"BM" + bytes(16) + struct.pack("<ii", 60_000, -60_000) + bytes(100))


def mutate(rng: random.Random) -> predict_pb2.PredictRequest | bytes:
    """A request that is wrong in some way."""
    signature, name, value = rng.choice(
        [
            ("", "x", np.ones([rng.randrange(4), 2], np.float32)),
            ("root", "x", np.ones([2], np.float32)),
            ("decode", "image_bytes", [b"x" * rng.randrange(100)]),
        ]
    )
    request = predict_request(signature, **{name: value})
    tensor = request.inputs[name]
    sizes = [-1, -(2**63), 0, 1, 3, 7, 10**6, 2**31, 2**40, 2**62, 2**63 - 1]
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(13)
        if kind == 0:
            tensor.dtype = rng.choice([*range(25), 101, 106, 999])  # type: ignore[assignment]
        elif kind == 1 and tensor.tensor_shape.dim:
            rng.choice(tensor.tensor_shape.dim).size = rng.choice(sizes)
        elif kind == 2:
            for _ in range(rng.choice([1, 3, 300])):
                tensor.tensor_shape.dim.add().size = rng.choice(sizes)
        elif kind == 3:
            tensor.tensor_shape.unknown_rank = True
        elif kind == 4:
            tensor.tensor_content = rng.randbytes(rng.randrange(40))
        elif kind == 5:
            tensor.float_val.extend([rng.random()] * rng.randrange(5))
        elif kind == 6:
            tensor.string_val.extend([rng.randbytes(rng.randrange(30))] * rng.randrange(3))
        elif kind == 7:
            request.inputs[rng.choice(["", "z", "\0", "x" * 1000])].CopyFrom(tensor)
        elif kind == 8:
            request.model_spec.signature_name = rng.choice(["no", "\U0010ffff", "x" * 5000])
        elif kind == 9:
            request.output_filter.append(rng.choice(["y", "no", ""]))
        elif kind == 10:
            request.model_spec.version.value = rng.choice([-1, 0, 1, 2**63 - 1])
        elif kind == 11 and signature == "decode":
            tensor.string_val[:] = [rng.choice(BOMBS)[: rng.choice([10, 20, 60, None])]]
        else:
            serialized = bytearray(request.SerializeToString())
            for _ in range(rng.randrange(1, 6)):
                serialized[rng.randrange(len(serialized))] = rng.randrange(256)
            return bytes(serialized[: rng.randrange(len(serialized) + 1)])
    return request


def test_survives_malformed_requests(server: ServerProcess):
    is_well(server)
    before = server.rss
    raw = server.client.channel.unary_unary(PREDICT)
    rng = random.Random(7)
    requests = [mutate(rng) for _ in range(1500)]
    codes: dict[str, int] = {}

    def send(request: predict_pb2.PredictRequest | bytes) -> str:
        content = request if isinstance(request, bytes) else request.SerializeToString()
        try:
            raw(content, timeout=60)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

    with futures.ThreadPoolExecutor(8) as pool:
        for code in pool.map(send, requests):
            codes[code] = codes.get(code, 0) + 1
    assert codes.pop("INVALID_ARGUMENT") > 500
    # Some mutants are in order; no client's mistake is INTERNAL.
    assert set(codes) <= {"OK", "NOT_FOUND", "FAILED_PRECONDITION"}, codes
    is_well(server)
    assert server.rss < before + GROWTH_MB
    log = server.log.read_text()
    assert "Traceback" not in log
    # The server's own lines: TensorFlow and protobuf have words for what they could not read.
    assert not re.search(r"^\d{4}-\d\d-\d\d [\d:,]+ ERROR ", log, re.M)


@pytest.mark.parametrize(
    "method",
    [
        "tensorflow.serving.ModelService/GetModelStatus",
        "grpc.health.v1.Health/Check",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_what_is_no_request_is_the_mistake_of_its_client(server: ServerProcess, method: str):
    channel = server.client.channel
    with pytest.raises(grpc.RpcError) as failure:
        if "Reflection" in method:
            list(channel.stream_stream(f"/{method}")(iter([b"\xff" * 9]), timeout=30))
        else:
            channel.unary_unary(f"/{method}")(b"\xff" * 9, timeout=30)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"no request for /{method}" in failure.value.details()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("bomb", BOMBS, ids=["png", "huge_png", "jpeg", "gif", "gif_frames", "bmp"])
def test_image_bombs_are_refused_before_they_are_decoded(server: ServerProcess, bomb: bytes):
    before = server.rss
    begin = time.monotonic()
    code, message = server.client.refusal(predict_request("decode", image_bytes=[bomb]))
    assert code == "INVALID_ARGUMENT"
    assert "more than the 25000000 that this server decodes" in message
    assert time.monotonic() - begin < 5
    assert server.rss < before + GROWTH_MB


def test_a_message_of_long_characters_arrives(server: ServerProcess):
    code, message = server.client.refusal(predict_request("\U0010ffff" * 5000))
    assert code == "FAILED_PRECONDITION"
    assert message.startswith('Serving signature key "\U0010ffff')
    assert message.endswith("...TRUNCATED")


@pytest.mark.parametrize("content", [b"", b"not an image", png(8, 8)[:40], b"\xff\xd8\xff"])
def test_what_is_no_image_fails_alone(server: ServerProcess, content: bytes):
    good = predict_request("decode", image_bytes=[png(8, 8)])
    pending = [server.client.stub.Predict.future(good, timeout=30) for _ in range(4)]
    code, _ = server.client.refusal(predict_request("decode", image_bytes=[content]))
    assert code == "INVALID_ARGUMENT"
    assert [arrays(item.result())["mean"].tolist() for item in pending] == [[0]] * 4


def test_a_large_image_in_bounds_is_decoded(server: ServerProcess):
    mean = server.client.predict("decode", image_bytes=[png(2000, 2000)], timeout=60)["mean"]
    assert mean.tolist() == [0]


def test_deadlines(server: ServerProcess):
    with pytest.raises(grpc.RpcError) as failure:
        server.client.predict("work", loops=np.int32([2**31 - 1]), timeout=0.5)
    assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    # The client gives up by itself; the server does, too: it would work for days.
    server.wait(lambda: in_progress(server) == 0)
    process = psutil.Process(server.process.pid)
    server.wait(lambda: process.cpu_percent(0.5) < 50)
    is_well(server)


CLIENT = """
import grpc, sys, threading
channel = grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}")
request = sys.stdin.buffer.read()
pending = [channel.unary_unary(sys.argv[2]).future(request, timeout=60) for _ in range(3)]
threading.Event().wait()
"""


def test_a_client_that_is_killed_in_the_middle(server: ServerProcess, tmp_path: Path):
    command = [sys.executable, "-c", CLIENT, str(server.port), PREDICT]
    with held(tmp_path / "hold") as request:
        client = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            assert client.stdin is not None
            client.stdin.write(request.SerializeToString())
            client.stdin.close()
            server.wait(lambda: in_progress(server) == 3)
        finally:
            client.kill()
            client.wait()
        is_well(server)
    # None of its requests takes a place any longer.
    server.wait(lambda: in_progress(server) == 0)
    is_well(server)


@pytest.mark.parametrize(
    ("rows", "most", "reason"),
    [
        (1, CONCURRENT, f"{CONCURRENT} requests are being answered already"),
        # Four batches run and four wait; which of them run when the first is refused is open.
        (16, 8, "batch scheduling queue to which this task was submitted is full"),
    ],
    ids=["requests", "queue"],
)
def test_beyond_its_bounds_it_refuses_and_recovers(
    server: ServerProcess, tmp_path: Path, rows: int, most: int, reason: str
):
    before = server.rss
    with held(tmp_path / "hold", rows) as request:
        pending = [server.client.stub.Predict.future(request, timeout=120) for _ in range(400)]
        server.wait(lambda: sum(item.done() for item in pending) >= len(pending) - most)
        refused = [item for item in pending if item.done()]
        assert server.rss < before + GROWTH_MB
    assert {item.code().name for item in refused} == {"RESOURCE_EXHAUSTED"}
    assert any(reason in item.details() for item in refused)
    kept = [item for item in pending if item not in refused]
    assert most / 2 <= len(kept) <= most
    for item in kept:
        assert len(arrays(item.result())["path"]) == rows
    server.wait(lambda: in_progress(server) == 0)
    is_well(server)


def test_switching_versions_does_not_add_up_in_memory(server: ServerProcess, toys: list[Path]):
    sizes = []
    for number in range(2, 10):
        os.symlink(toys[1], server.base / str(number))
        expected = {number - 1: "END", number: "AVAILABLE"}
        server.wait(lambda wanted=expected: server.client.states().items() >= wanted.items())
        sizes.append(server.rss)
    assert sizes[-1] < sizes[2] + 40, sizes


def test_sigterm_under_load_loses_no_accepted_request(server: ServerProcess, tmp_path: Path):
    """Last of those with this server: it ends."""
    refused: list[grpc.RpcError] = []
    answered = threading.Event()
    ended = threading.Event()

    def keep_asking() -> None:
        client = Client(f"127.0.0.1:{server.port}")
        while not ended.is_set():
            try:
                assert client.offset() == 1
                answered.set()
            except grpc.RpcError as error:
                refused.append(error)
                time.sleep(0.01)

    with held(tmp_path / "hold") as request:
        accepted = [server.client.stub.Predict.future(request, timeout=120) for _ in range(3)]
        server.wait(lambda: in_progress(server) == 3)
        with futures.ThreadPoolExecutor(4) as pool:
            load = [pool.submit(keep_asking) for _ in range(4)]
            try:
                assert answered.wait(60)
                assert not refused
                server.process.send_signal(signal.SIGTERM)
                server.wait(lambda: len(refused) > 20)
                assert not any(item.done() for item in accepted)
                (tmp_path / "hold").unlink()
                for item in accepted:
                    assert len(arrays(item.result())["path"]) == 1
                assert server.process.wait(60) == 0
            finally:
                ended.set()
    for item in load:
        item.result()
    # Nobody was cut off in the middle: what failed had not been let in.
    assert {error.code().name for error in refused} == {"UNAVAILABLE"}
    assert "drained" in server.log.read_text()


def test_it_lives_or_ends_when_memory_ends(
    start_process: StartProcess, toys: list[Path], tmp_path: Path
):
    """Never: HTTP says that all is well, and gRPC is dead for ever."""
    (tmp_path / "toy").mkdir()
    os.symlink(toys[1], tmp_path / "toy" / "1")
    with start_process(tmp_path / "toy") as server:
        size = psutil.Process(server.process.pid).memory_info().vms + (200 << 20)
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (size, size))
        request = predict_request(x=np.ones([7_500_000, 2], np.float32))
        pending = [server.client.stub.Predict.future(request, timeout=60) for _ in range(24)]
        for item in pending:
            item.exception()
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert server.process.wait(3) != 0
            return
        is_well(server)


def test_a_full_disk(start_process: StartProcess, toys: list[Path], tmp_path: Path):
    """Nothing can be written from the start, neither the log nor any other file."""

    def forbid_writing() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    (tmp_path / "toy").mkdir()
    os.symlink(toys[1], tmp_path / "toy" / "1")
    with (
        open("/dev/full", "wb") as full,
        start_process(
            tmp_path / "toy",
            "--file_system_poll_wait_seconds=0.1",
            stderr=full,
            preexec_fn=forbid_writing,
        ) as server,
    ):
        is_well(server)
        # Each of these is worth a line in the log.
        (tmp_path / "toy" / "2").mkdir()
        server.wait(lambda: server.client.states().get(2) == "LOADING")
        server.wait(lambda: "cannot be loaded" in server.client.errors()[2])
        os.symlink(toys[3], tmp_path / "toy" / "3")
        server.wait(lambda: server.client.states().get(3) == "AVAILABLE")
        assert server.client.offset() == 3
        assert server.stop() == 0
