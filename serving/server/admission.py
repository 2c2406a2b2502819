"""Bounds how many predictions are worked on at a time, whatever protocol they came by."""

from __future__ import annotations

import threading

from serving.server.errors import resource_exhausted


class Admission:
    """A context for each prediction; entering refuses one too many with RESOURCE_EXHAUSTED.

    Attributes:
      in_progress: How many there are.
    """

    def __init__(self, limit: int):
        """Sets up.

        Args:
          limit: How many there may be.
        """
        self._limit = limit
        self._lock = threading.Lock()
        self.in_progress = 0

    def __enter__(self) -> None:
        with self._lock:
            if self.in_progress >= self._limit:
                raise resource_exhausted(
                    f"{self._limit} requests are being answered already, try again later"
                )
            self.in_progress += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.in_progress -= 1
