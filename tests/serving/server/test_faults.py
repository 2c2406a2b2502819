"""What the server survives: in processes of their own, whose memory and end are looked at."""

from __future__ import annotations

import io
import random
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from tensorflow_serving.apis import predict_pb2

from tests.serving.server.conftest import (
    ServerProcess,
    StartProcess,
    arrays,
    predict_request,
)

PREDICT = "/tensorflow.serving.PredictionService/Predict"
GROWTH_MB = 300


@pytest.fixture(scope="module")
def server(start_process: StartProcess, toys: list[Path], tmp_path_factory: Any) -> Iterator:
    base = tmp_path_factory.mktemp("faults") / "toy"
    shutil.copytree(toys[1], base / "1")
    batching = base.parent / "batching"
    batching.write_text(
        "max_batch_size { value: 16 } batch_timeout_micros { value: 2000 } "
        "max_enqueued_batches { value: 4 } allowed_batch_sizes: 4 allowed_batch_sizes: 16"
    )
    with start_process(
        base,
        "--enable_batching",
        f"--batching_parameters_file={batching}",
        "--max_message_bytes=4000000",
        "--max_concurrent_requests=32",
        "--file_system_poll_wait_seconds=0.1",
    ) as process:
        process.base = base
        yield process


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
    # Some mutants are in order, and bytes that are no request are INTERNAL to gRPC.
    assert set(codes) <= {"OK", "NOT_FOUND", "FAILED_PRECONDITION", "INTERNAL"}, codes
    is_well(server)
    assert server.rss < before + GROWTH_MB
    log = server.log.read_text()
    assert "a request failed" not in log and "a batch failed" not in log


@pytest.mark.parametrize("bomb", BOMBS, ids=["png", "huge_png", "jpeg", "gif", "bmp"])
def test_image_bombs_are_refused_before_they_are_decoded(server: ServerProcess, bomb: bytes):
    before = server.rss
    begin = time.monotonic()
    code, message = server.client.refusal(predict_request("decode", image_bytes=[bomb]))
    assert code == "INVALID_ARGUMENT"
    assert "more than the 25000000 that this server decodes" in message
    assert time.monotonic() - begin < 5
    assert server.rss < before + GROWTH_MB


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
    begin = time.monotonic()
    with pytest.raises(grpc.RpcError) as failure:
        server.client.predict("work", loops=np.int32([30_000]), timeout=0.5)
    assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - begin < 5
