"""Runs of a local pipeline, read from ML Metadata."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ml_metadata import errors, metadata_store
from ml_metadata.proto import metadata_store_pb2

from pipeline import leftovers, metadata_file
from pipeline.config import metadata_path
from pipeline.run_lock import exclusive_run, lock_holder

_RUN_TYPE = "pipeline_run"
_DELETED_PROPERTY = "deleted"
_RUNNING, _INTERRUPTED = "RUNNING", "INTERRUPTED"
_STATES = {
    metadata_store_pb2.Execution.COMPLETE: "COMPLETE",
    metadata_store_pb2.Execution.CACHED: "CACHED",
    metadata_store_pb2.Execution.FAILED: "FAILED",
    metadata_store_pb2.Execution.CANCELED: _INTERRUPTED,
}
_FINISHED = (metadata_store_pb2.Execution.COMPLETE, metadata_store_pb2.Execution.CACHED)
_UNFINISHED = (metadata_store_pb2.Execution.NEW, metadata_store_pb2.Execution.RUNNING)
# The last component of the graph: a run is complete when it is.
_LAST_COMPONENT = "Pusher"


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

    Raises:
      MetadataError: The metadata cannot be read.
    """

    def __init__(self, pipeline_root: str):
        self._root = pipeline_root
        path = metadata_path(pipeline_root)
        self._store: metadata_store.MetadataStore | None = None
        metadata_file.check(path)
        if os.path.exists(path):
            config = metadata_store_pb2.ConnectionConfig()
            config.sqlite.filename_uri = path
            config.sqlite.connection_mode = metadata_store_pb2.SqliteMetadataSourceConfig.READWRITE
            try:
                self._store = metadata_store.MetadataStore(config)
            except (errors.StatusError, RuntimeError) as error:
                raise metadata_file.metadata_error(path, error) from None

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

    def clean_up(self) -> None:
        """Clears away what interrupted and killed runs have left; to be called before a run.

        Their executions are marked as interrupted and what they have left half-written is removed.
        TFX removes the outputs of a component that fails, and no component reads those of one that
        did not finish. To be called by whoever holds the pipeline.
        """
        executions = self._store.get_executions() if self._store else []
        self._cancel([e for e in executions if e.last_known_state in _UNFINISHED])
        leftovers.remove_working_folders(self._root)
        for execution in executions:
            if execution.last_known_state not in _FINISHED:
                node = Path(self._root, self._node_of(execution))
                for folder in node.glob(f"*/{execution.id}"):
                    shutil.rmtree(folder)
        aside = leftovers.set_aside_unknown(self._root, {e.id for e in executions})
        if aside:
            print(
                f"artifacts that {metadata_path(self._root)} does not know were moved to {aside}: "
                "remove it if you do not need them",
                flush=True,
            )

    def interrupt(self, run_id: str) -> None:
        """Marks what a run has not finished as interrupted, and so the run."""
        if self._store is None:
            return
        context = self._store.get_context_by_type_and_name(_RUN_TYPE, run_id)
        if context:
            executions = self._store.get_executions_by_context(context.id)
            # Beam makes a failure of an interruption.
            self._cancel([e for e in executions if e.last_known_state not in _FINISHED])

    def _cancel(self, executions: list[metadata_store_pb2.Execution]) -> None:
        for execution in executions:
            execution.last_known_state = metadata_store_pb2.Execution.CANCELED
        if self._store and executions:
            self._store.put_executions(executions)

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
