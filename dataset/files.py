"""Files handled so that nothing half-written is ever taken for whole, and errors say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dataset.format import DataError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageError(DataError):
    """The work folder is at fault, not the data: full, not writable, or changed by somebody."""


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turns a failure to write into a message with the path and what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in _DISK_FULL:
        return StorageError(
            f"cannot write {path}: {reason}: free some space there (the data set takes 185 MB, "
            "its archive 170 MB more) or choose another work folder"
        )
    if error.errno == errno.EISDIR:
        return StorageError(
            f"cannot write {path}: it is a folder, where a file is to be: remove or rename it"
        )
    return StorageError(
        f"cannot write {path}: {reason}: choose a work folder that can be written to"
    )


def make_folder(folder: Path) -> Path:
    """Creates a folder and its parents.

    Raises:
      StorageError: If that cannot be done (no permission, a file in the way, disk full).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from None
    return folder


@contextmanager
def exclusive(folder: Path, *, report: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder's lock, waiting for another process that has it, and clears its leftovers.

    Args:
      folder: An existing folder; the lock is the file `.lock` in it.
      report: Called with a line if there is someone to wait for.

    Raises:
      StorageError: If the lock file cannot be written or locked.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(open(folder / ".lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"data: waiting for another run that is preparing data in {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise storage_error(error, folder / ".lock") from None
        for leftover in folder.glob("*.partial"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, named after it; removed at the end with all in it.

    Args:
      path: What the folder is for; its parents are made.

    Yields:
      An empty folder, which the block may rename to keep it.

    Raises:
      StorageError: If writing fails, in the block or here.
    """
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder that takes the name `target` when the block ends well.

    Args:
      target: The folder to make; must not exist, or be empty.

    Yields:
      An empty folder beside `target`; removed, with all in it, if the block raises.

    Raises:
      StorageError: If `target` is in use, or writing fails.
    """
    with scratch_folder(target) as partial:
        yield partial
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise StorageError(
                f"{target} exists already: remove it or choose another name"
            ) from None


def replace_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
      StorageError: If writing fails; the file is then as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise storage_error(error, path) from None
