"""One loaded version of a model: its session, its signatures, its warm-up.

A session on the graph of the SavedModel, as in TF Serving: its errors are TF Serving's, only the
requested outputs are computed, and closing it gives the memory back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from serving.encoding import BYTES, IMAGES, INPUTS
from serving.images import resize_of
from serving.server import tensors
from serving.server.errors import CODES, RequestError, deadline_exceeded, invalid_argument

WARMUP_FILE = Path("assets.extra") / "tf_serving_warmup_requests"
_HEADINGS = ("Graph execution error:", "Detected at node")
_MAX_WARMUP_RECORDS = 1000  # TF Serving's limit

_MAX_SECONDS = 1e6  # Beyond them there is no deadline

Arrays = dict[str, np.ndarray]


class LoadError(RuntimeError):
    """A version folder that holds no model that can be served, or does not hold it yet."""


class Tensor(NamedTuple):
    """An input or output of a signature.

    Attributes:
      name: In the graph.
      dtype: A DataType.
      shape: Sizes, -1 where any; None for any rank.
    """

    name: str
    dtype: int
    shape: tuple[int, ...] | None


class Signature:
    """A signature of a model.

    Attributes:
      name: Its key.
      definition: The SignatureDef.
      inputs: By name, in the order of names.
      outputs: By name, in the order of names.
      is_batchable: Whether rows of several requests can be run as one: all inputs and outputs have
        a first dimension of any size.
    """

    def __init__(self, name: str, definition: Any):
        self.name = name
        self.definition = definition
        self.inputs = _tensors(definition.inputs)
        self.outputs = _tensors(definition.outputs)
        every = [*self.inputs.values(), *self.outputs.values()]
        self.is_batchable = bool(self.inputs) and all(
            tensor.shape is not None and tensor.shape[:1] == (-1,) for tensor in every
        )


def _tensors(infos: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        key: Tensor(infos[key].name, infos[key].dtype, tensors.to_shape(infos[key].tensor_shape))
        for key in sorted(infos)
    }


def _image_size(signatures: Mapping[str, Signature]) -> tuple[int, int] | None:
    images, encoded = (
        signatures[name].inputs.get(INPUTS[name]) if name in signatures else None
        for name in (IMAGES, BYTES)
    )
    if images is None or encoded is None or len(images.shape or ()) != 4 or encoded.shape != (-1,):
        return None
    _, height, width, _ = images.shape or ()
    return (height, width) if height > 0 and width > 0 else None


class Servable:
    """A model version in memory.

    Attributes:
      name: Of the model.
      version: Number.
      signatures: By key.
      image_size: Height and width of the images that the model takes; None: it is none of this
        pipeline's, whose `serving_bytes` the server decodes images for.
      resize: How it was trained to see images of other sizes.
    """

    def __init__(
        self, name: str, version: int, path: Path, tags: Sequence[str], session_config: Any = None
    ):
        """Loads a SavedModel.

        Args:
          name: Of the model.
          version: Number.
          path: Of the version's folder.
          tags: Of the meta graph.
          session_config: A tf.compat.v1.ConfigProto.

        Raises:
          LoadError: See there.
        """
        self.name = name
        self.version = version
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=session_config)
        try:
            with graph.as_default():
                loaded = tf.compat.v1.saved_model.load(self._session, list(tags), str(path))
            graph.finalize()
            self.signatures = {
                key: Signature(key, definition)
                for key, definition in loaded.signature_def.items()
                if key != "__saved_model_init_op"
            }
            self.image_size = _image_size(self.signatures)
            self.resize = resize_of(path)
        except Exception as error:
            # Whatever a damaged folder makes TensorFlow raise, the server has to outlive it.
            self._session.close()
            raise LoadError(f"{path} cannot be loaded: {first_line(error)}") from error

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        seconds: float = math.inf,
    ) -> Arrays:
        """Computes outputs of a signature.

        Args:
          signature: One of this servable's.
          inputs: An array for each input, of its type and shape.
          outputs: Names of those to compute.
          seconds: After which the run is given up.

        Returns:
          An array for each of the outputs.

        Raises:
          RequestError: The graph refused the values or failed.
        """
        feeds = {signature.inputs[key].name: array for key, array in inputs.items()}
        fetches = [signature.outputs[key].name for key in outputs]
        options = None
        if seconds < _MAX_SECONDS:
            options = tf.compat.v1.RunOptions(timeout_in_ms=max(1, int(1e3 * seconds)))
        try:
            results = self._session.run(fetches, feeds, options=options)
        except tf.errors.DeadlineExceededError:
            raise deadline_exceeded("the deadline passed while the model was running") from None
        except tf.errors.OpError as error:
            raise RequestError(CODES[error.error_code], error.message) from None
        except UnicodeDecodeError as error:
            # TensorFlow quotes what it refuses, and its Python knows no message but text.
            raise invalid_argument(error.object.decode(errors="backslashreplace")) from None
        return dict(zip(outputs, results))

    def warm_up(
        self, path: Path, predict: Callable[[Servable, Any], object], iterations: int = 1
    ) -> int:
        """Replays the requests that the model brings along, before anybody waits for an answer.

        Args:
          path: Of the version's folder.
          predict: Answers a PredictRequest from this servable.
          iterations: How often.

        Returns:
          The number of requests.

        Raises:
          LoadError: The file is damaged, or holds what cannot be replayed.
        """
        file = path / WARMUP_FILE
        if not file.is_file():
            return 0
        count = 0
        try:
            for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
                if count == _MAX_WARMUP_RECORDS:
                    raise LoadError(f"{file} has more than {_MAX_WARMUP_RECORDS} records")
                count += 1
                log = prediction_log_pb2.PredictionLog.FromString(record)
                if log.WhichOneof("log_type") != "predict_log":
                    raise LoadError(f"{file}: record {count} is no request to Predict")
                for _ in range(iterations):
                    predict(self, log.predict_log.request)
        except LoadError:
            raise
        except Exception as error:
            raise LoadError(f"{file}: warm-up failed: {first_line(error)}") from error
        return count

    def close(self) -> None:
        """Frees the model; no `run` may be in progress."""
        self._session.close()
        self.signatures = {}


def first_line(error: BaseException) -> str:
    """What an error says, without the headings and stack traces that TensorFlow puts around it."""
    text = str(error)
    lines = (line.strip() for line in text.splitlines())
    cause = next((line for line in lines if line and not line.startswith(_HEADINGS)), "")
    damaged = "its variables cannot be read: " if "node RestoreV2" in text else ""
    return damaged + (cause or type(error).__name__)
