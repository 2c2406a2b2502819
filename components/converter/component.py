"""Converter: the trained model in other formats, each compared with the SavedModel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.types import component_spec, standard_artifacts, standard_component_specs

from components.converter import executor

# Their versions count as code; those of ONNX where they are installed.
_LIBRARIES = ("tensorflow", "ai-edge-litert", "tf2onnx", "onnx")


class ConverterSpec(component_spec.ComponentSpec):
    """Specification of `Converter`."""

    PARAMETERS = {
        executor.FORMATS_KEY: component_spec.ExecutionParameter(type=str),
        executor.SPLIT_KEY: component_spec.ExecutionParameter(type=str),
        executor.REPRESENTATIVE_SPLIT_KEY: component_spec.ExecutionParameter(type=str),
        executor.CODE_KEY: component_spec.ExecutionParameter(type=str),
    }
    INPUTS = {
        standard_component_specs.MODEL_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Model
        ),
        standard_component_specs.EXAMPLES_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Examples
        ),
    }
    OUTPUTS = {executor.EXPORTS_KEY: component_spec.ChannelParameter(type=standard_artifacts.Model)}


class Converter(base_component.BaseComponent):
    """Converts the exported model to TFLite and ONNX.

    All files take uint8 pixels and return probabilities, as the SavedModel's `serving_default`
    does. The output `exports` holds them with `labels.txt` and `report.json`: their sizes, speed,
    and for how many of 1,000 test images they name the class that the SavedModel does. What agrees
    too little is not in it, and the report says so. Give it to AtomicPusher as `exports`.
    """

    SPEC_CLASS = ConverterSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)

    def __init__(
        self,
        model: types.BaseChannel,
        examples: types.BaseChannel,
        *,
        formats: Sequence[str],
        split: str,
        representative_split: str,
    ):
        """Constructs the component.

        Args:
          model: Trainer's output.
          examples: ExampleGen's output.
          formats: Of `components.converter.formats.FORMATS`.
          split: Of the examples, to compare on.
          representative_split: Of the examples, from which int8 takes the activations' ranges.
        """
        super().__init__(
            spec=ConverterSpec(
                model=model,
                examples=examples,
                formats=",".join(formats),
                split=split,
                representative_split=representative_split,
                code=_code(),
                exports=types.Channel(type=standard_artifacts.Model),
            )
        )


def _code() -> str:
    """Identifies the code that converts, for the cache key."""
    digest = hashlib.sha256()
    for package in _LIBRARIES:
        try:
            digest.update(f"{package} {metadata.version(package)}\0".encode())
        except metadata.PackageNotFoundError:
            continue
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
