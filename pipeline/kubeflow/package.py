"""Compiled pipelines, as kubeflow/runner.py writes them: name, tasks, parameters and root."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


class PackageError(ValueError):
    """A file is no compiled pipeline, or a parameter is none of its; the message says more."""


class Package:
    """A compiled pipeline.

    Args:
      path: What kubeflow/runner.py wrote.

    Raises:
      PackageError: It is no pipeline package.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = path.read_bytes()
            spec = next(iter(yaml.safe_load_all(content)))
            self.name: str = spec["pipelineInfo"]["name"]
            root = spec["root"]
            self.tasks: list[str] = list(root["dag"]["tasks"])
            self.root: str | None = spec.get("defaultPipelineRoot")
        except (OSError, yaml.YAMLError, StopIteration, KeyError, TypeError) as error:
            raise PackageError(
                f"{path} is no pipeline package ({type(error).__name__}: {error}): "
                "compile one with kubeflow/runner.py.",
            ) from error
        self.parameters: dict[str, Any] = root.get("inputDefinitions", {}).get("parameters", {})
        # Whether each run finds the same data in the cache, until it is given another fingerprint.
        example_gen = root["dag"]["tasks"].get("ExampleGen", {})
        cached = example_gen.get("cachingOptions", {}).get("enableCache", False)
        self.fixed_data: bool = cached and "data_fingerprint" in self.parameters
        # The same package is the same version, and uploaded once.
        self.version = hashlib.sha256(content).hexdigest()[:12]

    def arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        """Reads NAME=VALUE texts, by the types of the pipeline's parameters.

        Raises:
          PackageError: A parameter is unknown, has no such value, or has none at all.
        """
        values: dict[str, Any] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals or name not in self.parameters:
                known = ", ".join(sorted(self.parameters)) or "none"
                raise PackageError(
                    f"--param {text!r}: write NAME=VALUE; {self.path} has the parameters: {known}.",
                )
            kind = self.parameters[name].get("parameterType", "STRING")
            values[name] = _parse(name, value, kind)
        for name, definition in self.parameters.items():
            if name not in values and not (definition.keys() & {"defaultValue", "isOptional"}):
                raise PackageError(f"the pipeline wants a value: --param {name}=…")
        return values


def _parse(name: str, value: str, kind: str) -> Any:
    if kind == "STRING":
        return value
    wanted: dict[str, tuple[type, ...]] = {
        "NUMBER_INTEGER": (int,),
        "NUMBER_DOUBLE": (int, float),
        "BOOLEAN": (bool,),
        "LIST": (list,),
        "STRUCT": (dict,),
    }
    with contextlib.suppress(ValueError):
        parsed = json.loads(value)
        if isinstance(parsed, wanted[kind]) and (kind == "BOOLEAN" or not isinstance(parsed, bool)):
            return parsed
    raise PackageError(f"--param {name}={value}: it is to be a {kind}, as in JSON.")
