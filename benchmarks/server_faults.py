"""What swaps, idle connections and large JSON bodies do to the server's other clients.

`python -m benchmarks.server_faults results/server_faults.json`
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from serving.quiet import quiet_tensorflow

with quiet_tensorflow():
    import grpc
    import tensorflow as tf
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

BODY = 60_000_000
SWAPS = 6


class Network(tf.Module):
    """Uint8 images to classes, through many small layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3072, *[64] * 60, 10]
        self.weights = [
            tf.Variable(tf.random.normal(shape, stddev=0.1, seed=1))
            for shape in zip(sizes, sizes[1:])
        ]

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8, name="images")])
    def predict(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.reshape(tf.cast(images, tf.float32) / 255, [-1, 3072])
        for weights in self.weights:
            values = tf.nn.gelu(tf.linalg.matmul(values, weights))
        return {"probabilities": tf.nn.softmax(values)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Clients:
    """Asks the server in several ways; each takes seconds or raises."""

    def __init__(self, grpc_port: int, rest_port: int):
        self.rest_port = rest_port
        channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._request = predict_pb2.PredictRequest()
        self._request.model_spec.name = "m"
        images = np.zeros([1, 32, 32, 3], np.uint8)
        self._request.inputs["images"].CopyFrom(tf.make_tensor_proto(images))
        self._rows = json.dumps({"instances": images.tolist()}).encode()

    def predict(self) -> None:
        self._stub.Predict(self._request, timeout=60)

    def health(self) -> None:
        status = self._health.Check(health_pb2.HealthCheckRequest(), timeout=60).status
        assert status == health_pb2.HealthCheckResponse.SERVING

    def ask(self, method: str, path: str, body: bytes | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.rest_port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            response.read()
            return response.status

    def rest_status(self) -> None:
        assert self.ask("GET", "/v1/models/m") == 200

    def rest_predict(self) -> None:
        assert self.ask("POST", "/v1/models/m:predict", self._rows) == 200


@contextlib.contextmanager
def steady(ask: Callable[[], None], out: dict[str, Any], pause: float = 0.005) -> Iterator[None]:
    """Asks all the time during the block; fills in milliseconds and failures."""
    seconds: list[float] = []
    failures = 0
    ended = threading.Event()

    def run() -> None:
        nonlocal failures
        while not ended.is_set():
            begin = time.perf_counter()
            try:
                ask()
            except (AssertionError, OSError, http.client.HTTPException, grpc.RpcError):
                failures += 1
            seconds.append(time.perf_counter() - begin)
            time.sleep(pause)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        p50, p99, most = np.percentile(np.multiply(seconds, 1e3), [50, 99, 100]).round(1).tolist()
        out.update(requests=len(seconds), failures=failures, p50_ms=p50, p99_ms=p99, max_ms=most)


def memory_mb(process: psutil.Process) -> int:
    """Resident memory of the server with its children, in MB."""
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) >> 20


def measure_bodies(clients: Clients, process: psutil.Process, results: dict[str, Any]) -> None:
    bodies = {
        "integers": (b"12,", b"123", 3),
        "empty_lists": (b"[],", b"[]", 3),
        "floats": (b"0.123456,", b"0.1", 9),
    }
    for name, (item, last, size) in bodies.items():
        body = b'{"instances":[' + item * (BODY // size) + last + b"]}"
        row: dict[str, Any] = {"health": {}, "rest_status": {}}
        peak = before = memory_mb(process)
        answer: list[int] = []

        def post(content: bytes = body, codes: list[int] = answer) -> None:
            codes.append(clients.ask("POST", "/v1/models/m:predict", content))

        with steady(clients.health, row["health"]), steady(clients.rest_status, row["rest_status"]):
            begin = time.perf_counter()
            thread = threading.Thread(target=post)
            thread.start()
            while thread.is_alive():
                peak = max(peak, memory_mb(process))
                thread.join(0.01)
            row["seconds"] = round(time.perf_counter() - begin, 2)
        row.update(status=answer, extra_mb=peak - before)
        results[f"body_{name}"] = row


def main() -> None:
    """Starts a server, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON file to write")
    output = parser.parse_args().output
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base = Path(folder) / "m"
        network = Network()
        tf.saved_model.save(
            network, str(base / "1"), signatures={"serving_default": network.predict}
        )
        ports = free_port(), free_port()
        flags = ["--model_name=m", f"--model_base_path={base}", f"--port={ports[0]}"]
        flags += [f"--rest_api_port={ports[1]}", "--file_system_poll_wait_seconds=0.1"]
        server = subprocess.Popen([sys.executable, "-m", "serving.server", *flags])
        stack.callback(server.wait)
        stack.callback(server.terminate)
        clients = Clients(*ports)
        while True:
            with contextlib.suppress(grpc.RpcError, AssertionError):
                clients.health()
                break
            time.sleep(0.1)
        for name in ("without_swaps", "with_swaps"):
            results[name] = {}
            with steady(clients.predict, results[name]):
                for number in range(2, 2 + SWAPS):
                    if name == "with_swaps":
                        shutil.copytree(base / "1", Path(folder) / "copy")
                        (Path(folder) / "copy").rename(base / str(number))
                    time.sleep(4)
        for name, count in (("no_idle_connections", 0), ("idle_connections", 1000)):
            results[name] = {}
            with contextlib.ExitStack() as idle:
                for _ in range(count):
                    idle.enter_context(socket.create_connection(("127.0.0.1", ports[1])))
                with steady(clients.rest_predict, results[name]):
                    time.sleep(4)
        measure_bodies(clients, psutil.Process(server.pid), results)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
