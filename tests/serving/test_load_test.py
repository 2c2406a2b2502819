"""The load test: its figures on servers whose behaviour is known, and all of it on a real one."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from serving.images import ServingError
from serving.load_test.comparison import Comparison
from serving.load_test.generator import Target, closed_loop, open_loop
from serving.load_test.results import summarize, table
from serving.load_test.soak import Memory, resident_megabytes, soak
from tests.conftest import Command
from tests.serving.helpers import Classifier, grpc_server
from tests.support.output import without_cuda

SERVICE_SECONDS = 0.05


def one_at_a_time(_: bytes, context: grpc.ServicerContext) -> bytes:
    """With one thread: a server that answers 20 requests a second."""
    time.sleep(SERVICE_SECONDS)
    return b"answer"


def test_percentiles_rates_and_errors():
    outcomes = [("OK", number / 1000) for number in range(1, 1001)] + [("UNAVAILABLE", 9.0)] * 3
    result = summarize("closed", batch=4, seconds=10, outcomes=outcomes, concurrency=8)
    assert result.latencies == {
        "p50_ms": 500.5,
        "p90_ms": 900.1,
        "p99_ms": 990.01,
        "p99_9_ms": 999.001,
    }
    assert (result.qps, result.images_per_second) == (100.0, 400.0)
    assert result.errors == {"UNAVAILABLE": 3}
    nothing = summarize("open", batch=1, seconds=10, outcomes=[("INTERNAL", 1.0)], rate=5.0)
    assert nothing.latencies == {} and nothing.qps == 0
    header, first, second = table([result, nothing]).splitlines()
    assert header.split() == [
        *("load", "batch", "p50", "ms", "p90", "ms", "p99", "ms", "p99.9", "ms"),
        *("QPS", "images/s", "errors"),
    ]
    assert first.split("  ")[0] == "8 clients" and first.endswith("3 UNAVAILABLE")
    assert second.split() == ["5/s", "1", *"----", "0.0", "0", "1", "INTERNAL"]


def test_a_closed_loop_waits_for_the_answers():
    with grpc_server(one_at_a_time, threads=1) as address:
        result = closed_loop(Target(address, b"request", 2), 4, seconds=2.0, warmup=0.3)
    assert result.errors == {}
    # Four clients take turns: the throughput is the server's, the latency four services.
    assert result.qps == pytest.approx(1 / SERVICE_SECONDS, rel=0.25)
    assert result.images_per_second == pytest.approx(2 * result.qps, rel=0.01)
    assert result.latencies["p50_ms"] == pytest.approx(4e3 * SERVICE_SECONDS, rel=0.25)
    assert result.client_cpu < 0.5


def test_an_open_loop_counts_the_waiting_of_requests_that_are_late():
    """Twice what the server can do: the queue, and with it the latency, grows all the time."""
    with grpc_server(one_at_a_time, threads=1) as address:
        result = open_loop(Target(address, b"request", 1), 40.0, seconds=2.0, warmup=0.1)
    sent = sum(result.codes.values())
    assert 50 <= sent <= 110
    assert result.errors == {}
    # The last one waits for all that came before, less what was answered while they came.
    assert result.latencies["p99_9_ms"] > 1e3 * (sent * SERVICE_SECONDS - 2.0) * 0.8
    assert result.latencies["p99_9_ms"] > 20e3 * SERVICE_SECONDS
    assert result.concurrency > 15
    assert result.qps == pytest.approx(1 / SERVICE_SECONDS, rel=0.25)


def test_a_stall_of_the_server_is_in_the_percentiles_of_an_open_loop():
    stall = threading.Event()

    def stalls_once(_: bytes, context: grpc.ServicerContext) -> bytes:
        if not stall.is_set():
            stall.set()
            time.sleep(1.0)
        return b""

    # One thread: nothing is answered in that second, half of the time that is measured.
    with grpc_server(stalls_once, threads=1) as address:
        result = open_loop(Target(address, b"request", 1), 50.0, seconds=2.0, warmup=0.0)
    assert result.latencies["p50_ms"] < 500
    # A waiting client would have sent one request in that second, and found p90 to be small.
    assert result.latencies["p90_ms"] > 600


def test_errors_are_counted_by_code_and_not_sent_again():
    received = []

    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        received.append(request)
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return b""

    with grpc_server(refuse) as address:
        result = closed_loop(Target(address, b"request", 1), 2, seconds=0.5, warmup=0.1)
        assert result.codes.keys() == {"RESOURCE_EXHAUSTED"}
        assert result.latencies == {}
        # Clients that are refused wait a little: 2 clients, 0.6 s, 50 ms.
        assert result.codes["RESOURCE_EXHAUSTED"] <= len(received) <= 30
        soaked = soak(Target(address, b"request", 1), concurrency=2, minutes=0.01, pid=os.getpid())
        assert not soaked.unexpected
        assert soaked.memory is not None and len(soaked.memory.megabytes) >= 2
    with grpc_server(lambda *_: time.sleep(1) or b"") as address:
        slow = Target(address, b"request", 1, timeout=0.1)
        assert closed_loop(slow, 1, seconds=0.3, warmup=0.0).codes.keys() == {"DEADLINE_EXCEEDED"}
        assert soak(slow, concurrency=1, minutes=0.005, pid=None).failed


def test_memory_that_grows_and_memory_that_settles():
    seconds = list(np.linspace(0, 600, 61))
    leak = Memory(seconds, [1000 + 0.1 * s for s in seconds])
    assert leak.slope == pytest.approx(6.0)
    assert not leak.flat
    # Up by 300 MB in the first minute, then a saw.
    settled = Memory(seconds, [700 + min(300, 5 * s) + s % 20 for s in seconds])
    assert abs(settled.slope) < 1
    assert settled.flat
    assert 10 < resident_megabytes(os.getpid()) < 100_000
    with pytest.raises(ServingError, match="is not there"):
        resident_megabytes(2**22 + 1)


def test_the_comparison_says_which_goal_is_missed():
    first, second = Comparison(20.0, 22.5, 200.0, 160.0).describe()
    assert "+2.5 ms (goal: at most +3 ms: reached)" in first
    assert "80% (goal: at least 85%: MISSED)" in second


def test_the_command(run_module: Command, tmp_path: Path):
    Classifier().save(tmp_path / "vit" / "1")
    flags = "--seconds 0.5 --warmup 0.2 --rounds 1 --concurrency 1,4 --batch 1,3 --rates 20"
    result = run_module(
        "serving.load_test",
        *("--start", tmp_path / "vit", "--in_process", tmp_path / "vit", *flags.split()),
        *("--soak", 0.05, "--soak_concurrency", 8, "--output", tmp_path / "out"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert without_cuda(result.stderr) == ""
    report = json.loads((tmp_path / "out.json").read_text())
    loads = [(item["mode"], item["batch"], item["rate"]) for item in report["results"]]
    assert loads == 2 * [("closed", 1, None)] + [("open", 1, 20)] + 2 * [("closed", 3, None)] + [
        ("open", 3, 20)
    ]
    assert all(item["codes"].keys() == {"OK"} for item in report["results"])
    comparison = report["comparison"]
    assert comparison["overhead_ms"] == pytest.approx(
        comparison["server_p50_ms"] - comparison["in_process_p50_ms"]
    )
    assert comparison["server_images_per_second"] > 0
    assert report["soak"]["result"]["concurrency"] == 8
    assert min(report["soak"]["memory"]["megabytes"]) > 100
    assert "goal: at most +3 ms" in result.stdout and "resident memory" in result.stdout
    with Image.open(tmp_path / "out.png") as chart:
        assert chart.size[0] > 800
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png", "vit"]


def test_no_server_and_no_model(run_module: Command, tmp_path: Path):
    result = run_module("serving.load_test", "--server", "127.0.0.1:1", "--output", tmp_path / "o")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no model server answers at 127.0.0.1:1 (")
    bad = run_module("serving.load_test", "--server", "127.0.0.1:1", "--concurrency", "1,0")
    assert bad.returncode == 2 and "0 is not above 0" in bad.stderr
    assert list(tmp_path.iterdir()) == []
