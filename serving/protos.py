"""TF Serving's protos and stubs, without waiting for TensorFlow.

The messages of `tensorflow_serving.apis` refer to those in `tensorflow.core`, and importing
anything below `tensorflow` runs all of TensorFlow first: seconds and 600 MB, for a client that
sends bytes. The message modules need none of it, so they are imported with an empty stand-in for
the package, which is taken away afterwards: a later `import tensorflow` gets the real one, with the
same message classes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _stand_in(package: str) -> Iterator[None]:
    """Makes submodules importable without running their package, unless it has run already."""
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None:
        yield
        return
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations or [])
    module.__spec__ = spec
    sys.modules[package] = module
    try:
        yield
    finally:
        del sys.modules[package]


def _import_all(*names: str) -> list[Any]:
    return [importlib.import_module(name) for name in names]


with _stand_in("tensorflow"):
    (
        predict_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        prediction_log_pb2,
        prediction_service_pb2_grpc,
        model_service_pb2_grpc,
        tensor_pb2,
        types_pb2,
        example_pb2,
    ) = _import_all(
        "tensorflow_serving.apis.predict_pb2",
        "tensorflow_serving.apis.get_model_metadata_pb2",
        "tensorflow_serving.apis.get_model_status_pb2",
        "tensorflow_serving.apis.prediction_log_pb2",
        "tensorflow_serving.apis.prediction_service_pb2_grpc",
        "tensorflow_serving.apis.model_service_pb2_grpc",
        "tensorflow.core.framework.tensor_pb2",
        "tensorflow.core.framework.types_pb2",
        "tensorflow.core.example.example_pb2",
    )
