"""The process that trains with JAX: `python -m trainer.on_jax FOLDER PARENT`.

FOLDER is one of `trainer.on_jax.job`, PARENT the process that waits for the result.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback

from trainer.on_jax.job import Failure, Folder

_PR_SET_PDEATHSIG = 1
# Keras imports these where they are installed, and no training needs them: five of nine seconds.
_NOT_NEEDED = ("IPython", "matplotlib", "pandas", "sklearn")


def main() -> int:
    """Trains, and leaves the result or the reason why there is none; returns the exit status."""
    path, parent = sys.argv[1:]
    _end_with(int(parent))
    # At once, and not when a compiled program has come to its end.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.modules.update(dict.fromkeys(_NOT_NEEDED))  # type: ignore[arg-type]
    folder = Folder(path)
    try:
        from trainer.on_jax import loop

        loop.run(folder)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        ours = type(error).__module__.partition(".")[0] == "trainer"
        of_memory = "RESOURCE_EXHAUSTED" in text
        message = text if ours else f"{type(error).__name__}: {text}"
        folder.write_failure(Failure(message, traceback.format_exc(), of_memory))
        return 1
    return 0


def _end_with(parent: int) -> None:
    """Makes the system kill this process when its parent ends, be it by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before that
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
