"""Compiles the pipeline for Kubeflow Pipelines 2 or Vertex AI: `python kubeflow/runner.py`.

Also the pipeline file for `tfx pipeline compile --engine vertex`, which passes no arguments on:
there, the environment variable VIT_KUBEFLOW_ARGS holds the flags.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.format import DataError
from dataset.locate import Dataset, locate
from pipeline import console
from pipeline.config import ConfigError
from pipeline.gate import PRESET_CLASSES
from pipeline.kubeflow import config as kubeflow_config
from pipeline.kubeflow import fingerprint_task
from pipeline.kubeflow import parameters as kubeflow_parameters
from pipeline.kubeflow import spec as kubeflow_spec
from pipeline.kubeflow.config import KubeflowConfig
from pipeline.local_runner import arguments_from_environment

ARGUMENTS_VARIABLE = "VIT_KUBEFLOW_ARGS"
# Where kubeflow/Dockerfile puts it.
COMMAND = ("python", "-u", "/app/kubeflow/entrypoint.py")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles.

    Args:
      arguments: Flags; by default the process's, or those in VIT_KUBEFLOW_ARGS where it has none.

    Raises:
      SystemExit: With code 2 for a bad command line, 1 for bad data.
    """
    if arguments is None:
        arguments = sys.argv[1:] or arguments_from_environment(ARGUMENTS_VARIABLE)
    config = kubeflow_config.parse_args(arguments)
    try:
        dataset = _local_copy(config)
        path = compile_pipeline(config, dataset)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    print(f"wrote {path}", flush=True)


def _local_copy(config: KubeflowConfig) -> Dataset | None:
    """What the data are, where there is a copy of them on this machine."""
    if config.fingerprint_of is None:
        return None
    dataset = locate(
        config.fingerprint_of, Path(config.work_dir), config.source_options(), download=False
    )
    if dataset.name != config.dataset_name:
        raise ConfigError(
            f"--dataset_name is {config.dataset_name!r}, and --fingerprint_of is the data set "
            f"{dataset.name!r}: correct either."
        )
    return dataset


def compile_pipeline(config: KubeflowConfig, dataset: Dataset | None = None) -> str:
    """Compiles with TFX and adapts the result.

    Args:
      config: What to compile.
      dataset: A local copy of the data, for their fingerprint.

    Returns:
      The path of the file that was written.
    """
    folder, name = os.path.split(os.path.abspath(config.output_file))
    _write(folder, name, None)
    with console.importing("quiet"):
        from tfx.orchestration.kubeflow.v2 import kubeflow_v2_dag_runner as tfx_runner

        from pipeline import execution, graph

    preset = config.resolve_preset()
    fingerprint = config.data_fingerprint or (dataset.fingerprint if dataset else None)
    serving_dir = config.model_dir(config.dataset_name, subset=bool(dataset and dataset.subset))
    classes = dataset.card.num_classes if dataset else PRESET_CLASSES
    parameters = kubeflow_parameters.pipeline_parameters(
        config, preset, serving_dir, fingerprint, classes
    )
    if config.fingerprint_in_run:
        parameters = [each for each in parameters if each.name != fingerprint_task.PARAMETER]

    class Runner(tfx_runner.KubeflowV2DagRunner):
        """TFX's compiler; TFX's command line replaces its `run`, which this one calls."""

        def run(self, pipeline: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            job = super().run(pipeline, write_out=False)
            spec = job["pipelineSpec"]
            kubeflow_parameters.add_parameters(spec, parameters)
            kubeflow_spec.adapt(spec, config)
            if config.fingerprint_in_run:
                fingerprint_task.add(spec, config)
            if self._output_filename.endswith(".json"):
                text = json.dumps(job, indent=1, sort_keys=True) + "\n"
            else:
                text = kubeflow_spec.package(spec, kubeflow_spec.platform_spec(spec, config))
            _write(self._output_dir, self._output_filename, text)
            return job

    Runner(
        tfx_runner.KubeflowV2DagRunnerConfig(
            default_image=config.image, default_commands=COMMAND, use_pipeline_spec_2_1=True
        ),
        output_dir=folder,
        output_filename=name,
    ).run(
        execution.translate(
            config,
            graph.DataSource(
                folder=config.data,
                name=config.dataset_name,
                fingerprint=fingerprint or "",
                limit=config.limit,
                options=config.source_options(preset.image_size),
                classes=classes,
            ),
            preset,
            serving_dir=serving_dir,
        )
    )
    return config.output_file


def _write(folder: str, name: str, text: str | None) -> None:
    """Writes a file; without a text, only sees whether it could."""
    path = os.path.join(folder, name)
    partial = f"{path}.partial"
    try:
        os.makedirs(folder, exist_ok=True)
        Path(partial).write_text(text or "")
        if text is None:
            os.remove(partial)
        else:
            os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}. Choose another --output."
        ) from error


if __name__ == "__main__":
    main()
