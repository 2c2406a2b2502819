"""Training with JAX from a process that runs another backend: a child process that does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from trainer.on_jax.job import Folder

# Where `trainer` is imported from.
_ROOT = Path(__file__).resolve().parents[2]


class TrainingError(RuntimeError):
    """The training has failed; the message is a line that says why."""


class OutOfMemoryError(TrainingError):
    """The device's memory is too small for the training."""


class ChildTraceback(Exception):
    """What the child's stack was, as the cause of a `TrainingError`."""


def run(folder: Folder, compilation_cache: str) -> None:
    """Trains in a child process, whose output becomes this process's.

    The child ends with this process, however it ends; what interrupts this process kills it.

    Args:
      folder: With job and splits; gets the result.
      compilation_cache: Folder for compiled programs, where a later training finds them. Several
        processes may use it at once. The environment's JAX_COMPILATION_CACHE_DIR has precedence.

    Raises:
      OutOfMemoryError: See there.
      TrainingError: It failed for another reason.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": compilation_cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.on_jax", str(folder.path.resolve()), str(os.getpid())],
        cwd=_ROOT,
        env={**cache, **os.environ, "KERAS_BACKEND": "jax"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        status = process.wait()
    finally:
        process.kill()  # nothing, if it has ended
        process.wait()
        process.stdout.close()
    if status == 0:
        return
    failure = folder.read_failure()
    if failure is None:
        why = f"signal {-status}" if status < 0 else f"exit status {status}"
        raise TrainingError(f"the process that trains with JAX has ended with {why}.")
    kind = OutOfMemoryError if failure.of_memory else TrainingError
    raise kind(failure.message) from ChildTraceback(f"in the child process:\n{failure.traceback}")
