"""One run for several requests: correct, isolated, bounded."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.server.batching import Batcher
from serving.server.config import Batching
from serving.server.errors import RequestError
from serving.server.predictor import Call
from serving.server.servable import Servable


@pytest.fixture(scope="module")
def servable(toys: list[Path]) -> Iterator[Servable]:
    servable = Servable("toy", 1, toys[1], ["serve"])
    yield servable
    servable.close()


def call(servable: Servable, signature: str = "root", **options: Any) -> Call:
    """A call of `root` for `x`, or of another signature for the input of that name."""
    outputs = options.pop("outputs", tuple(servable.signatures[signature].outputs))
    deadline = options.pop("deadline", math.inf)
    is_wanted = options.pop("is_wanted", lambda: True)
    inputs = {name: np.asarray(value) for name, value in options.items()}
    return Call(servable, servable.signatures[signature], inputs, outputs, deadline, is_wanted)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class Blocked:
    """Keeps a batcher's only thread busy for the block, so that calls gather."""

    def __init__(self, batcher: Batcher, servable: Servable):
        self._gate = threading.Event()
        self._started = threading.Event()
        self._batcher = batcher
        self._call = call(servable, x=floats(0), is_wanted=self._wait)
        self._thread = threading.Thread(target=self._run)

    def _wait(self) -> bool:
        self._started.set()
        return self._gate.wait(30)

    def _run(self) -> None:
        self._batcher(self._call)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._started.wait(10)

    def __exit__(self, *_: object) -> None:
        self._gate.set()
        self._thread.join()


def gather(batcher: Batcher, servable: Servable, calls: list[Call]) -> list[Any]:
    """Runs calls that have all arrived before the first of them is taken; results or errors."""
    pool = futures.ThreadPoolExecutor(len(calls))
    with Blocked(batcher, servable):
        rows = batcher.count_waiting()
        pending = []
        for item in calls:
            pending.append(pool.submit(batcher, item))
            rows += len(next(iter(item.inputs.values())))
            end = time.monotonic() + 10
            while batcher.count_waiting() < rows and not pending[-1].done():
                assert time.monotonic() < end
                time.sleep(0.001)
            rows = batcher.count_waiting()
    return [item.exception(30) or item.result() for item in pending]


def test_requests_share_a_run_and_get_their_own_rows(servable: Servable):
    runs: list[int] = []
    batcher = Batcher(Batching(threads=1), lambda waited, rows: runs.append(rows))
    calls = [call(servable, x=floats(*range(n * n, n * n + n))) for n in (1, 2, 3)]
    for n, result in zip((1, 2, 3), gather(batcher, servable, calls)):
        np.testing.assert_allclose(result["y"], np.sqrt(floats(*range(n * n, n * n + n))))
        assert result["rows"].tolist() == [6] * n  # The graph saw all six
    assert runs == [1, 6]


def test_batches_are_padded_with_valid_rows_and_bounded(servable: Servable):
    batcher = Batcher(
        Batching(max_batch_size=8, max_execution_size=8, threads=1, allowed_sizes=(4, 8))
    )
    calls = [call(servable, x=floats(1, 4)) for _ in range(5)]
    results = gather(batcher, servable, calls)
    for result in results:
        np.testing.assert_array_equal(result["y"], [1, 2])
    # Four fill a batch of eight; the fifth is alone in one that is padded to four.
    assert [result["rows"][0] for result in results] == [8, 8, 8, 8, 4]


def test_a_smaller_batch_is_run_rather_than_much_padding(servable: Servable):
    runs: list[int] = []
    batcher = Batcher(
        Batching(max_batch_size=8, max_execution_size=8, threads=1, allowed_sizes=(1, 4, 8)),
        lambda waited, rows: runs.append(rows),
    )
    results = gather(batcher, servable, [call(servable, x=floats(n * n)) for n in range(5)])
    assert [result["y"].tolist() for result in results] == [[0], [1], [2], [3], [4]]
    assert runs == [1, 4, 1]  # five would be three rows short of eight
    runs.clear()
    gather(batcher, servable, [call(servable, x=floats(4)) for _ in range(6)])
    assert runs == [1, 6]  # two rows of padding in eight are a quarter
    runs.clear()
    gather(batcher, servable, [call(servable, x=floats(4, 4, 4)) for _ in range(2)])
    assert runs == [1, 6]
    runs.clear()
    gather(batcher, servable, [call(servable, x=floats(*[4] * rows)) for rows in (3, 2)])
    assert runs == [1, 5]  # no request is taken apart for it, and nobody is left out


def test_a_failing_request_fails_alone(servable: Servable):
    batcher = Batcher(Batching(threads=1))
    values = [floats(4), floats(-1, 4), floats(9, 16)]
    first, failed, last = gather(batcher, servable, [call(servable, x=x) for x in values])
    assert isinstance(failed, RequestError) and failed.code.name == "INVALID_ARGUMENT"
    assert "x is negative" in failed.message
    np.testing.assert_array_equal(first["y"], [2])
    np.testing.assert_array_equal(last["y"], [3, 4])


def test_signatures_outputs_and_shapes_do_not_mix(servable: Servable):
    batcher = Batcher(Batching(threads=1))
    calls = [
        call(servable, x=floats(4)),
        call(servable, x=floats(9), outputs=("rows",)),
        call(servable, "serving_default", x=np.ones([2, 2], np.float32)),
        call(servable, x=floats(16)),
    ]
    first, rows, double, last = gather(batcher, servable, calls)
    assert (first["rows"].tolist(), last["rows"].tolist()) == ([2], [2])
    assert list(rows) == ["rows"] and rows["rows"].tolist() == [1]
    assert double["rows"].tolist() == [2, 2]


def test_what_nobody_waits_for_is_not_run(servable: Servable):
    runs: list[int] = []
    batcher = Batcher(Batching(threads=1), lambda waited, rows: runs.append(rows))
    calls = [
        call(servable, x=floats(4), deadline=time.monotonic() + 0.2),
        call(servable, x=floats(4), is_wanted=lambda: False),
        call(servable, x=floats(4)),
    ]
    pool = futures.ThreadPoolExecutor(3)
    with Blocked(batcher, servable):
        late, gone, good = (pool.submit(batcher, item) for item in calls)
        # At once when the time has come, though the thread that would run it is busy.
        assert late.exception(10).code.name == "DEADLINE_EXCEEDED"  # type: ignore[union-attr]
        while batcher.count_waiting() < 3:
            time.sleep(0.001)
    assert gone.exception(10).code.name == "CANCELLED"  # type: ignore[union-attr]
    assert good.result(10)["rows"].tolist() == [1]
    assert runs == [1, 1]


def test_a_full_queue_refuses(servable: Servable):
    parameters = Batching(max_batch_size=2, max_execution_size=2, max_enqueued_batches=2, threads=1)
    results = gather(Batcher(parameters), servable, [call(servable, x=floats(4)) for _ in range(6)])
    refused = [r for r in results if isinstance(r, RequestError)]
    assert [r.code.name for r in refused] == ["RESOURCE_EXHAUSTED"] * 2
    assert "4 of 4 rows are waiting" in refused[0].message
    assert all(r["y"].tolist() == [2] for r in results[:4])


def test_a_request_larger_than_a_batch(servable: Servable):
    whole = Batcher(Batching(max_batch_size=4, max_execution_size=4, threads=1))
    with pytest.raises(RequestError, match="Task size 5 is larger than maximum input batch size 4"):
        whole(call(servable, x=floats(*range(5))))
    split = Batcher(Batching(max_batch_size=8, max_execution_size=3, split=True, threads=2))
    result = split(call(servable, x=floats(*range(8))))
    np.testing.assert_allclose(result["y"], np.sqrt(np.arange(8)), rtol=1e-6)
    assert result["rows"].max() <= 3


def test_inputs_of_other_lengths_are_padded_if_asked_for(toys: list[Path]):
    from serving.server.batching import _stack

    stacked = _stack([np.ones([1, 2]), np.full([2, 3], 7.0)], 1, pad_inputs=True)
    assert stacked.tolist() == [[1, 1, 0], [7, 7, 7], [7, 7, 7], [7, 7, 7]]
    words = np.array([[b"a"]], object), np.array([[b"b", b"c"]], object)
    assert _stack(words, 0, pad_inputs=True).tolist() == [[b"a", b""], [b"b", b"c"]]


def test_a_lone_client_does_not_wait_and_a_crowd_fills_batches(servable: Servable):
    runs: list[int] = []
    parameters = Batching(timeout=0.5, threads=1, max_batch_size=64, max_execution_size=64)
    batcher = Batcher(parameters, lambda waited, rows: runs.append(rows))
    begin = time.monotonic()
    for _ in range(3):
        batcher(call(servable, x=floats(4)))
    assert time.monotonic() - begin < 0.5
    runs.clear()
    with futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: batcher(call(servable, x=floats(4))), range(16 * 20)))
    assert sum(runs) == 320
    assert len(runs) <= 60  # 20 if every batch were full


def test_nothing_is_kept_of_a_model_that_has_gone(toys: list[Path]):
    servable = Servable("toy", 1, toys[1], ["serve"])
    batcher = Batcher(Batching(threads=1))
    batcher(call(servable, x=floats(4)))
    assert batcher._queues == {}
    servable.close()
