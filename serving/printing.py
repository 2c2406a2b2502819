"""What the command lines print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from serving.images import ServingError, as_text

SOME_UNREADABLE = 3  # Exit code


class UnreadableFiles(ServingError):
    """Some of the files were no images; the others were answered."""


def lines(results: Iterable[Mapping[str, Any]], as_json: bool) -> Iterator[str]:
    """Turns answers into lines of the standard output.

    Args:
      results: See `serving.images.classify_batch`.
      as_json: Whether to write an object for each file, or a table for each image; then, what is
        no image goes to the standard error.

    Raises:
      UnreadableFiles: After all of them, if there were some.
    """
    count = unreadable = 0
    for result in results:
        count += 1
        unreadable += "error" in result
        if as_json:
            yield json.dumps(result)
        elif "error" in result:
            print(f"error: {result['image']} {result['error']}", file=sys.stderr, flush=True)
        else:
            yield as_text(result)
    if unreadable:
        raise UnreadableFiles(f"{unreadable} of {count} files could not be read as images.")


def run(printed: Iterable[str]) -> None:
    """Prints lines as they come.

    Raises:
      SystemExit: With a message and code 3 for `UnreadableFiles`, 1 for another ServingError;
        without, and with the code of SIGPIPE, when nobody reads any more (`| head`).
    """
    try:
        for line in printed:
            print(line, flush=True)
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(SOME_UNREADABLE if isinstance(error, UnreadableFiles) else 1) from None
    except BrokenPipeError:
        # Else Python would complain once more when it flushes the stream at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
