"""The history of local runs, for TFX's command line."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import click
from tfx.tools.cli import labels
from tfx.tools.cli.handler import local_handler

from pipeline.metadata_file import MetadataError
from pipeline.run_history import RunHistory
from pipeline.run_lock import PipelineBusyError, lock_holder

# Training stops between two steps, Beam between two bundles.
_TERMINATION_SECONDS = 30


class HistoryHandler(local_handler.LocalHandler):
    """TFX's handler of the local engine, with the commands that it leaves out."""

    def list_runs(self) -> None:
        """Prints a table of the pipeline's runs, the newest first."""
        runs = _history(self._pipeline_root(self.flags_dict[labels.PIPELINE_NAME])).runs()
        if not runs:
            click.echo("No runs.")
            return
        rows = [
            [run.run_id, run.state, f"{run.started:%Y-%m-%d %H:%M:%S}", f"{run.seconds:.0f} s"]
            for run in runs
        ]
        click.echo(self._format_table(["run_id", "state", "started", "time"], rows))

    def get_run(self) -> None:
        """Prints the state of a run and of its components."""
        name = self.flags_dict[labels.PIPELINE_NAME]
        try:
            run = _history(self._pipeline_root(name)).run(self.flags_dict[labels.RUN_ID])
        except KeyError as error:
            sys.exit(error.args[0])
        click.echo(f"{run.run_id}: {run.state}")
        rows = [[c.name, c.state, f"{c.seconds:.1f} s"] for c in run.components]
        click.echo(self._format_table(["component", "state", "time"], rows))

    def delete_run(self) -> None:
        """Removes a run and the artifacts that only it uses; pushed models stay."""
        run_id = self.flags_dict[labels.RUN_ID]
        for root in self._pipeline_roots():
            history = _history(root)
            if run_id not in {run.run_id for run in history.runs()}:
                continue
            try:
                removed = history.delete(run_id)
            except PipelineBusyError as error:
                sys.exit(str(error))
            click.echo(f"Run {run_id} deleted, {removed} artifacts removed.")
            return
        sys.exit(f"there is no run {run_id!r} in any pipeline; `tfx run list` names them.")

    def terminate_run(self) -> None:
        """Interrupts a run, which can be continued."""
        run_id = self.flags_dict[labels.RUN_ID]
        for root in self._pipeline_roots():
            holder = lock_holder(root)
            if not holder or holder.run_id != run_id:
                continue
            os.kill(holder.process, signal.SIGTERM)
            for _ in range(_TERMINATION_SECONDS * 10):
                if lock_holder(root) != holder:
                    click.echo(f"Run {run_id} interrupted.")
                    return
                time.sleep(0.1)
            sys.exit(f"process {holder.process} has not stopped yet; `kill -9` ends it at once.")
        sys.exit(f"run {run_id!r} is not running.")

    def _pipeline_root(self, name: str) -> str:
        self._check_pipeline_existence(name)
        with open(self._get_pipeline_args_path(name)) as file:
            return str(json.load(file)[labels.PIPELINE_ROOT])

    def _pipeline_roots(self) -> list[str]:
        home = Path(self._handler_home_dir)
        return [self._pipeline_root(path.parent.name) for path in home.glob("*/pipeline_args.json")]


def _history(root: str) -> RunHistory:
    try:
        return RunHistory(root)
    except MetadataError as error:
        sys.exit(f"error: {error}")
