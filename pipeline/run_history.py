"""Runs of a local pipeline, read from ML Metadata."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from ml_metadata import metadata_store
from ml_metadata.proto import metadata_store_pb2

from pipeline.config import metadata_path

_RUN_TYPE = "pipeline_run"
_DELETED_PROPERTY = "deleted"
_STATES = {
    metadata_store_pb2.Execution.COMPLETE: "COMPLETE",
    metadata_store_pb2.Execution.CACHED: "CACHED",
    metadata_store_pb2.Execution.FAILED: "FAILED",
    metadata_store_pb2.Execution.CANCELED: "CANCELED",
}
_FINISHED = (metadata_store_pb2.Execution.COMPLETE, metadata_store_pb2.Execution.CACHED)
_RUNNING, _INTERRUPTED = "RUNNING", "INTERRUPTED"
# The last component of the graph: a run is complete when it is.
_LAST_COMPONENT = "Pusher"


class PipelineBusyError(RuntimeError):
    """Another process is running the pipeline."""


@dataclass(frozen=True)
class ComponentRun:
    """One component of a run.

    Attributes:
      name: The component's id.
      state: COMPLETE, CACHED, FAILED, RUNNING or INTERRUPTED.
      started: Local time.
      seconds: How long it took; 0 when it was cached.
      outputs: Artifacts by output key; a cached component has those of the run it repeats.
    """

    name: str
    state: str
    started: datetime
    seconds: float
    outputs: dict[str, metadata_store_pb2.Artifact] = field(repr=False)


@dataclass(frozen=True)
class Run:
    """One run of a pipeline.

    Attributes:
      run_id: What TFX names it, the time it started.
      state: COMPLETE, FAILED, RUNNING or INTERRUPTED.
      started: Local time.
      components: In the order in which they ran.
    """

    run_id: str
    state: str
    started: datetime
    components: list[ComponentRun]

    @property
    def seconds(self) -> float:
        """The time its components took, together."""
        return sum(component.seconds for component in self.components)

    def output(self, component: str, key: str) -> metadata_store_pb2.Artifact | None:
        """Finds an output artifact of a component that finished."""
        for candidate in self.components:
            if candidate.name == component:
                return candidate.outputs.get(key)
        return None


class RunHistory:
    """The runs recorded in a pipeline's metadata.

    Args:
      pipeline_root: Folder of the pipeline's artifacts.
    """

    def __init__(self, pipeline_root: str):
        self._root = pipeline_root
        path = metadata_path(pipeline_root)
        self._store: metadata_store.MetadataStore | None = None
        if os.path.exists(path):
            config = metadata_store_pb2.ConnectionConfig()
            config.sqlite.filename_uri = path
            config.sqlite.connection_mode = metadata_store_pb2.SqliteMetadataSourceConfig.READWRITE
            self._store = metadata_store.MetadataStore(config)

    def runs(self) -> list[Run]:
        """Returns all runs that were not deleted, the newest first."""
        if self._store is None:
            return []
        contexts = [
            context
            for context in self._store.get_contexts_by_type(_RUN_TYPE)
            if not context.custom_properties[_DELETED_PROPERTY].int_value
        ]
        holder = lock_holder(self._root)
        running = holder.run_id if holder else None
        runs = [self._run(context, context.name == running) for context in contexts]
        return sorted(runs, key=lambda run: run.started, reverse=True)

    def run(self, run_id: str) -> Run:
        """Finds a run.

        Raises:
          KeyError: There is none of this id; the message lists those there are.
        """
        runs = self.runs()
        for run in runs:
            if run.run_id == run_id:
                return run
        known = ", ".join(run.run_id for run in runs) or "none"
        raise KeyError(f"there is no run {run_id!r}; the runs are: {known}")

    def delete(self, run_id: str) -> int:
        """Forgets a run and removes the artifacts that no other run uses.

        Models that were pushed stay where they are served.

        Returns:
          The number of artifacts removed.

        Raises:
          KeyError: There is no such run.
          PipelineBusyError: The pipeline is running.
        """
        from tfx.utils import io_utils

        with exclusive_run(self._root):
            run = self.run(run_id)
            assert self._store is not None  # or there were no run
            kept = {
                artifact.id
                for other in self.runs()
                if other.run_id != run_id
                for component in other.components
                for artifact in component.outputs.values()
            }
            removed = [
                artifact
                for component in run.components
                for artifact in component.outputs.values()
                if artifact.id not in kept
            ]
            for artifact in removed:
                # First the state: the cache passes over artifacts that are not live.
                artifact.state = metadata_store_pb2.Artifact.DELETED
            self._store.put_artifacts(removed)
            for artifact in removed:
                if os.path.exists(artifact.uri):
                    io_utils.delete_dir(artifact.uri)
            context = self._store.get_context_by_type_and_name(_RUN_TYPE, run_id)
            context.custom_properties[_DELETED_PROPERTY].int_value = 1
            self._store.put_contexts([context])
            return len(removed)

    def remove_leftovers(self) -> None:
        """Removes what components that were interrupted or killed have left half-written.

        TFX removes the outputs of a component that fails, and no component reads those of one that
        did not finish. To be called by whoever holds the pipeline.
        """
        if self._store is None:
            return
        for execution in self._store.get_executions():
            if execution.last_known_state not in _FINISHED:
                node = glob.escape(os.path.join(self._root, self._node_of(execution)))
                for folder in glob.glob(f"{node}/*/{execution.id}"):
                    shutil.rmtree(folder)

    def _run(self, context: metadata_store_pb2.Context, running: bool) -> Run:
        assert self._store is not None
        executions = sorted(
            self._store.get_executions_by_context(context.id), key=lambda execution: execution.id
        )
        events = self._store.get_events_by_execution_ids([item.id for item in executions])
        output_events = [e for e in events if e.type == metadata_store_pb2.Event.OUTPUT]
        artifacts = {
            artifact.id: artifact
            for artifact in self._store.get_artifacts_by_id(
                [event.artifact_id for event in output_events]
            )
        }
        components = []
        for execution in executions:
            outputs = {
                event.path.steps[0].key: artifacts[event.artifact_id]
                for event in output_events
                if event.execution_id == execution.id
            }
            state = _STATES.get(execution.last_known_state, _RUNNING if running else _INTERRUPTED)
            milliseconds = (
                execution.last_update_time_since_epoch - execution.create_time_since_epoch
            )
            seconds = 0.0 if state in ("CACHED", _INTERRUPTED) else milliseconds / 1000
            started = datetime.fromtimestamp(execution.create_time_since_epoch / 1000)
            components.append(
                ComponentRun(self._node_of(execution), state, started, seconds, outputs)
            )
        return Run(
            run_id=context.name,
            state=_run_state(components, running),
            started=datetime.fromtimestamp(context.create_time_since_epoch / 1000),
            components=components,
        )

    def _node_of(self, execution: metadata_store_pb2.Execution) -> str:
        assert self._store is not None
        for context in self._store.get_contexts_by_execution(execution.id):
            if context.type == "node":
                # Named <pipeline>.<component>.
                return context.name.partition(".")[2]
        return ""


def _run_state(components: list[ComponentRun], running: bool) -> str:
    states = {component.state for component in components}
    if "FAILED" in states:
        return "FAILED"
    if running:
        return _RUNNING
    finished = {c.name for c in components if c.state in ("COMPLETE", "CACHED")}
    return "COMPLETE" if _LAST_COMPONENT in finished else _INTERRUPTED


@dataclass(frozen=True)
class LockHolder:
    """Who holds a pipeline.

    Attributes:
      process: Process id.
      run_id: The run that it executes; empty when it does something else.
    """

    process: int
    run_id: str


@contextlib.contextmanager
def exclusive_run(pipeline_root: str, run_id: str = "") -> Iterator[None]:
    """Holds a pipeline for one process; the system frees it when the process ends, however.

    Args:
      pipeline_root: Folder of the pipeline's artifacts; made if needed.
      run_id: The run that is to be executed.

    Raises:
      PipelineBusyError: Another process holds it.
    """
    os.makedirs(pipeline_root, exist_ok=True)
    with open(_lock_path(pipeline_root), "a+") as lock:
        if not _try_lock(lock.fileno()):
            holder = lock_holder(pipeline_root)
            who = f" (process {holder.process})" if holder else ""
            raise PipelineBusyError(
                f"the pipeline in {pipeline_root} is running already{who}: wait for it, stop it, "
                "or choose another --work_dir or --pipeline_name."
            )
        lock.truncate(0)
        lock.write(f"{os.getpid()} {run_id}\n")
        lock.flush()
        yield


def lock_holder(pipeline_root: str) -> LockHolder | None:
    """Finds out which process, this one or another, holds a pipeline; None when it is free."""
    try:
        with open(_lock_path(pipeline_root)) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                process, _, run_id = lock.read().strip().partition(" ")
    except FileNotFoundError:
        return None
    # Empty for the moment between locking the file and writing to it.
    return LockHolder(int(process), run_id) if process else None


def _try_lock(file: int) -> bool:
    # More than once, since `lock_holder` takes the lock for a moment to see whether it is free.
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
    return False


def _lock_path(pipeline_root: str) -> str:
    return os.path.join(pipeline_root, ".lock")
