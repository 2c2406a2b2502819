"""Serves models over TF Serving's gRPC and REST protocols.

`python -m serving.server --model_name vit --model_base_path output/serving_models/cifar100_vit`
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from serving.quiet import quiet_tensorflow
from serving.server import options as flags
from serving.server.config import ConfigError, read_files


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Serves until SIGTERM or SIGINT, then drains.

    Raises:
      SystemExit: With code 2 when the flags or a file that they name are wrong, 1 when the server
        cannot start.
    """
    options = flags.parse(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
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
    server.start()
    stop.wait()
    # A second signal does not wait for anything.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    server.drain()
    # Not through the interpreter's own end: TensorFlow's threads may be at work, and standard
    # streams on a full disk would turn the exit code into a failure.
    os._exit(0)


def _fail(code: int, error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
