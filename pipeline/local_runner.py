"""Runs the pipeline on this machine: `make run`, `python -m pipeline.local_runner`.

Also the pipeline file for TFX's command line, which passes no arguments on: there, the environment
variable VIT_PIPELINE_ARGS holds the flags, for `tfx pipeline create` and `tfx run create` alike.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dataset.format import DataError
from pipeline import command_line, console, metadata_file, run_lock
from pipeline import config as pipeline_config
from pipeline.choice import available_cpus, choose_training
from pipeline.interruption import interruptible
from pipeline.metadata_file import MetadataError
from pipeline.run_lock import PipelineBusyError
from trainer import engines, hyperparameters

ARGUMENTS_VARIABLE = "VIT_PIPELINE_ARGS"


def main(arguments: Sequence[str] | None = None) -> None:
    """Finds the data and runs the pipeline.

    Args:
      arguments: Flags; by default the process's, or those in VIT_PIPELINE_ARGS where it has none.

    Raises:
      SystemExit: With code 2 for a bad command line, 1 for bad data or a failed component, 130
        when interrupted.
    """
    if arguments is None:
        arguments = sys.argv[1:] or arguments_from_environment(ARGUMENTS_VARIABLE)
    config = command_line.parse_args(arguments)
    try:
        config = config.absolute()
    except pipeline_config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        with interruptible():
            _run(config)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command goes on from the last finished component, and "
            "training from its last finished epoch.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def arguments_from_environment(variable: str) -> list[str]:
    """Reads flags from an environment variable and says that it has done so.

    Args:
      variable: Its name.

    Raises:
      SystemExit: With code 2, if a quotation has no end.
    """
    value = os.environ.get(variable, "")
    try:
        arguments = shlex.split(value)
    except ValueError as error:
        print(f"error: {variable} is {value!r}: {error}.", file=sys.stderr)
        raise SystemExit(2) from None
    if arguments:
        print(f"flags: {value} (from {variable})", flush=True)
    return arguments


def _run(config: pipeline_config.PipelineConfig) -> None:
    from components.converter.formats import MissingPackagesError, check_installed
    from dataset.locate import locate

    try:
        check_installed(config.export_formats)
        dataset = locate(config.data, Path(config.work_dir), config.source_options())
        _make_folders(config.pipeline_root, config.model_dir(dataset.name, subset=dataset.subset))
        if "tfx" not in sys.modules:  # TFX's command line does not run every pipeline it loads
            run_lock.check_free(config.pipeline_root)
            metadata_file.check(config.metadata_path)
    except (
        DataError,
        MissingPackagesError,
        PipelineBusyError,
        MetadataError,
        pipeline_config.ConfigError,
    ) as error:
        _fail(error)

    # Only now: importing TFX takes longer than finding out that the data are not there.
    engines.share_gpus()
    with console.importing(config.verbosity):
        import tensorflow as tf

        from pipeline import execution

        # JAX may see GPUs where TensorFlow was installed without CUDA.
        try:
            on_jax = engines.choose(config.engine) == engines.JAX
        except engines.EngineError as error:
            _fail(error)
        gpus = engines.accelerators() if on_jax else len(tf.config.list_physical_devices("GPU"))

    preset, why = choose_training(config, dataset.card, gpus=gpus, cpus=available_cpus())
    print(f"model: preset {preset.name}, {why}", flush=True)
    if config.tune:
        trial = hyperparameters.shorten(preset, config.tune_fraction)
        minutes, epochs = trial.training.train_minutes, trial.training.epochs
        length = f"{minutes:.3g} minutes" if minutes else console.count(epochs, "epoch")
        print(f"tuning: before that, {config.tune} trials of {length}", flush=True)
    pipeline = execution.build_pipeline(config, dataset, preset)
    try:
        execution.Runner(config).run(pipeline)
    except (execution.PipelineFailedError, PipelineBusyError, MetadataError) as error:
        _fail(error)
    except OSError as error:  # ours, outside of any component
        _fail(
            pipeline_config.ConfigError(
                f"cannot write to {error.filename or config.pipeline_root}: {error.strerror}. "
                + (
                    "Free space on that disk"
                    if error.errno in (errno.ENOSPC, errno.EDQUOT)
                    else "Make it writable"
                )
                + ", or choose another --work_dir."
            )
        )


def _make_folders(*folders: str) -> None:
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise pipeline_config.ConfigError(
                f"cannot write to {folder}: {error.strerror}. Choose another --work_dir or "
                "--serving_dir."
            ) from error
        if not os.access(folder, os.W_OK):
            raise pipeline_config.ConfigError(
                f"{folder} is not writable: choose another --work_dir or --serving_dir."
            )


def _fail(error: Exception) -> NoReturn:
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
