"""What the user sees of a run: a line for each component, and the frameworks' logs on request."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

from absl import logging as absl_logging

from serving.quiet import quiet_tensorflow

_ABSL_LOGGER = "absl"
_LEVELS = {"quiet": logging.ERROR, "info": logging.INFO, "debug": logging.DEBUG}
# Components that print lines of their own.
_TALKATIVE = ("Trainer", "Tuner")
_NOISY_LOGGERS = ("apache_beam", "tensorflow", "google", "root")


def count(number: float, unit: str) -> str:
    """Says how many there are of something: "1 epoch", "2.5 minutes"."""
    text = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{text} {unit}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def importing(verbosity: str) -> Iterator[None]:
    """Keeps back what TensorFlow, Beam and TFX say while they are imported, if so wished.

    Args:
      verbosity: `quiet`, `info` or `debug`.
    """
    if verbosity != "quiet":
        yield
        return
    # For processes started from here; warnings of this one are switched off below.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    logging.disable(logging.WARNING)
    try:
        with quiet_tensorflow():
            yield
    finally:
        logging.disable(logging.NOTSET)


def follow(verbosity: str, components: int) -> Progress:
    """Starts to show the progress of a pipeline; call when TFX has been imported.

    Args:
      verbosity: `quiet`, `info` or `debug`.
      components: How many components the pipeline has.
    """
    level = _LEVELS[verbosity]
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(level)
    progress = Progress(components, inline=verbosity == "quiet")
    # TFX says at this level where it stands. Through absl, since exporting a model sets absl's
    # verbosity for a while and then back to what absl believes it was.
    absl_logging.set_verbosity(absl_logging.DEBUG if verbosity == "debug" else absl_logging.INFO)
    logger = logging.getLogger(_ABSL_LOGGER)
    for handler in logger.handlers:
        handler.setLevel(level)
    logger.addHandler(progress)
    logger.propagate = verbosity != "quiet"
    return progress


class Progress(logging.Handler):
    """Turns the log messages by which TFX's runner says where it stands into lines for people.

    Args:
      components: How many components the pipeline has.
      inline: Whether a component's time may be added to the line of its name, as nothing else is
        printed between.
    """

    def __init__(self, components: int, *, inline: bool):
        super().__init__(logging.INFO)
        self._components = components
        self._inline = inline
        self._number = 0
        self._began = 0.0
        self._cached = False
        self.running: str | None = None
        """The component that runs now, or at which the pipeline failed."""

    def stop(self) -> None:
        """Ends the line that a failed component left open, and listens no longer."""
        if self.running and not self._shows_progress():
            self._write("\n")
        logging.getLogger(_ABSL_LOGGER).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See base class. The formats are those of TFX's LocalDagRunner and launcher."""
        if record.msg == "Component %s is running.":
            self._start(record.getMessage().split()[1])
        elif record.msg == "Going to run a new execution %d":
            if self._shows_progress():
                self._write("\n")
        elif record.msg == "A cached execution %d is used.":
            self._cached = True
        elif record.msg == "Component %s is finished.":
            self._finish()

    def _start(self, name: str) -> None:
        self.running = name
        self._number += 1
        self._cached = False
        self._began = time.monotonic()
        self._write(f"[{self._number:2}/{self._components}] {name:<17} ")

    def _finish(self) -> None:
        took = "cached" if self._cached else f"{time.monotonic() - self._began:.1f} s"
        if self._shows_progress() and not self._cached:
            self._write(f"        {self.running:<17} ")
        self._write(f"{took:>9}\n")
        self.running = None

    def _shows_progress(self) -> bool:
        """Whether lines may come between the component's name and its time."""
        return not self._inline or self.running in _TALKATIVE

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def box(title: str, lines: list[str]) -> str:
    """Frames lines so that they stand out of a log.

    Args:
      title: Printed in the upper edge.
      lines: The content.

    Returns:
      The text, without a newline at its end.
    """
    width = max([len(title) + 4, *(len(line) for line in lines)])
    edge = "=" * (width + 4)
    head = f"== {title} " + "=" * (width - len(title))
    return "\n".join([head, *(f"  {line}".rstrip() for line in lines), edge])
