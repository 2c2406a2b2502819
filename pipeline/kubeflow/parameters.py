"""The compiled pipeline's parameters: what a run can set without the pipeline being compiled anew.

Like `pipeline.kubeflow.spec`, on plain dictionaries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.gate import METRICS, PRESET_CLASSES, GateMetric
from pipeline.kubeflow.config import KubeflowConfig
from trainer.preset import Preset

_TYPES = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE"}


@dataclass(frozen=True)
class Place:
    """Where a parameter's value is in the compiled graph.

    Attributes:
      task: The component.
      key: Its execution property.
      path: Where in the property, if that is JSON: keys, indices, and metrics of a list of them.
      negative: Whether the property has the value with the opposite sign.
    """

    task: str
    key: str
    path: tuple[str | int | GateMetric, ...] = ()
    negative: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter that each run of the pipeline can set.

    Attributes:
      name: Its name.
      default: Its value unless a run sets it; a type if each run must set it.
      description: For people.
      places: What it replaces.
    """

    name: str
    default: str | int | float | type
    description: str
    places: Sequence[Place]

    @property
    def kind(self) -> str:
        """Its type, as pipelines have it."""
        return _TYPES[self.default if isinstance(self.default, type) else type(self.default)]

    @property
    def placeholder(self) -> str:
        """What Kubeflow Pipelines replaces by the value, inside of other parameters' values."""
        return f"{{{{$.inputs.parameters['{self.name}']}}}}"


def add_parameters(spec: dict[str, Any], parameters: Iterable[Parameter]) -> None:
    """Turns values of a compiled graph into parameters of the pipeline, with these as defaults.

    TFX can make a runtime parameter of a whole execution property only, whose default is lost.
    Here it may be a part of one, as the number of epochs is in Trainer's `custom_config`: the
    property then holds a placeholder, as kfp's own compiler writes it for Python's f-strings.

    Args:
      spec: The pipeline's specification; changed in place.
      parameters: What to make parameters of.

    Raises:
      KeyError: The graph has no such place.
    """
    root = spec["root"].setdefault("inputDefinitions", {}).setdefault("parameters", {})
    documents: dict[tuple[str, str], Any] = {}
    values: dict[str, str] = {}  # by what stands for them in the documents
    for parameter in parameters:
        root[parameter.name] = {
            "parameterType": parameter.kind,
            "description": parameter.description,
        }
        if not isinstance(parameter.default, type):
            root[parameter.name] |= {"defaultValue": parameter.default, "isOptional": True}
        for place in parameter.places:
            task = spec["root"]["dag"]["tasks"][place.task]
            inputs = task["inputs"]["parameters"]
            name = parameter.name if place.path else place.key
            component = spec["components"][task["componentRef"]["name"]]
            component["inputDefinitions"]["parameters"][name] = {"parameterType": parameter.kind}
            if place.path:
                at = place.task, place.key
                if at not in documents:
                    documents[at] = json.loads(inputs[place.key]["runtimeValue"]["constant"])
                marker = f"<{'-' * place.negative}{parameter.name}>"
                values[json.dumps(marker)] = _json_value(parameter, place)
                _replace(documents[at], place.path, marker)
            inputs[name] = {"componentInputParameter": parameter.name}
    for (name, key), document in documents.items():
        text = json.dumps(document, sort_keys=True)
        for marker, value in values.items():
            text = text.replace(marker, value)
        spec["root"]["dag"]["tasks"][name]["inputs"]["parameters"][key] = {
            "runtimeValue": {"constant": text}
        }


def _json_value(parameter: Parameter, place: Place) -> str:
    if parameter.kind == "STRING":
        return json.dumps(parameter.placeholder)
    return "-" * place.negative + parameter.placeholder  # a number: without quotes


def _replace(document: Any, path: Sequence[str | int | GateMetric], value: str) -> None:
    for step in path[:-1]:
        document = _of(document, step) if isinstance(step, GateMetric) else document[step]
    if isinstance(document, dict) and path[-1] not in document:
        raise KeyError(path[-1])
    document[path[-1]] = value


def _of(metrics: Sequence[dict[str, Any]], wanted: GateMetric) -> dict[str, Any]:
    """A metric of an EvalConfig, by its name: their order means nothing."""
    for metric in metrics:
        if json.loads(metric.get("config", "{}")).get("name") == wanted.name:
            return metric
    raise KeyError(wanted.name)


def pipeline_parameters(
    config: KubeflowConfig,
    preset: Preset,
    serving_dir: str,
    fingerprint: str | None,
    classes: int = PRESET_CLASSES,
) -> list[Parameter]:
    """Lists the parameters, with a configuration's values as defaults.

    Args:
      config: What is compiled.
      preset: Its preset, with all that overrides it.
      serving_dir: TF Serving's model base path.
      fingerprint: Of the data; None where each run has to give it.
      classes: Of the data, as far as it is known.
    """

    trained_in = ("Trainer", "Tuner") if config.tune else ("Trainer",)

    def training(name: str) -> list[Place]:
        return [Place(component, "custom_config", (name,)) for component in trained_in]

    base_model = [Place("BaseModel", "serving_dir")] if config.warm_start else []

    floors, settings = config.resolve_gate(preset, classes).floors, preset.training

    def threshold(metric: GateMetric, *path: str, negative: bool = False) -> Place:
        where = ("metrics_specs", 0, "metrics", metric, "per_slice_thresholds", 0, "threshold")
        return Place("Evaluator", "eval_config", (*where, *path), negative)

    lower_bound = ("value_threshold", "lower_bound")
    drop = ("change_threshold", "absolute")
    return [
        Parameter("data", config.data, "folder of the data", [Place("ExampleGen", "input_base")]),
        Parameter(
            "dataset_name",
            config.dataset_name,
            "name of the data, for the model and its card",
            [Place("ExampleGen", "dataset_name")],
        ),
        Parameter(
            "data_fingerprint",
            str if fingerprint is None else fingerprint,
            "identifies the data's contents; other data, other fingerprint",
            [Place("ExampleGen", "content_fingerprint")],
        ),
        Parameter(
            "limit",
            config.limit or 0,
            "use at most so many images of each split; 0: all",
            [Place("ExampleGen", "limit")],
        ),
        Parameter(
            "serving_dir",
            serving_dir,
            "model base path to push to",
            [
                *base_model,
                # For the entry point alone, which sees before the training whether Pusher will be
                # able to write there.
                *(Place(component, "serving_dir") for component in trained_in),
                Place("Baseline", "serving_dir"),
                Place("Pusher", "push_destination", ("filesystem", "base_directory")),
            ],
        ),
        Parameter(
            "checkpoint_dir",
            config.checkpoint_dir,
            "folder of interrupted trainings' checkpoints",
            training("checkpoint_dir"),
        ),
        Parameter(
            "preset",
            preset.name,
            "the model; the parameters below do not follow it by themselves",
            training("preset"),
        ),
        Parameter("epochs", settings.epochs, "passes over the data", training("epochs")),
        Parameter(
            "train_minutes",
            float(settings.train_minutes),
            "train for so long rather than for epochs; 0: for epochs",
            training("train_minutes"),
        ),
        Parameter("batch_size", settings.batch_size, "images a step", training("batch_size")),
        Parameter(
            "learning_rate", float(settings.learning_rate), "its peak", training("learning_rate")
        ),
        Parameter(
            "weight_decay", float(settings.weight_decay), "decoupled", training("weight_decay")
        ),
        Parameter("engine", config.engine, "auto, tensorflow or jax", training("engine")),
        Parameter("seed", config.seed, "of everything random", training("seed")),
        *(
            Parameter(
                metric.flag,
                float(floors[metric.name]),
                f"push only if {metric.label} is at least this, 0 to 1",
                [threshold(metric, *lower_bound)],
            )
            for metric in METRICS
        ),
        Parameter(
            "max_accuracy_drop",
            float(config.max_accuracy_drop),
            "how far each may fall below the model pushed last, 0 to 1; 2: one standard error",
            [threshold(metric, *drop, negative=True) for metric in METRICS if metric.compared],
        ),
    ]
