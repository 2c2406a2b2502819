"""Clients of the HTTP port that are idle, slow, endless or wrong, beside those that are not."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serving.server.conftest import ROOT, ServerProcess, StartProcess, free_port
from tests.serving.server.test_faults import held

CONNECTIONS, SECONDS, BYTES = 60, 4, 1_000_000
ROWS = {"instances": [[1, 2]]}
HEAD = b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def base(toys: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("http") / "toy"
    path.mkdir()
    os.symlink(toys[1], path / "1")
    (path.parent / "monitoring").write_text('prometheus_config { enable: true path: "/metrics" }')
    return path


@pytest.fixture(scope="module")
def server(start_process: StartProcess, base: Path) -> Iterator[ServerProcess]:
    port = free_port()
    with start_process(
        base,
        f"--rest_api_port={port}",
        f"--monitoring_config_file={base.parent}/monitoring",
        f"--rest_api_max_connections={CONNECTIONS}",
        f"--rest_api_timeout_in_ms={SECONDS}000",
        f"--max_message_bytes={BYTES}",
        "--rest_api_num_threads=2",
        "--drain_pause_seconds=3",
    ) as process:
        process.rest = port
        process.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        yield process


def predict(server: ServerProcess, content: Any = None, **headers: str) -> tuple[int, Any]:
    body = json.dumps(ROWS) if content is None else content
    path = f"http://127.0.0.1:{server.rest}/v1/models/toy:predict"
    response = httpx.post(path, content=body, headers=headers, trust_env=False, timeout=60)
    assert response.headers["content-type"] == "application/json"
    return response.status_code, response.json()


def refusals(server: ServerProcess) -> Counter[str]:
    """How many, by the reason that is counted."""
    lines = [x for x in server.http.get("/metrics").text.splitlines() if "http_refusal_count{" in x]
    return Counter({line.split('"')[1]: int(float(line.split()[-1])) for line in lines})


@contextlib.contextmanager
def connections(server: ServerProcess, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        every = []
        for _ in range(count):
            every.append(
                stack.enter_context(socket.create_connection(("127.0.0.1", server.rest), 60))
            )
            every[-1].sendall(sent)
        yield every


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of what comes before the connection is closed."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_idle_connections_make_room(server: ServerProcess):
    with connections(server, 3 * CONNECTIONS, b"") as idle:
        for _ in range(20):
            assert predict(server)[0] == 200
        assert idle[0].recv(1) == b""  # The idlest was closed
        idle[-1].sendall(b"GET /v1/models/toy HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle[-1].recv(15) == b"HTTP/1.1 200 OK"
    assert refusals(server)["idle"] >= 2 * CONNECTIONS
    assert server.log.read_text().count("closed the idlest") == 1


def test_a_slow_header_has_a_deadline(server: ServerProcess):
    ended = threading.Event()

    def trickle(every: list[socket.socket]) -> None:
        while not ended.wait(0.5):
            for connection in every:
                with contextlib.suppress(OSError):
                    connection.sendall(b"a")

    with connections(server, 20, HEAD) as slow, futures.ThreadPoolExecutor() as pool:
        pool.submit(trickle, slow)
        try:
            begin = time.monotonic()
            for connection in slow:
                assert answer(connection) == (408, {"error": "no whole header within 10 s"})
            assert 9 < time.monotonic() - begin < 30
        finally:
            ended.set()


def test_stalled_bodies_end_and_while_they_last_nobody_else_is_let_in(server: ServerProcess):
    half = HEAD + b"Content-Length: 900\r\n\r\n" + b" " * 450
    before = refusals(server)
    server.http.close()  # Its connection is one of those that are counted
    server.http = httpx.Client(base_url=server.http.base_url, trust_env=False)
    with connections(server, CONNECTIONS, half) as stalled:
        time.sleep(1)
        with connections(server, 1, b"") as (one_more,):
            status, message = answer(one_more)
            assert (status, list(message)) == (503, ["error"])
        begin = time.monotonic()
        for connection in stalled:
            assert answer(connection) == (408, {"error": "the body did not arrive within 4 s"})
        assert time.monotonic() - begin < 3 * SECONDS
    assert predict(server)[0] == 200
    assert refusals(server) - before == {"connections": 1, "slow_body": CONNECTIONS}


def test_bodies_are_bounded_together(server: ServerProcess):
    """Those that make their sender wait give way to one whose sender does not."""
    most = HEAD + b"Content-Length: 900000\r\n\r\n" + b" " * 800_000
    with connections(server, 5, most) as stalled:
        assert predict(server, json.dumps(ROWS) + " " * 900_000)[0] == 200
        statuses = sorted(answer(connection)[0] for connection in stalled)
    assert statuses[-1] == 429 and set(statuses) <= {408, 429}


def test_an_endless_body_is_not_read_for_ever(server: ServerProcess):
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    begin = time.monotonic()
    with connections(server, 1, HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as (endless,):
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begin < 30:
                endless.sendall(piece)
        assert time.monotonic() - begin < 15
        assert answer(endless)[0] == 413
    # One that says how long it is, is refused at once.
    with connections(server, 1, HEAD + b"Content-Length: 999999999\r\n\r\n") as (long,):
        assert answer(long)[0] == 413


def test_a_body_of_one_byte_chunks_stops_nobody(server: ServerProcess):
    chunks = b"1\r\n \r\n" * 500_000
    longest = 0.0
    with connections(server, 1, HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as (one,):
        sender = threading.Thread(target=one.sendall, args=[chunks])
        sender.start()
        while sender.is_alive():
            begin = time.monotonic()
            assert server.http.get("/v1/models/toy").status_code == 200
            longest = max(longest, time.monotonic() - begin)
        one.sendall(b"0\r\n\r\n")
        assert one.recv(12) == b"HTTP/1.1 400"
    assert longest < 2


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 200_000, 431),
    ],
)
def test_what_is_no_http_is_refused_as_json(server: ServerProcess, sent: bytes, status: int):
    before, lines = refusals(server), server.log.read_text().count("WARNING")
    for _ in range(20):
        with connections(server, 1, sent) as (one,):
            assert answer(one)[0] == status
    assert sum((refusals(server) - before).values()) == 20
    assert server.log.read_text().count("WARNING") <= lines + 1


def test_odd_requests(server: ServerProcess):
    for method in ("OPTIONS", "PUT", "DELETE"):
        response = server.http.request(method, "/v1/models/toy")
        assert (response.status_code, list(response.json())) == (405, ["error"])
        assert response.headers["allow"] == "GET, HEAD, POST"
    response = server.http.head("/v1/models/toy")
    assert (response.status_code, response.content) == (200, b"")
    for version, message in (("9" * 5000, "to numeric"), ("%D9%A1", "Malformed request")):
        response = server.http.get(f"/v1/models/toy/versions/{version}")
        assert response.status_code == 400
        assert message in response.json()["error"]
    assert server.http.get(f"/v1/models/toy/versions/{'0' * 5000}1").status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_gzip(server: ServerProcess):
    body = json.dumps(ROWS).encode()
    packed = gzip.compress(body)
    assert predict(server, packed, **{"content-encoding": "gzip"}) == predict(server)
    for content, encoding, status in (
        (gzip.compress(b" " * (BYTES + 1)), "gzip", 413),
        (packed[:-9], "gzip", 400),
        (body, "gzip", 400),
        (body, "br", 415),
        (body, "identity", 200),
    ):
        assert predict(server, content, **{"content-encoding": encoding})[0] == status


def test_a_crowd_is_answered_and_the_status_waits_for_nobody(server: ServerProcess, tmp_path: Path):
    hold = {"signature_name": "hold", "inputs": [str(tmp_path / "hold")]}
    with futures.ThreadPoolExecutor(CONNECTIONS - 2) as pool:
        with held(tmp_path / "hold"):
            slow = [pool.submit(predict, server, json.dumps(hold)) for _ in range(4)]
            time.sleep(1)
            begin = time.monotonic()
            assert server.http.get("/v1/models/toy").status_code == 200
            assert time.monotonic() - begin < 1
        assert [item.result()[0] for item in slow] == [200] * 4
        crowd = list(pool.map(lambda _: predict(server)[0], range(100)))
    assert crowd == [200] * 100


def test_after_sigterm_it_answers_for_a_while_and_stalled_bodies_do_not_hold_it_up(
    server: ServerProcess,
):
    half = HEAD + b"Content-Length: 900\r\n\r\n" + b" " * 450
    assert server.http.get("/readyz").status_code == 200
    with connections(server, 1, half) as (stalled,):
        server.process.send_signal(signal.SIGTERM)
        server.wait(lambda: server.http.get("/readyz").status_code == 503)
        assert server.client.health() == "NOT_SERVING"
        assert predict(server)[0] == 200
        assert server.client.offset() == 1
        assert answer(stalled)[0] in (408, 503)
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log.read_text()


def test_hang_up_drains(start_process: StartProcess, base: Path, tmp_path: Path):
    with start_process(base) as server:
        with held(tmp_path / "hold") as request:
            accepted = server.client.stub.Predict.future(request, timeout=60)
            time.sleep(1)
            server.process.send_signal(signal.SIGHUP)
            time.sleep(1)
        assert accepted.result().outputs
        assert server.process.wait(20) == 0
        assert "drained" in server.log.read_text()


@pytest.mark.parametrize("delay", [0.3, 1.5])
def test_sigterm_while_it_still_imports(base: Path, delay: float):
    command = ["serving.server", f"--port={free_port()}", "--model_name=toy"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, f"--model_base_path={base}"], cwd=ROOT
    )
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    # Without waiting for TensorFlow's import, which takes many seconds of a busy machine.
    began = time.monotonic()
    assert process.wait(60) == 0
    assert time.monotonic() - began < 5


def test_long_json_stops_nobody_and_is_bounded(start_process: StartProcess, base: Path):
    port = free_port()
    with start_process(base, f"--rest_api_port={port}") as server:
        server.rest = port
        family = psutil.Process(server.process.pid)

        def memory() -> int:
            members = [family, *family.children(recursive=True)]
            return sum(member.memory_info().rss for member in members) >> 20

        for item, status in ((b"[],", 400), (b"{},", 429), (b"[0.123456,7],", 200)):
            body = b'{"instances":[' + item * (60_000_000 // len(item)) + item[:-1] + b"]}"
            before = memory()
            peak, times = before, []
            with futures.ThreadPoolExecutor() as pool:
                answered = pool.submit(predict, server, body)
                while not answered.done():
                    begin = time.monotonic()
                    assert server.client.health() == "SERVING"
                    times.append(time.monotonic() - begin)
                    peak = max(peak, memory())
                if status != 200:  # What this model answers, is long itself
                    assert answered.result()[0] == status, answered.result()
                    assert peak - before < 6 * 60
            # The usual wait: that of a moment can be the machine's, which others keep busy.
            assert statistics.median(times) < 0.1 and len(times) > 5, (item, times)
