"""Serves models over TF Serving's gRPC and REST protocols.

`python -m serving.server --model_name vit --model_base_path output/serving_models/cifar100_vit`
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from serving.quiet import quiet_tensorflow
from serving.server import options as flags
from serving.server.config import ConfigError, Model, read_models


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
        models = _models(options)
        with quiet_tensorflow():
            from serving.server import lifecycle
        server = lifecycle.start(options, models)
    except ConfigError as error:
        _fail(2, error)
    except OSError as error:
        _fail(1, error)
    stop.wait()
    # A second signal does not wait for anything.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    server.stop()
    # Not through the interpreter's own end: TensorFlow's threads may be at work, and standard
    # streams on a full disk would turn the exit code into a failure.
    os._exit(0)


def _models(options: argparse.Namespace) -> list[Model]:
    if options.model_config_file is not None:
        return read_models(options.model_config_file)
    return [Model(options.model_name, Path(os.path.abspath(options.model_base_path)))]


def _fail(code: int, error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
