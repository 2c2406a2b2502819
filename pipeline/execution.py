"""Builds the pipeline from its configuration and runs it on this machine, with TFX."""

from __future__ import annotations

import datetime
import errno
import os
import shutil
import traceback

from ml_metadata.proto import metadata_store_pb2
from tfx.dsl.compiler import constants
from tfx.orchestration import metadata
from tfx.orchestration import pipeline as tfx_pipeline
from tfx.orchestration.local.local_dag_runner import LocalDagRunner
from tfx.orchestration.portable import runtime_parameter_utils
from tfx.proto.orchestration import pipeline_pb2

from dataset.locate import Dataset
from pipeline import console, graph, leftovers, summary
from pipeline.config import PipelineConfig
from pipeline.interruption import interruptible
from pipeline.run_history import RunHistory
from pipeline.run_lock import exclusive_run
from trainer.preset import Preset

ERROR_FILE = "error.log"


class PipelineFailedError(RuntimeError):
    """A component failed; the message says which and why."""


def build_pipeline(
    config: PipelineConfig, dataset: Dataset, preset: Preset
) -> tfx_pipeline.Pipeline:
    """Translates a configuration into the pipeline's graph, to be run on this machine.

    Args:
      config: With absolute paths.
      dataset: The data to run on.
      preset: The configuration's preset with all that overrides it.
    """
    return translate(
        config,
        graph.DataSource(
            folder=dataset.location,
            name=dataset.name,
            fingerprint=dataset.fingerprint,
            limit=config.limit,
            options=config.source_options(preset.image_size, dataset.card),
            classes=dataset.card.num_classes,
        ),
        preset,
        serving_dir=config.model_dir(dataset.name, subset=dataset.subset),
        metadata_connection_config=(
            metadata.sqlite_metadata_connection_config(config.metadata_path)
        ),
    )


def translate(
    config: PipelineConfig,
    data: graph.DataSource,
    preset: Preset,
    serving_dir: str,
    metadata_connection_config: metadata_store_pb2.ConnectionConfig | None = None,
) -> tfx_pipeline.Pipeline:
    """Translates a configuration into the pipeline's graph, wherever it is to run.

    Args:
      config: The run's configuration.
      data: The data to run on.
      preset: The configuration's preset with all that overrides it.
      serving_dir: TF Serving's model base path.
      metadata_connection_config: ML Metadata's database; None where the orchestrator has its own.
    """
    return graph.create_pipeline(
        pipeline_name=config.pipeline_name,
        pipeline_root=config.pipeline_root,
        data=data,
        preset=preset,
        engine=config.engine,
        seed=config.seed,
        gate=config.resolve_gate(preset, data.classes),
        serving_dir=serving_dir,
        checkpoint_dir=config.checkpoint_dir,
        tuning=graph.Tuning(config.tune, config.tune_fraction) if config.tune else None,
        warm_start=config.warm_start,
        exports=config.export_formats,
        enable_cache=config.cache,
        metadata_connection_config=metadata_connection_config,
        beam_pipeline_args=beam_arguments(config.beam_workers),
    )


def beam_arguments(workers: int) -> list[str]:
    """Chooses Beam's flags for one machine.

    Args:
      workers: Processes; 0 for one a core.
    """
    mode = "in_memory" if workers == 1 else "multi_processing"
    return [f"--direct_running_mode={mode}", f"--direct_num_workers={workers}"]


class Runner(LocalDagRunner):
    """TFX's local runner that shows its progress and sums up, one run at a time.

    TFX's command line replaces `LocalDagRunner.run` while it creates or compiles a pipeline; what
    is done for a real run only is therefore in `run_with_ir`, which `run` calls.

    Args:
      config: The run's configuration.
    """

    def __init__(self, config: PipelineConfig):
        super().__init__()
        self._config = config

    def run_with_ir(
        self,
        pipeline: pipeline_pb2.Pipeline,
        run_options: pipeline_pb2.RunOptions | None = None,
    ) -> None:
        """Runs a compiled pipeline and prints the summary.

        Args:
          pipeline: The compiled pipeline.
          run_options: For partial runs; see base class.

        Raises:
          PipelineBusyError: It is being run by another process.
          MetadataError: ML Metadata's database cannot be used.
          KeyboardInterrupt: The run was interrupted, whatever became of that on its way.
          PipelineFailedError: A component failed; the traceback is in the file named.
        """
        root = self._config.pipeline_root
        run_id = datetime.datetime.now().isoformat()
        # The base class would do it, too, but then nobody knew the run's name while it runs.
        runtime_parameter_utils.substitute_runtime_parameter(
            pipeline, {constants.PIPELINE_RUN_ID_PARAMETER_NAME: run_id}
        )
        with exclusive_run(root, run_id), leftovers.temporary_folder(root):
            RunHistory(root).clean_up()
            progress = console.follow(self._config.verbosity, len(pipeline.nodes))
            try:
                with interruptible():
                    super().run_with_ir(pipeline, run_options)
            except KeyboardInterrupt:
                RunHistory(root).interrupt(run_id)
                raise
            except Exception as error:
                where = _write_traceback(error, os.path.join(root, ERROR_FILE))
                raise PipelineFailedError(
                    f"{progress.running or 'the pipeline'} failed: {_describe(error, root)}\n"
                    f"({where})"
                ) from error
            finally:
                progress.stop()
        try:
            print(summary.summarize(RunHistory(root).run(run_id)))
        except summary.NoOutputError as error:  # a part of the pipeline was run
            print(f"finished; there is no summary, as {error}")


def _write_traceback(error: Exception, path: str) -> str:
    """Writes it, if the disk can take it; says where it is."""
    try:
        with open(path, "w") as file:
            traceback.print_exception(error, file=file)
    except OSError as failure:
        return f"the traceback could not be written to {path}: {failure.strerror}"
    return f"the traceback is in {path}"


def _describe(error: Exception, root: str) -> str:
    # Our own errors explain themselves; others need their type to be understood. On a full disk,
    # TFX cannot write down either that a component failed: what it failed of comes before that.
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause:
        if type(cause).__module__.partition(".")[0] in (
            "components",
            "dataset",
            "trainer",
            "pipeline",
        ):
            return str(cause)
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(_is_disk_full(cause) for cause in causes):
        files = [str(name) for cause in causes if (name := getattr(cause, "filename", None))]
        free = shutil.disk_usage(root).free
        return (
            f"the disk is full while {files[-1] if files else root} is written ({free / 1e6:,.0f} "
            f"MB are free in {root}). Free space there or choose another --work_dir, and give the "
            "same command again: it goes on from the last finished component."
        )
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _is_disk_full(error: BaseException) -> bool:
    """Whether Python, sqlite or TensorFlow say that there is no space."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or any(
        words in str(error) for words in ("disk is full", os.strerror(errno.ENOSPC))
    )
