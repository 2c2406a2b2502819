"""What swaps, idle connections and large JSON bodies do to the server's other clients.

`python -m benchmarks.server_faults results/server_faults.json`
"""

import argparse
import contextlib
import http.client
import itertools
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

Results = dict[str, Any]
SWAPS, IDLE = 6, 1000
BODIES = {"integers": b"123,", "empty_lists": b"[],", "floats": b"0.123456,"}
BODY_BYTES = 60_000_000


class _Network(tf.Module):
    """Images to classes, through many small layers."""

    def __init__(self) -> None:
        sizes = [3072, *[64] * 60, 10]
        shapes = itertools.pairwise(sizes)
        self.weights = [tf.Variable(tf.random.normal(shape, stddev=0.1)) for shape in shapes]

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8, name="images")])
    def predict(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.reshape(tf.cast(images, tf.float32) / 255, [-1, 3072])
        for weights in self.weights:
            values = tf.nn.gelu(tf.linalg.matmul(values, weights))
        return {"probabilities": tf.nn.softmax(values)}


class _Clients:
    """Ask the server in several ways, or raise."""

    def __init__(self, grpc_port: int, rest_port: int):
        self._rest_port = rest_port
        channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        images = np.zeros([1, 32, 32, 3], np.uint8)
        self._request = predict_pb2.PredictRequest(model_spec={"name": "m"})
        self._request.inputs["images"].CopyFrom(tf.make_tensor_proto(images))
        self._rows = json.dumps({"instances": images.tolist()}).encode()

    def predict(self) -> None:
        self._stub.Predict(self._request, timeout=60)

    def health(self) -> None:
        request = health_pb2.HealthCheckRequest()
        assert self._health.Check(request, timeout=60).status == 1

    def ask(self, method: str, path: str, body: bytes | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._rest_port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, f"/v1/models/m{path}", body)
            response = connection.getresponse()
            response.read()
            return response.status

    def status(self) -> None:
        assert self.ask("GET", "") == 200

    def rest_predict(self) -> None:
        assert self.ask("POST", ":predict", self._rows) == 200


@contextlib.contextmanager
def _steady(ask: Callable[[], None], results: Results) -> Iterator[None]:
    """Asks all the time during the block; then there are milliseconds and failures."""
    seconds: list[float] = []
    failures: list[Exception] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.005):
            begin = time.perf_counter()
            try:
                ask()
            except (AssertionError, OSError, http.client.HTTPException, grpc.RpcError) as error:
                failures.append(error)
            seconds.append(time.perf_counter() - begin)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        p50, p99, most = np.percentile(np.multiply(seconds, 1e3), [50, 99, 100]).round(1).tolist()
        results.update(requests=len(seconds), failures=len(failures), p50=p50, p99=p99, max=most)


def _memory_mb(process: psutil.Process) -> int:
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) >> 20


def _post(clients: _Clients, process: psutil.Process, item: bytes, results: Results) -> None:
    body = b'{"instances":[' + item * (BODY_BYTES // len(item)) + item[:-1] + b"]}"
    peak = before = _memory_mb(process)
    health, status = results.setdefault("health", {}), results.setdefault("status", {})
    with _steady(clients.health, health), _steady(clients.status, status):
        begin = time.perf_counter()
        thread = threading.Thread(target=clients.ask, args=("POST", ":predict", body))
        thread.start()
        while thread.is_alive():
            peak = max(peak, _memory_mb(process))
            thread.join(0.01)
        results["seconds"] = round(time.perf_counter() - begin, 2)
    results["extra_mb"] = peak - before


@contextlib.contextmanager
def _server() -> Iterator[tuple[_Clients, psutil.Process, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        base, network = Path(folder) / "m", _Network()
        tf.saved_model.save(network, str(base / "1"), {"serving_default": network.predict})
        with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
            ports = one.getsockname()[1], two.getsockname()[1]
        flags = ["--model_name=m", f"--model_base_path={base}", f"--port={ports[0]}"]
        flags += [f"--rest_api_port={ports[1]}", "--file_system_poll_wait_seconds=0.1"]
        server = subprocess.Popen([sys.executable, "-m", "serving.server", *flags])
        try:
            clients = _Clients(*ports)
            while True:
                with contextlib.suppress(grpc.RpcError, AssertionError):
                    clients.health()
                    break
                time.sleep(0.1)
            yield clients, psutil.Process(server.pid), base
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    """Measures milliseconds, prints and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON file to write")
    output = parser.parse_args().output
    names = ("without_swaps", "with_swaps", "not_idle", "idle", *BODIES)
    results: dict[str, Results] = {name: {} for name in names}
    with _server() as (clients, process, base):
        for name in ("without_swaps", "with_swaps"):
            with _steady(clients.predict, results[name]):
                for number in range(2, 2 + SWAPS):
                    if name == "with_swaps":
                        copy = shutil.copytree(base / "1", base / "copy")
                        copy.rename(base / str(number))
                    time.sleep(4)
        for name, count in (("not_idle", 0), ("idle", IDLE)):
            with contextlib.ExitStack() as stack:
                for _ in range(count):
                    stack.enter_context(socket.create_connection(("127.0.0.1", clients._rest_port)))
                with _steady(clients.rest_predict, results[name]):
                    time.sleep(4)
        for name, item in BODIES.items():
            _post(clients, process, item, results[name])
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
