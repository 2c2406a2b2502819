"""A pipeline of one component that does as it is told, run as the project runs its own.

As a program: `python -m tests.support.small_pipeline WORK_DIR TASK MARKER`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import apache_beam as beam
from tfx import types
from tfx.dsl.components.base import base_beam_component, base_beam_executor, executor_spec
from tfx.orchestration import metadata, pipeline
from tfx.types import artifact_utils, component_spec, standard_artifacts

from pipeline import execution
from pipeline.config import PipelineConfig

NAME = "Worker"
OUTPUT = "result"


def _mark_and_sleep(marker: str) -> str:
    Path(marker).write_text("here")
    time.sleep(600)
    return marker


class Executor(base_beam_executor.BaseBeamExecutor):
    """Writes into its output folder, which must be empty, and then does its task."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        folder = Path(artifact_utils.get_single_uri(output_dict[OUTPUT]))
        assert not list(folder.iterdir()), "the folder is not of this execution"
        (folder / "file").write_text("made")
        task, marker = exec_properties["task"], exec_properties["marker"]
        if task == "sleep":
            _mark_and_sleep(marker)
        elif task == "beam":
            with self._make_beam_pipeline() as root:
                _ = root | beam.Create([marker]) | beam.Map(_mark_and_sleep)
        elif task == "fill the disk":
            with open(folder / "large", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))


class Spec(component_spec.ComponentSpec):
    PARAMETERS = {
        "task": component_spec.ExecutionParameter(type=str),
        "marker": component_spec.ExecutionParameter(type=str),
    }
    INPUTS: dict[str, component_spec.ChannelParameter] = {}
    OUTPUTS = {OUTPUT: component_spec.ChannelParameter(type=standard_artifacts.Model)}


class Worker(base_beam_component.BaseBeamComponent):
    SPEC_CLASS = Spec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(Executor)

    def __init__(self, task: str, marker: str):
        super().__init__(
            Spec(task=task, marker=marker, result=types.Channel(type=standard_artifacts.Model))
        )


def run(work_dir: Path, task: str, marker: str = "") -> None:
    """Runs it; a task is `write`, `sleep`, `beam` or `fill the disk`.

    Args:
      work_dir: The pipeline's work folder.
      task: What the component does after it has written a file.
      marker: A file that is written before it sleeps.
    """
    config = PipelineConfig(work_dir=str(work_dir))
    execution.Runner(config).run(
        pipeline.Pipeline(
            pipeline_name=config.pipeline_name,
            pipeline_root=config.pipeline_root,
            components=[Worker(task, marker)],
            enable_cache=True,
            metadata_connection_config=metadata.sqlite_metadata_connection_config(
                config.metadata_path
            ),
            beam_pipeline_args=execution.beam_arguments(workers=1),
        )
    )


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), *sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)
