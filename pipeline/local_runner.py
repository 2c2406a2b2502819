"""Runs the pipeline on this machine: `make run`, `python -m pipeline.local_runner`.

Also the pipeline file for TFX's command line, which passes no arguments on: there, the environment
variable VIT_PIPELINE_ARGS holds the flags, for `tfx pipeline create` and `tfx run create` alike.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dataset.card import TRAIN, VALIDATION
from dataset.format import OFFICIAL_TRAIN_RECORDS, DataError
from pipeline import command_line, console, metadata_file, run_lock
from pipeline import config as pipeline_config
from pipeline.interruption import interruptible
from pipeline.metadata_file import MetadataError
from pipeline.run_lock import PipelineBusyError
from trainer import engines, hyperparameters, presets
from trainer.preset import Preset

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

    images = sum(dataset.card.splits[split].examples for split in (TRAIN, VALIDATION))
    preset, why = choose_training(config, images=images, gpus=gpus, cpus=available_cpus())
    print(f"model: preset {preset.name}, {why}", flush=True)
    if config.tune:
        trial = hyperparameters.shorten(preset, config.tune_fraction)
        minutes = trial.train_minutes
        length = f"{minutes:.3g} minutes" if minutes else console.count(trial.epochs, "epoch")
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


def choose_training(
    config: pipeline_config.PipelineConfig, *, images: int, gpus: int, cpus: int
) -> tuple[Preset, str]:
    """Resolves the preset and its training length, as they fit the machine unless given.

    Args:
      config: The run's configuration.
      images: In the file of training images.
      gpus: GPUs that the engine sees.
      cpus: Cores.

    Returns:
      The preset, and the length and its reason for people.
    """
    if config.preset is None and not gpus:
        config = dataclasses.replace(config, preset=presets.ON_CPU)
    preset = config.resolve_preset()
    device = console.count(gpus, "GPU") if gpus else f"no GPU, {cpus} CPU cores"
    if preset.train_minutes:
        return preset, f"{console.count(preset.train_minutes, 'minute')} of training ({device})"
    if config.epochs or gpus:
        return preset, f"{console.count(preset.epochs, 'epoch')} ({device})"
    if preset.name in presets.MINUTES_ON_CPU:
        # Fewer images are learned sooner.
        share = min(images, config.limit or images) / OFFICIAL_TRAIN_RECORDS
        minutes = max(1.0, round(presets.MINUTES_ON_CPU[preset.name] * min(1.0, share), 1))
        return (
            config.resolve_preset(train_minutes=minutes),
            f"{console.count(minutes, 'minute')} of training ({device}; more or less: "
            "--train_minutes X, or --epochs N)",
        )
    # An epoch of the notebook preset takes four to six minutes on two cores, and more cores help
    # less and less: this keeps a run to about a quarter of an hour in all.
    epochs = min(preset.epochs, max(2, cpus // 4))
    why = f"{console.count(epochs, 'epoch')} ({device})"
    if epochs < preset.epochs:
        why += f": A SHORT RUN, the preset's own length is {preset.epochs} "
        why += f"(--epochs {preset.epochs})"
    return config.resolve_preset(epochs=epochs), why


def available_cpus() -> int:
    """Counts the cores that this process may use, which in a container are fewer than there are."""
    cpus = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" or "max PERIOD", cgroup v2
    if limit.is_file():
        quota, _, period = limit.read_text().partition(" ")
        if quota != "max":
            cpus = min(cpus, max(1, round(int(quota) / int(period))))
    return cpus


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
