"""Which versions of a model should be served, and what became of each."""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Container, Mapping
from pathlib import Path

import grpc

from serving.server.config import Model
from serving.server.servable import Servable

# A folder that somebody wrote to within this many seconds may be half a copy.
SETTLED_SECONDS = 1.0

# Of each file in a version folder: path, size, time of the last change.
Fingerprint = tuple[tuple[str, int, int], ...]


class State(enum.IntEnum):
    """ModelVersionStatus.State of get_model_status.proto."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


class Version:
    """A version of a model, from its folder's appearance to its end.

    Attributes:
      number: Name of its folder.
      path: Its folder.
      state: Of its life.
      error: Why it could not be loaded; empty if nothing failed.
      servable: While it is in memory.
      attempts: To load it in its present contents.
      next_attempt: Earliest time.monotonic() of the next one.
      fingerprint: Contents at the last attempt.
    """

    def __init__(self, number: int, path: Path):
        self.number = number
        self.path = path
        self.state = State.START
        self.error = ""
        self.code = grpc.StatusCode.OK
        self.servable: Servable | None = None
        self.attempts = 0
        self.next_attempt = 0.0
        self.fingerprint: Fingerprint | None = None
        self._users = 0
        self._lock = threading.Lock()

    def acquire(self) -> Servable | None:
        """Keeps the servable in memory until `release`; None: it is not available any more."""
        with self._lock:
            if self.state != State.AVAILABLE:
                return None
            self._users += 1
            return self.servable

    def release(self) -> None:
        """Ends what `acquire` began."""
        with self._lock:
            self._users -= 1

    def retire(self) -> None:
        """Lets no new request in."""
        with self._lock:
            self.state = State.UNLOADING

    @property
    def is_drained(self) -> bool:
        """Whether the last request has ended."""
        with self._lock:
            return self.state == State.UNLOADING and self._users == 0


def find_versions(base_path: Path) -> tuple[dict[int, Path], list[str]]:
    """Lists the version folders under a model base path: those with numbers for names.

    Returns:
      Them, and the names of everything else.

    Raises:
      OSError: The base path is not there.
    """
    found, others = {}, []
    with os.scandir(base_path) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            name = entry.name
            if name.isascii() and name.isdecimal() and int(name) < 2**63 and entry.is_dir():
                found[int(name)] = base_path / name
            else:
                others.append(name)
    return found, others


def aspired_versions(
    model: Model, found: Mapping[int, Path], failed: Container[int] = ()
) -> list[int]:
    """The versions that should be served, the newest first.

    Args:
      model: Has the policy.
      found: What there is.
      failed: Versions that could not be loaded. For the policy `latest` each of them brings one
        more, to be served in its place.
    """
    numbers = sorted(found, reverse=True)
    if model.policy == "specific":
        return [number for number in numbers if number in model.versions]
    if model.policy != "latest":
        return numbers
    aspired, good = [], 0
    for number in numbers:
        if good == model.num_latest:
            break
        aspired.append(number)
        good += number not in failed
    return aspired


def take_fingerprint(folder: Path) -> tuple[Fingerprint, bool]:
    """Looks at the files of a version folder.

    Returns:
      What it contains, and whether nothing in it changed within `SETTLED_SECONDS`: while a folder
      is being copied, it is not to be loaded.

    Raises:
      OSError: The folder is not there (any more).
    """
    rows = []
    newest = os.stat(folder).st_ctime_ns
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            full = os.path.join(path, name)
            try:
                status = os.stat(full)
            except FileNotFoundError:
                status = os.lstat(full)  # A link to nowhere, which loading has to complain of
            # The time of change, not of modification, which copying may carry over.
            newest = max(newest, status.st_ctime_ns)
            rows.append((full, status.st_size, status.st_mtime_ns))
    age = time.time() - newest / 1e9
    # A clock that was set back must not keep a model out forever.
    return tuple(sorted(rows)), age >= SETTLED_SECONDS or age < -SETTLED_SECONDS
