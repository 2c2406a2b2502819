"""Interruptions that are sure to arrive."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

# Longer than a garbage collection, during which it would be lost again.
_SECONDS_TO_RETRY = 1.0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt in the block, whatever it is doing.

    Python runs a signal's handler between two instructions of the main thread, wherever that is.
    Within a finalizer or a callback of the garbage collector, which training sets off often, what
    the handler raises cannot propagate: Python reports it as "Exception ignored" and goes on. Such
    an interruption is repeated here until it gets through. Others, such as Beam, turn it into an
    error of their own: what the block raises after an interruption is a KeyboardInterrupt again.

    SIGTERM is an interruption, too, since it works where a shell has made the process ignore
    Ctrl-C, as in the background.
    """
    arrived = False

    def interrupt(signum: int, frame: types.FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        raise KeyboardInterrupt

    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    report = sys.unraisablehook
    retries: list[threading.Timer] = []

    def repeat_or_report(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            retries.append(
                threading.Timer(_SECONDS_TO_RETRY, os.kill, (os.getpid(), signal.SIGTERM))
            )
            retries[-1].start()
        else:
            report(unraisable)

    sys.unraisablehook = repeat_or_report
    try:
        yield
    except Exception as error:
        if arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        for retry in retries:
            retry.cancel()
        sys.unraisablehook = report
        for number, handler in handlers.items():
            signal.signal(number, handler)
