"""One run for several requests, by the rules of TF Serving's BatchingSession.

Requests to the same servable, signature and outputs form batches in the order they came. A batch
is run when it is full, or when its first request has waited for the timeout and a thread is free;
with a timeout of 0, whatever gathered while the threads were busy. Four things differ:

- A request that fails does not fail those it shares a batch with: they are run again, one by one.
- A queue that is full answers RESOURCE_EXHAUSTED, where TF Serving has UNAVAILABLE: a client that
  tries again at once would find it no emptier.
- A batch does not wait for the timeout when nobody else can be expected: the most requests that
  were here at a time of late are shared between the threads, and a batch that has its share runs.
  So a lone client never waits, however long the timeout, while under load batches fill.
- Where padding to an allowed size would be more than a quarter of a batch, the next smaller size is
  run (the policy BATCH_DOWN of TensorFlow's batching operations), as more will come.
"""

from __future__ import annotations

import collections
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from serving.server.config import Batching
from serving.server.errors import (
    RequestError,
    deadline_exceeded,
    invalid_argument,
    resource_exhausted,
)
from serving.server.predictor import Call, run
from serving.server.servable import Arrays

_log = logging.getLogger(__name__)

# After some 30 batches, a crowd that has gone is forgotten.
_PEAK_DECAY = 0.9


class _Task:
    """Rows that stay together in one batch: a request, or a part of one."""

    __slots__ = ("call", "done", "enqueued", "error", "inputs", "results", "rows")

    def __init__(self, call: Call, inputs: Arrays, rows: int):
        self.call = call
        self.inputs = inputs
        self.rows = rows
        self.enqueued = time.monotonic()
        self.results: Arrays = {}
        self.error: RequestError | None = None
        self.done = threading.Lock()  # Held until there are results or an error
        self.done.acquire()

    def wait(self) -> Arrays:
        """Waits for the results.

        Raises:
          RequestError: There are none, or not in time.
        """
        remaining = self.call.deadline - time.monotonic()
        if remaining > threading.TIMEOUT_MAX:
            self.done.acquire()
        elif not self.done.acquire(timeout=max(remaining, 0.0)):
            raise deadline_exceeded("the deadline passed while the request was waiting or running")
        if self.error is not None:
            raise self.error
        return self.results


class _Queue:
    """Tasks that can share a run."""

    __slots__ = ("rows", "tasks")

    def __init__(self) -> None:
        self.tasks: collections.deque[_Task] = collections.deque()
        self.rows = 0


class Batcher:
    """Runs calls in batches, on threads of its own."""

    def __init__(
        self, parameters: Batching, on_batch: Callable[[Sequence[float], int], None] | None = None
    ):
        """Starts the threads.

        Args:
          parameters: TF Serving's.
          on_batch: Told of each run: how long its tasks waited, in seconds, and its rows.
        """
        self._parameters = parameters
        self._capacity = parameters.max_enqueued_batches * parameters.max_execution_size
        self._on_batch = on_batch
        # In the order in which they are served: one that was goes to the end.
        self._queues: dict[Any, _Queue] = {}
        self._changed = threading.Condition()
        self._idle = 0
        self._present = 0  # Tasks that wait or run
        self._peak = 0.0  # The most of them of late
        for index in range(parameters.threads):
            threading.Thread(target=self._work, name=f"batch-{index}", daemon=True).start()

    def count_waiting(self) -> int:
        """Rows in all queues."""
        with self._changed:
            return sum(queue.rows for queue in self._queues.values())

    def __call__(self, call: Call) -> Arrays:
        """Runs a call together with others.

        Raises:
          RequestError: It failed, is too large, too late, or too many are waiting.
        """
        if not call.signature.is_batchable:
            return run(call)
        sizes = {len(array) for array in call.inputs.values()}
        if len(sizes) > 1:
            raise invalid_argument(
                "Batching input tensors must have equal 0th-dimension size: they have "
                + ", ".join(f"{name}: {len(array)}" for name, array in call.inputs.items())
            )
        (rows,) = sizes
        if rows > self._parameters.max_batch_size:
            raise invalid_argument(
                f"Task size {rows} is larger than maximum input batch size "
                f"{self._parameters.max_batch_size}"
            )
        if rows == 0:
            return run(call)
        parts = self._split(call, rows)
        self._enqueue(parts, rows)
        results = [part.wait() for part in parts]
        if len(results) == 1:
            return results[0]
        return {name: np.concatenate([r[name] for r in results]) for name in call.outputs}

    def _split(self, call: Call, rows: int) -> list[_Task]:
        size = self._parameters.max_execution_size
        if rows <= size:
            return [_Task(call, call.inputs, rows)]
        return [
            _Task(
                call,
                {name: array[begin : begin + size] for name, array in call.inputs.items()},
                min(size, rows - begin),
            )
            for begin in range(0, rows, size)
        ]

    def _enqueue(self, tasks: Sequence[_Task], rows: int) -> None:
        call = tasks[0].call
        # Shapes that differ cannot be stacked: such requests form batches of their own.
        shapes = (
            None
            if self._parameters.pad_inputs
            else tuple(array.shape[1:] for array in call.inputs.values())
        )
        key = (call.servable, call.signature.name, call.outputs, shapes)
        with self._changed:
            queue = self._queues.get(key)
            if queue is None:
                queue = self._queues[key] = _Queue()
            if queue.rows + rows > max(self._capacity, rows):
                raise resource_exhausted(
                    "The batch scheduling queue to which this task was submitted is full; "
                    f"{queue.rows} of {self._capacity} rows are waiting"
                )
            is_new = not queue.tasks
            queue.tasks.extend(tasks)
            queue.rows += rows
            self._present += len(tasks)
            self._peak = max(self._peak, self._present)
            # Whom an earlier task of the queue woke up waits for its timeout already.
            if self._idle and (is_new or self._is_full(queue)):
                self._changed.notify()

    def _work(self) -> None:
        while True:
            tasks = self._next_batch()
            try:
                self._run(tasks)
            except Exception:
                _log.exception("a batch failed")
                _fail(tasks, RequestError(grpc.StatusCode.INTERNAL, "internal error"))
            with self._changed:
                self._peak = max(self._present, self._peak * _PEAK_DECAY)
                self._present -= len(tasks)

    def _next_batch(self) -> list[_Task]:
        """Waits for a batch that is due."""
        free_since = time.monotonic()
        with self._changed:
            while True:
                key, seconds = self._find_due(free_since)
                if key is not None:
                    return self._take(key)
                self._idle += 1
                self._changed.wait(seconds)
                self._idle -= 1

    def _find_due(self, free_since: float) -> tuple[Any, float | None]:
        """The queue to serve, or None and the seconds until there is one if nothing arrives.

        The timeout counts from when there is a thread: those whom it has just answered are about
        to ask again, and the leftover of the batch before would run without them.
        """
        now = time.monotonic()
        seconds = None
        for key, queue in self._queues.items():
            since = max(queue.tasks[0].enqueued, free_since)
            left = since + self._parameters.timeout - now
            if left <= 0 or self._is_full(queue):
                return key, None
            seconds = left if seconds is None else min(seconds, left)
        return None, seconds

    def _is_full(self, queue: _Queue) -> bool:
        """Whether no further task is worth waiting for."""
        return (
            queue.rows >= self._parameters.max_execution_size or len(queue.tasks) >= self._share()
        )

    def _share(self) -> int:
        return max(math.ceil(self._peak / self._parameters.threads), 1)

    def _take(self, key: Any) -> list[_Task]:
        queue = self._queues.pop(key)
        tasks: list[_Task] = []
        rows = 0
        # Two halves side by side on two threads end sooner than the whole on one.
        most = self._share() if self._parameters.timeout else len(queue.tasks)
        while queue.tasks and len(tasks) < most:
            if rows + queue.tasks[0].rows > self._parameters.max_execution_size:
                break
            task = queue.tasks.popleft()
            rows += task.rows
            tasks.append(task)
        # Rather than many rows of padding, a smaller batch; whom it leaves is first in the next.
        smaller = self._without_much_padding(rows)
        while rows > smaller and rows - tasks[-1].rows >= smaller:
            task = tasks.pop()
            rows -= task.rows
            queue.tasks.appendleft(task)
        queue.rows -= rows
        if queue.tasks:
            self._queues[key] = queue
            if self._idle:
                self._changed.notify()
        return tasks

    def _without_much_padding(self, rows: int) -> int:
        """The rows of these to run: all, or where a quarter would be padding, a size allowed."""
        sizes = self._parameters.allowed_sizes
        padded = next((size for size in sizes if size >= rows), rows)
        if 4 * (padded - rows) <= padded:
            return rows
        return max((size for size in sizes if size < rows), default=rows)

    def _run(self, tasks: list[_Task]) -> None:
        now = time.monotonic()
        wanted = []
        for task in tasks:
            if now >= task.call.deadline:
                _fail([task], deadline_exceeded("the deadline passed in the batching queue"))
            elif not task.call.is_wanted():
                _fail([task], RequestError(grpc.StatusCode.CANCELLED, "the client has gone"))
            else:
                wanted.append(task)
        if not wanted:
            return
        if self._on_batch is not None:
            rows = sum(task.rows for task in wanted)
            self._on_batch([now - task.enqueued for task in wanted], rows)
        try:
            self._run_together(wanted)
        except RequestError as error:
            if len(wanted) == 1:
                _fail(wanted, error)
                return
            for task in wanted:
                try:
                    self._run_together([task])
                except RequestError as own_error:
                    _fail([task], own_error)

    def _run_together(self, tasks: Sequence[_Task]) -> None:
        call = tasks[0].call
        rows = sum(task.rows for task in tasks)
        padding = next((s for s in self._parameters.allowed_sizes if s >= rows), rows) - rows
        inputs = {
            name: _stack(
                [task.inputs[name] for task in tasks], padding, self._parameters.pad_inputs
            )
            for name in call.inputs
        }
        # Until nobody waits for it any more.
        seconds = max(task.call.deadline for task in tasks) - time.monotonic()
        results = call.servable.run(call.signature, inputs, call.outputs, seconds)
        for name, array in results.items():
            if array.ndim == 0 or len(array) != rows + padding:
                raise RequestError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"output {name!r} has the shape {list(array.shape)}: Batched output tensor's "
                    "0th dimension does not equal the sum of the 0th dimension sizes of the input "
                    "tensors",
                )
        begin = 0
        for task in tasks:
            end = begin + task.rows
            task.results = {name: array[begin:end] for name, array in results.items()}
            task.done.release()
            begin = end


def _stack(arrays: Sequence[np.ndarray], padding: int, pad_inputs: bool) -> np.ndarray:
    """Concatenates rows, with as many copies of a valid one as are to be added."""
    if pad_inputs:
        sizes = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
        arrays = [_pad(array, tuple(sizes)) for array in arrays]
    if padding:
        arrays = [*arrays, np.repeat(arrays[-1][:1], padding, axis=0)]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _pad(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Extends all but the first dimension with zeros or empty strings."""
    if array.shape[1:] == shape:
        return array
    padded = np.full((len(array), *shape), b"" if array.dtype == object else 0, array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def _fail(tasks: Sequence[_Task], error: RequestError) -> None:
    for task in tasks:
        if task.done.locked():
            task.error = error
            task.done.release()
