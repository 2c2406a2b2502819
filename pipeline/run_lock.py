"""One process at a time for a pipeline; cheap to import."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO


class PipelineBusyError(RuntimeError):
    """Another process is running the pipeline, or its lock is not to be had."""


@dataclass(frozen=True)
class LockHolder:
    """Who holds a pipeline.

    Attributes:
      process: Process id.
      run_id: The run that it executes; empty when it does something else.
    """

    process: int
    run_id: str


@contextlib.contextmanager
def exclusive_run(pipeline_root: str, run_id: str = "") -> Iterator[None]:
    """Holds a pipeline for one process; the system frees it when the process ends, however.

    Args:
      pipeline_root: Folder of the pipeline's artifacts; made if needed.
      run_id: The run that is to be executed.

    Raises:
      PipelineBusyError: Another process holds it.
    """
    os.makedirs(pipeline_root, exist_ok=True)
    with _open_lock(pipeline_root, "a+") as lock:
        if not _try_lock(lock.fileno()):
            raise _busy(pipeline_root, lock_holder(pipeline_root))
        lock.truncate(0)
        lock.write(f"{os.getpid()} {run_id}\n")
        lock.flush()
        yield


def check_free(pipeline_root: str) -> None:
    """Raises PipelineBusyError if another process holds a pipeline."""
    if holder := lock_holder(pipeline_root):
        raise _busy(pipeline_root, holder)


def _busy(pipeline_root: str, holder: LockHolder | None) -> PipelineBusyError:
    who = f" (process {holder.process})" if holder else ""
    return PipelineBusyError(
        f"the pipeline in {pipeline_root} is running already{who}: wait for it, stop it, "
        "or choose another --work_dir or --pipeline_name."
    )


def lock_holder(pipeline_root: str) -> LockHolder | None:
    """Finds out which process, this one or another, holds a pipeline; None when it is free."""
    try:
        with _open_lock(pipeline_root, "r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                process, _, run_id = lock.read().strip().partition(" ")
    except FileNotFoundError:
        return None
    # Empty for the moment between locking the file and writing to it.
    return LockHolder(int(process), run_id) if process else None


def _try_lock(file: int) -> bool:
    # More than once, since `lock_holder` takes the lock for a moment to see whether it is free.
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
    return False


def _open_lock(pipeline_root: str, mode: str) -> IO[str]:
    path = os.path.join(pipeline_root, ".lock")
    try:
        return open(path, mode)
    except IsADirectoryError:
        raise PipelineBusyError(
            f"{path} is a folder, where the lock of the pipeline is to be a file: remove or rename "
            "it."
        ) from None
    except PermissionError:
        raise PipelineBusyError(
            f"{path} is not yours to lock: use the user whose pipeline it is, make the file "
            "writable, or choose another --work_dir."
        ) from None
