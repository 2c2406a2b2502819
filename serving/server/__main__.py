"""Serves models over TF Serving's gRPC and REST protocols.

`python -m serving.server --model_name vit --model_base_path output/serving_models/cifar100_vit`
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from serving.quiet import quiet_tensorflow
from serving.server import options as flags
from serving.server.config import ConfigError, read_files

_SWITCH_SECONDS = 0.0005


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Serves until SIGTERM or SIGINT, then drains.

    Raises:
      SystemExit: With code 2 when the flags or a file that they name are wrong, 1 when the server
        cannot start.
    """
    options = flags.parse(arguments)
    # What nohup has set stays; else a terminal that is closed ends the server as ^C does.
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    _on_signals(numbers, lambda *_: os._exit(0))  # Nothing to finish; imports take seconds
    # A full disk under the log is no reason to stop serving, nor to say so in the log.
    logging.raiseExceptions = False
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        files = read_files(options)
        with quiet_tensorflow():
            from serving.server.lifecycle import Server
        server = Server(options, files)
    except ConfigError as error:
        _fail(2, error)
    except OSError as error:
        _fail(1, error)
    threading.excepthook = _end
    # A request changes threads several times, and waits so long each time while another one
    # computes in Python: the one that loads a model, above all.
    sys.setswitchinterval(_SWITCH_SECONDS)
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    _on_signals(numbers, lambda number, _: signals.put(number))
    server.start()
    first = signals.get()
    # A second signal does not wait for anything.
    _on_signals(numbers, lambda number, _: os._exit(128 + number))
    server.drain(options.drain_pause_seconds if first == signal.SIGTERM else 0.0)
    # Not through the interpreter's own end: TensorFlow's threads may be at work, and standard
    # streams on a full disk would turn the exit code into a failure.
    os._exit(0)


def _on_signals(numbers: Sequence[int], handle: Callable[[int, Any], object]) -> None:
    for number in numbers:
        signal.signal(number, handle)


def _end(failure: threading.ExceptHookArgs) -> None:
    """Ends the process with one of its threads, which nobody else would take the place of.

    A server whose gRPC is dead while HTTP says that all is well would not be started anew.
    """
    try:
        name = failure.thread.name if failure.thread else "?"
        logging.critical(
            "the thread %s failed, so the server ends", name, exc_info=failure.exc_value
        )
    finally:
        os._exit(1)


def _fail(code: int, error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
