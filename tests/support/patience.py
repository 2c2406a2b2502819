"""Waiting for processes as long as they get on, however busy the machine is.

A limit of seconds fails where other programs take the processor away. Here the limit is processor
time, which does not pass meanwhile, and a process that uses none at all has stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_STALLED_SECONDS = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a process that `wait` and `wait_until` can watch, with pipes for what it prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, start_new_session=True, **{**pipes, **options})


def run(
    command: Sequence[str], *, cpu_seconds: float, input: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run`, with a limit of processor time.

    Raises:
      AssertionError: The process took more, or stopped to use any; it was killed.
    """
    with tempfile.TemporaryFile("w+") as file:  # a pipe could be full before it is read
        file.write(input)
        file.seek(0)
        with start(command, **{"stdin": file, **options}) as process:
            output = wait(process, cpu_seconds=cpu_seconds)
    return subprocess.CompletedProcess(command, process.returncode, *output)


def wait(process: subprocess.Popen[str], *, cpu_seconds: float) -> tuple[str, str]:
    """Waits for the end of a process that `start` has started; returns what it printed."""
    watch = _Watch(process, cpu_seconds)
    while True:
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            watch.check()
        except BaseException:
            watch.kill()
            raise


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], *, cpu_seconds: float
) -> None:
    """Waits until something holds that a process is to bring about.

    Raises:
      AssertionError: The process has ended before, took more, or stopped to use any.
    """
    watch = _Watch(process, cpu_seconds)
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"it ended before, with {process.returncode}: {process.args}")
        watch.check()
        time.sleep(0.05)


class _Watch:
    """Kills a process and those that it started when their time is over."""

    def __init__(self, process: subprocess.Popen[str], cpu_seconds: float):
        self._process = process
        self._start = self._last = _cpu_seconds(process.pid)
        self._limit = cpu_seconds
        self._moved = time.monotonic()

    def check(self) -> None:
        now = _cpu_seconds(self._process.pid)
        if now != self._last:
            self._last, self._moved = now, time.monotonic()
        stalled = time.monotonic() - self._moved > _STALLED_SECONDS
        if stalled or now - self._start > self._limit:
            self.kill()
            why = "did nothing any more" if stalled else f"took more than {self._limit} s of CPU"
            raise AssertionError(f"{self._process.args} {why}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _cpu_seconds(session: int) -> float:
    """Processor time of all processes of a session, of their ended children, too."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS
