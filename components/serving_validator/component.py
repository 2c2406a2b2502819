"""ServingValidator: no push of a model that has not been served and queried."""

from __future__ import annotations

from pathlib import Path

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.types import component_spec, standard_artifacts, standard_component_specs

from components.code import CODE_KEY, fingerprint
from components.serving_validator import executor
from serving.server.config import read_batching


class ServingValidatorSpec(component_spec.ComponentSpec):
    """Specification of `ServingValidator`."""

    PARAMETERS = {
        executor.SPLIT_KEY: component_spec.ExecutionParameter(type=str),
        executor.BATCHING_KEY: component_spec.ExecutionParameter(type=str),
        CODE_KEY: component_spec.ExecutionParameter(type=str),
    }
    INPUTS = {
        standard_component_specs.MODEL_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Model
        ),
        standard_component_specs.EXAMPLES_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Examples
        ),
    }
    OUTPUTS = {
        standard_component_specs.BLESSING_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.InfraBlessing
        )
    }


class ServingValidator(base_component.BaseComponent):
    """Serves the exported model, queries it, and blesses it if the answers are right.

    In the place of TFX's InfraValidator, which needs Docker or Kubernetes to start a server with,
    and which Kubeflow Pipelines v2 cannot run. Give its output `blessing` to Pusher as
    `infra_blessing`, without a `model`: it holds the model with warm-up requests added.

    The server is `tensorflow_model_server` where it is on PATH, else the one in `serving/server`.
    """

    SPEC_CLASS = ServingValidatorSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)

    def __init__(
        self, model: types.BaseChannel, examples: types.BaseChannel, split: str, batching_file: str
    ):
        """Constructs the component.

        Args:
          model: Trainer's output.
          examples: ExampleGen's output.
          split: Which of them to query the model with.
          batching_file: TF Serving's batching parameters, with which the model is to be served:
            it is warmed up for the `allowed_batch_sizes`. Its settings are part of the cache key.

        Raises:
          serving.server.config.ConfigError: The file cannot be used.
        """
        read_batching(Path(batching_file))
        # Comments are for people, and not ASCII as pipelines' parameters better are.
        settings = "".join(
            line
            for line in Path(batching_file).read_text().splitlines(keepends=True)
            if not line.lstrip().startswith("#")
        )
        super().__init__(
            spec=ServingValidatorSpec(
                model=model,
                examples=examples,
                split=split,
                batching_parameters=settings,
                code=fingerprint(__package__, "serving"),
                blessing=types.Channel(type=standard_artifacts.InfraBlessing),
            )
        )
