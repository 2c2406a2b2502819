"""Importing TensorFlow without its remarks."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keeps back what TensorFlow and its dependencies say when they are imported.

    Use it around the process's first import of them. Their C++ side writes to the file descriptor
    of the standard error before any log level is in force (that there is no GPU, that oneDNN is in
    use), so that is where it is stopped; should the block raise, all of it is shown after all.
    """
    # Read at import: from here on errors alone, and not the search for a GPU that is not there,
    # which TensorFlow takes for an error, too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore")
    _name_temporary_folder()
    with held_stderr():
        yield


@contextlib.contextmanager
def held_stderr() -> Iterator[None]:
    """Keeps back what goes to the standard error, C++ included; shows it if the block raises."""
    _flush_stderr()
    with _open_store() as kept, os.fdopen(os.dup(2), "wb", buffering=0) as terminal:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            _flush_stderr()
            kept.seek(0)
            with contextlib.suppress(OSError):
                terminal.write(kept.read())
            raise
        finally:
            _flush_stderr()
            os.dup2(terminal.fileno(), 2)


def _name_temporary_folder() -> None:
    # TensorFlow asks for its name when it is imported, through absl's modules for tests, and Python
    # knows none where nothing can be written.
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = os.environ.get("TMPDIR") or "/tmp"


def _open_store() -> BinaryIO:
    """A file that no path leads to; where the system has such files, it is not on a disk, either.

    A full disk, or one that is read-only, must not keep a program from starting.
    """
    create = getattr(os, "memfd_create", None)  # Linux
    return tempfile.TemporaryFile() if create is None else os.fdopen(create("stderr"), "w+b")


def _flush_stderr() -> None:
    # It may lead to a file on a full disk, or to a terminal that has gone.
    with contextlib.suppress(OSError):
        sys.stderr.flush()
