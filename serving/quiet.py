"""Importing TensorFlow without its remarks."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator


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
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, os.fdopen(os.dup(2), "wb") as terminal:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            kept.seek(0)
            terminal.write(kept.read())
            raise
        finally:
            sys.stderr.flush()
            terminal.flush()
            os.dup2(terminal.fileno(), 2)
