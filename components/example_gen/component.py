"""ImageExampleGen: a TFX ExampleGen for every kind of source that `dataset.source` opens."""

from __future__ import annotations

from tfx import types
from tfx.dsl.components.base import base_beam_component, executor_spec
from tfx.types import component_spec, standard_artifacts, standard_component_specs

from components.code import CODE_KEY, fingerprint
from components.example_gen import executor
from dataset.interface import Options


class ImageExampleGenSpec(component_spec.ComponentSpec):
    """Specification of `ImageExampleGen`."""

    PARAMETERS = {
        standard_component_specs.INPUT_BASE_KEY: component_spec.ExecutionParameter(type=str),
        executor.DATASET_NAME_KEY: component_spec.ExecutionParameter(type=str),
        executor.FINGERPRINT_KEY: component_spec.ExecutionParameter(type=str),
        executor.LIMIT_KEY: component_spec.ExecutionParameter(type=int, optional=True),
        executor.OPTIONS_KEY: component_spec.ExecutionParameter(type=str),
        CODE_KEY: component_spec.ExecutionParameter(type=str),
    }
    INPUTS: dict[str, component_spec.ChannelParameter] = {}
    OUTPUTS = {
        standard_component_specs.EXAMPLES_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Examples
        )
    }


class ImageExampleGen(base_beam_component.BaseBeamComponent):
    """Ingests a data set into the splits train, validation and test.

    Each tf.Example holds `image` (raw bytes: uint8, rows x columns x RGB, of the card's size),
    `label` and, where there are some, `superclass`. The data card is written beside the splits, in
    dataset.json, and what could not be read in unreadable.json.

    The fingerprint of the data is an execution property computed by whoever submits the pipeline:
    it is part of the cache key also where drivers do not run, and it changes when and only when the
    contents do.
    """

    SPEC_CLASS = ImageExampleGenSpec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(executor.Executor)

    def __init__(
        self,
        input_base: str,
        *,
        dataset_name: str,
        content_fingerprint: str,
        limit: int | None = None,
        options: Options | None = None,
    ):
        """Constructs the component.

        Args:
          input_base: What `dataset.source.open_source` opens, where the component runs.
          dataset_name: Travels with the data into the model.
          content_fingerprint: Identifies the contents.
          limit: Keep at most so many examples of each split, class-balanced. None or 0 keeps all.
          options: The rest of what decides about the examples; its own limit is not looked at.
        """
        super().__init__(
            spec=ImageExampleGenSpec(
                input_base=input_base,
                examples=types.Channel(type=standard_artifacts.Examples),
                **{
                    executor.DATASET_NAME_KEY: dataset_name,
                    executor.FINGERPRINT_KEY: content_fingerprint,
                    executor.LIMIT_KEY: limit,
                    executor.OPTIONS_KEY: executor.without_limit(options or Options()).to_json(),
                    CODE_KEY: fingerprint(__package__, "dataset"),
                },
            )
        )
