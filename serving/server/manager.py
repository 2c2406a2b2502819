"""Watches model base paths; loads, switches, drains and unloads versions."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from serving.server import versions
from serving.server.config import Model
from serving.server.errors import RequestError, invalid_argument
from serving.server.servable import LoadError, Servable
from serving.server.versions import State, Version

_log = logging.getLogger(__name__)

# Versions that have ended, of each model, whose fate can still be asked for.
_KEPT_ENDED = 20
_SHOWN_NAMES = 20
_INSTEAD = "; in its place is served version "
# How often a version that is being drained or copied is looked at, in seconds.
_BUSY_POLL_SECONDS = 0.1

Load = Callable[[str, Version], Servable]


class _Watched:
    """A model and its versions, touched by the manager's thread alone."""

    def __init__(self, model: Model):
        self.model = model
        self.versions: dict[int, Version] = {}
        self.complaint = ""  # What was last reported of the base path
        self.others: set[str] = set()  # What lies in it and is no version, and was reported
        self.fallback = ""  # What is served in place of versions that cannot be loaded


class Manager:
    """Serves what the base paths hold.

    A thread compares the folders with the versions in memory. As TF Serving's availability
    preserving policy has it, a version that is no longer wanted stays until one that is wanted is
    available, unless none is wanted: when the last folder has gone, the model goes, too. A base
    path that cannot be read changes nothing.
    """

    def __init__(
        self,
        models: Sequence[Model],
        load: Load,
        *,
        poll_seconds: float,
        max_retries: int,
        retry_seconds: float,
        labels_for_unavailable: bool = False,
        on_change: Callable[[], None] = lambda: None,
        on_failure: Callable[[str], None] = lambda name: None,
        falls_back: bool = True,
    ):
        """Sets up; `start` begins to load.

        Args:
          models: What to serve.
          load: Makes a servable of a version's folder, warmed up; raises LoadError.
          poll_seconds: Between looks at the base paths; 0: only until what is there is loaded.
          max_retries: Of loading a folder that has not changed since it failed.
          retry_seconds: Between those.
          labels_for_unavailable: Whether a label may stand for a version that is not there.
          on_change: Called after each change of a state.
          on_failure: Called with a model's name after each load that failed.
          falls_back: Whether another version is served in place of one that cannot be loaded.
        """
        self._load = load
        self._poll_seconds = poll_seconds
        self._max_retries = max_retries
        self._retry_seconds = retry_seconds
        self._labels_for_unavailable = labels_for_unavailable
        self._on_change = on_change
        self._on_failure = on_failure
        self._falls_back = falls_back
        self._wanted = tuple(models)
        self._watched: dict[str, _Watched] = {}
        # What requests read: replaced, never changed, so that they need no lock.
        self._available: Mapping[str, Mapping[int, Version]] = {}
        self._statuses: Mapping[str, Mapping[int, Version]] = {}
        self._labels: Mapping[str, Mapping[str, int]] = {}
        self._fallbacks: Sequence[str] = ()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="versions", daemon=True)
        self._apply_models()

    def start(self) -> None:
        """Begins to watch and load, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Loads and unloads nothing more, but for what the thread is at; does not wait for it."""
        self._stopping = True
        self._wake.set()

    def configure(self, models: Sequence[Model]) -> None:
        """Serves other models, or the same ones otherwise; those that are not named go."""
        self._wanted = tuple(models)
        self._wake.set()

    @property
    def is_ready(self) -> bool:
        """Whether every model has a version that answers."""
        available = self._available
        return all(available.get(model.name) for model in self._wanted)

    def has_model(self, name: str) -> bool:
        """Whether a model of this name is to be served."""
        return name in self._labels

    def states(self) -> Iterator[tuple[str, Version]]:
        """Every model's name with each of its versions."""
        for name, known in self._statuses.items():
            for version in known.values():
                yield name, version

    def fallbacks(self) -> Sequence[str]:
        """Models of which an older version is served, because a newer one cannot be loaded."""
        return self._fallbacks

    @contextlib.contextmanager
    def servable(self, spec: Any) -> Iterator[Servable]:
        """The servable that a ModelSpec asks for, kept in memory for the block.

        Raises:
          RequestError: There is none; codes and messages are TF Serving's.
        """
        while True:
            version = self._resolve(spec)
            servable = version.acquire()
            if servable is not None:
                break
            # It was retired after it was found, and what takes its place is published by now.
        try:
            yield servable
        finally:
            version.release()

    def _resolve(self, spec: Any) -> Version:
        name = spec.name
        if not name:
            raise invalid_argument("ModelSpec has no name specified.")
        available = self._available.get(name, {})
        choice = spec.WhichOneof("version_choice")
        if choice is None:
            if not available:
                raise self._missing(name, f"Latest({name})")
            return available[max(available)]
        if choice == "version":
            number = spec.version.value
        else:
            number = self._labelled(name, spec.version_label)
        if number not in available:
            raise self._missing(name, f"Specific({name}, {number})", number)
        return available[number]

    def _missing(self, name: str, what: str, number: int | None = None) -> RequestError:
        """Why there is no such version: there is none, or none yet."""
        known = self._statuses.get(name, {})
        asked = known.values() if number is None else [known[number]] if number in known else []
        is_looked_for = self.has_model(name) and name not in self._statuses
        if is_looked_for or any(v.state in (State.START, State.LOADING) for v in asked):
            message = f"model {name} is being loaded, try again later"
            return RequestError(grpc.StatusCode.UNAVAILABLE, message)
        return RequestError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {what}")

    def _labelled(self, name: str, label: str) -> int:
        number = self._labels.get(name, {}).get(label)
        if number is None or not (
            self._labels_for_unavailable or number in self._available.get(name, {})
        ):
            raise invalid_argument(f"Unrecognized servable version label: {label}")
        return number

    def known_versions(self, spec: Any) -> list[Version]:
        """The versions that a request for a status means, available or not.

        Raises:
          RequestError: There are none; codes and messages are TF Serving's.
        """
        known = self._statuses.get(spec.name, {})
        choice = spec.WhichOneof("version_choice")
        if choice is None:
            if not known:
                raise RequestError(
                    grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}"
                )
            return [known[number] for number in sorted(known, reverse=True)]
        if choice == "version":
            number = spec.version.value
        else:
            number = self._labelled(spec.name, spec.version_label)
        if number not in known:
            raise RequestError(
                grpc.StatusCode.NOT_FOUND, f"Could not find version {number} of model {spec.name}"
            )
        return [known[number]]

    # What follows runs in the manager's thread alone.

    def _run(self) -> None:
        # What is there before any model, TensorFlow's modules, is never garbage. Looking through it
        # would stop all requests for a quarter of a second, now and then.
        gc.collect()
        gc.freeze()
        while not self._stopping:
            self._wake.clear()
            try:
                self._apply_models()
                busy = [self._step(watched) for watched in list(self._watched.values())]
            except Exception:
                # Nothing that lies in a folder may end the watch.
                _log.exception("looking for model versions failed")
                busy = [True]
            if any(busy):
                self._wake.wait(min(_BUSY_POLL_SECONDS, self._poll_seconds or 1))
            else:
                self._wake.wait(self._poll_seconds or None)

    def _apply_models(self) -> None:
        wanted = self._wanted  # Read once: `configure` may replace it meanwhile
        for model in wanted:
            self._watched.setdefault(model.name, _Watched(model)).model = model
        self._labels = {model.name: model.labels for model in wanted}

    def _step(self, watched: _Watched) -> bool:
        """Brings one model closer to its folders; returns whether it should go on soon."""
        model = watched.model
        is_wanted = self.has_model(model.name)
        if not is_wanted:
            aspired: list[int] = []
        else:
            try:
                found, others = versions.find_versions(model.base_path)
            except OSError as error:
                self._complain(
                    watched, f"{model.base_path} cannot be read ({error.strerror}): waiting for it"
                )
                return self._unload(watched, None)
            self._report_others(watched, others)
            aspired = self._aspired(watched, found)
            missing = f"{model.base_path} holds no version to serve (a folder named by a number)"
            self._complain(watched, "" if aspired else f"{missing}: waiting for one")
            for number in aspired:
                if number not in watched.versions or watched.versions[number].state == State.END:
                    self._reappear(watched, Version(number, found[number]))
        busy = False
        for number in aspired:
            if watched.versions[number].state in (State.START, State.LOADING, State.END):
                busy |= self._try_to_load(watched, watched.versions[number])
        busy |= self._unload(watched, aspired)
        ended = all(version.state == State.END for version in watched.versions.values())
        if ended and not is_wanted:
            del self._watched[model.name]
            self._publish()
        return busy

    def _aspired(self, watched: _Watched, found: Mapping[int, Path]) -> list[int]:
        """What should be served, with what takes the place of versions that cannot be loaded."""
        strictly = versions.aspired_versions(watched.model, found)
        if not self._falls_back:
            return strictly
        failed = {n: version for n, version in watched.versions.items() if version.error}
        aspired = versions.aspired_versions(watched.model, found, failed)
        instead = ""
        if len(aspired) > len(strictly):
            instead = ", ".join(str(number) for number in aspired if number not in failed)
        for number in strictly if instead else ():
            if number in failed:
                reason = failed[number].error.partition(_INSTEAD)[0]
                failed[number].error = f"{reason}{_INSTEAD}{instead}"
        if instead != watched.fallback:
            if instead:
                _log.warning("model %s: falling back to version %s", watched.model.name, instead)
            watched.fallback = instead
            self._fallbacks = [name for name, each in self._watched.items() if each.fallback]
        return aspired

    def _report_others(self, watched: _Watched, others: Sequence[str]) -> None:
        """Says once of each name that it is no version."""
        new = [name for name in others if name not in watched.others]
        watched.others = set(others)
        if new:
            shown = ", ".join(map(ascii, new[:_SHOWN_NAMES])) + ", ..." * (len(new) > _SHOWN_NAMES)
            base = watched.model.base_path
            _log.info("%s: not versions (folders named by a number): %s", base, shown)

    def _complain(self, watched: _Watched, complaint: str) -> None:
        """Reports what is wrong with a base path, once as long as it stays the same."""
        if complaint and complaint != watched.complaint:
            _log.warning("model %s: %s", watched.model.name, complaint)
        watched.complaint = complaint

    def _reappear(self, watched: _Watched, version: Version) -> None:
        known = watched.versions.get(version.number)
        if known is not None and known.error:
            return  # It failed; whether to try it again is decided by its contents
        watched.versions[version.number] = version
        self._publish()

    def _try_to_load(self, watched: _Watched, version: Version) -> bool:
        """Loads a version if that is due; returns whether it is about to be."""
        try:
            fingerprint, is_settled = versions.take_fingerprint(version.path)
        except OSError as error:
            complaint = f"{error.filename} cannot be read: {error.strerror}"
            # Unless it went away between two looks
            if version.error != complaint and os.path.isdir(version.path):
                version.error, version.code = complaint, grpc.StatusCode.UNKNOWN
                _log.error("model %s version %d: %s", watched.model.name, version.number, complaint)
                self._publish()
            return True
        if fingerprint != version.fingerprint:
            version.attempts, version.next_attempt = 0, 0.0
            version.fingerprint = fingerprint
        if not is_settled:
            return True
        if version.attempts > self._max_retries:
            return False
        if time.monotonic() < version.next_attempt:
            return True
        name = watched.model.name
        version.attempts += 1
        version.state = State.LOADING
        self._publish()
        begin = time.monotonic()
        try:
            version.servable = self._load(name, version)
            gc.collect()
        except LoadError as error:
            version.error, version.code = str(error), grpc.StatusCode.UNKNOWN
            self._on_failure(name)
            left = self._max_retries - version.attempts + 1
            version.next_attempt = time.monotonic() + self._retry_seconds
            version.state = State.LOADING if left else State.END
            hint = f"trying {left} more times" if left else "not tried again until it changes"
            _log.error("model %s version %d: %s (%s)", name, version.number, error, hint)
            _free_memory()
            self._publish()
            return left > 0
        version.error, version.code = "", grpc.StatusCode.OK
        version.state = State.AVAILABLE
        self._publish()
        seconds = time.monotonic() - begin
        _log.info("model %s version %d: available after %.1f s", name, version.number, seconds)
        return False

    def _unload(self, watched: _Watched, aspired: Sequence[int] | None) -> bool:
        """Retires versions that are not aspired (None: leaves them) and frees drained ones."""
        if aspired is not None:
            available = [v for v in watched.versions.values() if v.state == State.AVAILABLE]
            if not aspired or any(version.number in aspired for version in available):
                for version in available:
                    if version.number not in aspired:
                        version.retire()
                        self._publish()
        for version in list(watched.versions.values()):
            if version.is_drained:
                self._free(watched, version)
            elif (
                aspired is not None
                and version.number not in aspired
                and version.state in (State.START, State.LOADING)
            ):
                version.state = State.END  # Its folder went before it was loaded
                self._publish()
        return any(version.state == State.UNLOADING for version in watched.versions.values())

    def _free(self, watched: _Watched, version: Version) -> None:
        servable, version.servable = version.servable, None
        assert servable is not None
        servable.close()
        del servable
        _free_memory()
        version.state = State.END
        _log.info("model %s version %d: unloaded", watched.model.name, version.number)
        self._publish()

    def _publish(self) -> None:
        statuses = {}
        for name, watched in self._watched.items():
            ended = [v.number for v in watched.versions.values() if v.state == State.END]
            for number in sorted(ended)[:-_KEPT_ENDED]:
                del watched.versions[number]
            statuses[name] = dict(watched.versions)
        self._statuses = statuses
        self._available = {
            name: {n: v for n, v in known.items() if v.state == State.AVAILABLE}
            for name, known in statuses.items()
        }
        self._on_change()


def _free_memory() -> None:
    """Gives the memory of a closed session back to the system."""
    gc.collect()  # Graphs are full of cycles
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
