"""A toy model, real server processes that serve it, and a client for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.server import config, lifecycle, options

ROOT = Path(__file__).resolve().parents[3]


class Toy(tf.Module):
    """`y = 2 x + offset`; other signatures are slow, wait, fail, and decode images."""

    def __init__(self, offset: float):
        super().__init__()
        self.offset = tf.Variable(offset, dtype=tf.float32)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def double(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        y = 2.0 * x + self.offset
        return {
            "y": y,
            "total": tf.reduce_sum(y, axis=1),
            "rows": tf.fill([tf.shape(x)[0]], tf.shape(x)[0]),
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def root(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, "x is negative")]):
            return {"y": tf.sqrt(x), "rows": tf.fill([tf.shape(x)[0]], tf.shape(x)[0])}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="path")])
    def hold(self, path: tf.Tensor) -> dict[str, tf.Tensor]:
        """Ends when there is no file at the first path any more."""
        wait = tf.while_loop(
            lambda i: tf.size(tf.io.matching_files(path[0])) > 0, lambda i: [i + 1], [0]
        )
        with tf.control_dependencies(wait):
            return {"path": tf.identity(path)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="loops")])
    def work(self, loops: tf.Tensor) -> dict[str, tf.Tensor]:
        _, end = tf.while_loop(
            lambda i, m: i < tf.reduce_max(loops),
            lambda i, m: (i + 1, tf.linalg.matmul(m, m) * 0.01),
            [0, tf.ones([100, 100])],
        )
        return {"done": loops + tf.cast(0.0 * end[0, 0], tf.int32)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def decode(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        def mean(content: tf.Tensor) -> tf.Tensor:
            image = tf.io.decode_image(content, channels=3, expand_animations=False)
            return tf.reduce_mean(tf.cast(image, tf.float32))

        return {"mean": tf.map_fn(mean, image_bytes, fn_output_signature=tf.float32)}

    def save(self, folder: Path) -> Path:
        signatures = {
            "serving_default": self.double,
            "root": self.root,
            "hold": self.hold,
            "work": self.work,
            "decode": self.decode,
        }
        tf.saved_model.save(self, str(folder), signatures=signatures)
        return folder


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Saved toy models whose offsets are their indices."""
    folder = tmp_path_factory.mktemp("toys")
    return [Toy(float(index)).save(folder / str(index)) for index in range(4)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def predict_request(
    signature: str = "", outputs: tuple[str, ...] = (), name: str = "toy", **inputs: Any
) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    request.output_filter.extend(outputs)
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return request


def arrays(response: predict_pb2.PredictResponse) -> dict[str, np.ndarray]:
    return {key: tf.make_ndarray(value) for key, value in response.outputs.items()}


class Client:
    """Stubs for a server."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None):
        # A server that is starting is to be noticed soon.
        options = [("grpc.max_reconnect_backoff_ms", 300)]
        self.channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self.stub = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    def predict(self, *arguments: Any, timeout: float = 30, **inputs: Any) -> dict[str, np.ndarray]:
        request = predict_request(*arguments, **inputs)
        return arrays(self.stub.Predict(request, timeout=timeout))

    def offset(self, version: int | None = None) -> float:
        """The offset of the version that answers."""
        request = predict_request(x=np.zeros([1, 2], np.float32))
        if version is not None:
            request.model_spec.version.value = version
        return float(arrays(self.stub.Predict(request, timeout=30))["y"][0, 0])

    def states(self, name: str = "toy") -> dict[int, str]:
        """The state of each version by number."""
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        state = get_model_status_pb2.ModelVersionStatus.State
        try:
            response = self.models.GetModelStatus(request, timeout=10)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND
            return {}
        return {v.version: state.Name(v.state) for v in response.model_version_status}

    def errors(self, name: str = "toy") -> dict[int, str]:
        """The error of each version by number."""
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        response = self.models.GetModelStatus(request, timeout=10)
        return {v.version: v.status.error_message for v in response.model_version_status}

    def health(self, service: str = "") -> str:
        request = health_pb2.HealthCheckRequest(service=service)
        status = self._health.Check(request, timeout=10, wait_for_ready=True).status
        return health_pb2.HealthCheckResponse.ServingStatus.Name(status)

    def signatures(self, name: str = "toy") -> dict[str, Any]:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = name
        response = self.stub.GetModelMetadata(request, timeout=10)
        definitions = get_model_metadata_pb2.SignatureDefMap()
        assert response.metadata["signature_def"].Unpack(definitions)
        return dict(definitions.signature_def)

    def refusal(self, request: Any, method: str = "Predict") -> tuple[str, str]:
        """Code and message of a request that must fail."""
        with pytest.raises(grpc.RpcError) as failure:
            getattr(self.stub, method)(request, timeout=30)
        return failure.value.code().name, failure.value.details()


class Server:
    """A server, in this process or in one of its own, and a client of it."""

    def __init__(self, port: int, credentials: Any = None):
        self.port = port
        self.client = Client(f"127.0.0.1:{port}", credentials)
        self.http: Any = None

    def wait(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for something to become true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s, {self.describe()}"
            time.sleep(0.02)

    def describe(self) -> str:
        return f"states: {self.client.states()}"


class ServerProcess(Server):
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path):
        super().__init__(port)
        self.process = process
        self.log = log

    def describe(self) -> str:
        return self.log.read_text()

    @property
    def rss(self) -> int:
        """Resident memory in MB."""
        return psutil.Process(self.process.pid).memory_info().rss >> 20

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


Command = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., contextlib.AbstractContextManager[Server]]
StartProcess = Callable[..., contextlib.AbstractContextManager[ServerProcess]]


def arguments(base_path: Path | None, port: int, flags: tuple[object, ...]) -> list[str]:
    model = [] if base_path is None else ["--model_name=toy", f"--model_base_path={base_path}"]
    return [f"--port={port}", *model, *map(str, flags)]


@pytest.fixture(scope="session")
def start_server() -> Start:
    """Starts a server in this process; by default waits until it is healthy."""

    @contextlib.contextmanager
    def start(
        base_path: Path | None, *flags: object, healthy: bool = True, credentials: Any = None
    ) -> Iterator[Server]:
        port = free_port()
        parsed = options.parse(arguments(base_path, port, (*flags, "--drain_seconds=1")))
        running = lifecycle.Server(parsed, config.read_files(parsed))
        running.start()
        try:
            server = Server(port, credentials)
            if healthy:
                server.wait(lambda: server.client.health() == "SERVING")
            yield server
        finally:
            running.drain()
            running.close()

    return start


@pytest.fixture(scope="session")
def start_process(tmp_path_factory: pytest.TempPathFactory) -> StartProcess:
    """Starts a server in a process of its own and waits until it is healthy."""

    @contextlib.contextmanager
    def start(
        base_path: Path, *flags: object, stderr: Any = None, preexec_fn: Any = None
    ) -> Iterator[ServerProcess]:
        port = free_port()
        log = tmp_path_factory.mktemp("server") / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.server", *arguments(base_path, port, flags)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=stderr or file,
                preexec_fn=preexec_fn,
            )
        try:
            server = ServerProcess(process, port, log)
            channel = grpc.channel_ready_future(server.client.channel)
            server.wait(lambda: channel.done() or process.poll() is not None)
            assert process.poll() is None, server.describe()
            server.wait(lambda: server.client.health() == "SERVING")
            yield server
        finally:
            process.kill()
            process.wait()

    return start


@pytest.fixture(scope="session")
def pushed(toys: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base path with versions 1 and 3."""
    base = tmp_path_factory.mktemp("pushed") / "toy"
    base.mkdir()
    for number in (1, 3):
        os.symlink(toys[number], base / str(number))
    return base
