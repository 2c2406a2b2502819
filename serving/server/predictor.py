"""Request to response, whatever protocol it came by."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grpc
import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
)

from serving.encoding import BYTES, INPUTS
from serving.server import tensors
from serving.server.errors import RequestError, deadline_exceeded, invalid_argument
from serving.server.images import ImageReader
from serving.server.manager import Manager
from serving.server.metrics import Metrics
from serving.server.servable import Arrays, Servable, Signature

_DEFAULT_SIGNATURE = "serving_default"
_SIGNATURE_DEF = "signature_def"


class Limits(NamedTuple):
    """What one request may take.

    Attributes:
      tensor_bytes: Of an input once it is unpacked.
      image_pixels: Of one encoded image.
    """

    tensor_bytes: int
    image_pixels: int


class Call(NamedTuple):
    """A request to a servable.

    Attributes:
      servable: Who answers.
      signature: One of the servable's.
      inputs: An array of its type for each input of the signature.
      outputs: Names of the requested outputs, in order.
      deadline: time.monotonic() after which nobody waits for the answer any more.
      is_wanted: Whether the client is still there.
    """

    servable: Servable
    signature: Signature
    inputs: Arrays
    outputs: tuple[str, ...]
    deadline: float = math.inf
    is_wanted: Callable[[], bool] = lambda: True

    def remaining_seconds(self) -> float:
        """Until the deadline.

        Raises:
          RequestError: CANCELLED, the client has gone.
        """
        if not self.is_wanted():
            raise RequestError(grpc.StatusCode.CANCELLED, "the client has gone")
        return self.deadline - time.monotonic()


def run(call: Call) -> Arrays:
    """Runs a call by itself.

    Raises:
      RequestError: The graph failed, or it is too late.
    """
    seconds = call.deadline - time.monotonic()
    if seconds <= 0:
        raise deadline_exceeded("the deadline passed before the request was run")
    return call.servable.run(call.signature, call.inputs, call.outputs, seconds)


class Predictor:
    """Answers the requests of both protocols."""

    def __init__(
        self,
        manager: Manager,
        limits: Limits,
        metrics: Metrics,
        run_call: Callable[[Call], Arrays] = run,
    ):
        """Sets up.

        Args:
          manager: Has the models.
          limits: Of requests.
          metrics: Counts.
          run_call: Runs a call, by itself or with others.
        """
        self.manager = manager
        self._limits = limits
        self._metrics = metrics
        self._run_call = run_call
        self._images = ImageReader(limits.image_pixels)

    def known_name(self, name: str) -> str:
        """The name of a model; empty if there is none of this name."""
        return name if self.manager.has_model(name) else ""

    def predict(
        self,
        request: predict_pb2.PredictRequest,
        deadline: float = math.inf,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> predict_pb2.PredictResponse:
        """Answers PredictionService.Predict.

        Args:
          request: From a client.
          deadline: See `Call`.
          is_wanted: See `Call`.

        Raises:
          RequestError: With TF Serving's code and message.
        """
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        with self.manager.servable(request.model_spec) as servable:
            call = self._parse(servable, request)._replace(deadline=deadline, is_wanted=is_wanted)
            return _response(call, self.run(call))

    def predict_on(
        self, servable: Servable, request: predict_pb2.PredictRequest
    ) -> predict_pb2.PredictResponse:
        """Answers from a servable that need not be available yet: for warm-up.

        Raises:
          RequestError: See `predict`.
        """
        call = self._parse(servable, request, max_repeated_bytes=self._limits.tensor_bytes)
        return _response(call, run(call))

    def _parse(
        self, servable: Servable, request: predict_pb2.PredictRequest, **limits: int
    ) -> Call:
        signature = find_signature(servable, request.model_spec.signature_name)
        outputs = _check_outputs(signature, request.output_filter)
        sent = request.inputs
        if sent.keys() != signature.inputs.keys():
            raise invalid_argument(_wrong_inputs(signature, sent))
        inputs = {}
        for index, (name, expected) in enumerate(signature.inputs.items()):
            proto = sent[name]
            if proto.dtype != expected.dtype:
                raise invalid_argument(
                    f"Expects arg[{index}] to be {tensors.type_name(expected.dtype)} but "
                    f"{tensors.type_name(proto.dtype)} is provided (input {name!r})"
                )
            inputs[name] = tensors.to_numpy(proto, name, self._limits.tensor_bytes, **limits)
        return Call(servable, signature, inputs, outputs)

    def run(self, call: Call) -> Arrays:
        """Runs a call whose arrays are of the signature's types.

        Raises:
          RequestError: Their shapes or what is in them do not fit, or the run failed.
        """
        is_empty = False
        for name, expected in call.signature.inputs.items():
            array = call.inputs[name]
            if not _fits(array.shape, expected.shape):
                raise invalid_argument(
                    f"input {name!r} has the shape {tensors.format_shape(array.shape)}, but the "
                    f"signature takes {tensors.format_shape(expected.shape)}"
                )
            is_empty |= array.shape[:1] == (0,)
        with contextlib.ExitStack() as stack:
            call = self._read_images(call, stack)
            stack.enter_context(self._metrics.time_run(call.servable.name))
            try:
                return self._run_call(call)
            except RequestError as error:
                if is_empty and error.code is grpc.StatusCode.INVALID_ARGUMENT:
                    raise invalid_argument(
                        f"the batch is empty, which this model does not take: {error.message}"
                    ) from None
                raise

    def _read_images(self, call: Call, stack: contextlib.ExitStack) -> Call:
        """Decodes images here, where the model is known; else bounds what the graph may decode."""
        size = call.servable.image_size
        if size is not None and call.signature.name == BYTES:
            name = INPUTS[BYTES]
            contents = call.inputs[name].tolist()
            encoded = np.empty(len(contents), np.object_)
            encoded[:] = self._images.read(
                name, contents, size, call.servable.resize, call.remaining_seconds
            )
            return call._replace(inputs={**call.inputs, name: encoded})
        for name, expected in call.signature.inputs.items():
            if expected.dtype == types_pb2.DT_STRING:
                stack.enter_context(self._images.admit(name, call.inputs[name].ravel().tolist()))
        return call

    def metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Answers PredictionService.GetModelMetadata.

        Raises:
          RequestError: With TF Serving's code and message.
        """
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        if not request.metadata_field:
            raise invalid_argument(
                "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in request.metadata_field:
            if field != _SIGNATURE_DEF:
                raise invalid_argument(f"Metadata field {field} is not supported")
        definitions = get_model_metadata_pb2.SignatureDefMap()
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self.manager.servable(request.model_spec) as servable:
            for name, signature in servable.signatures.items():
                definitions.signature_def[name].CopyFrom(signature.definition)
            response.model_spec.name = servable.name
            response.model_spec.version.value = servable.version
        response.metadata[_SIGNATURE_DEF].Pack(definitions)
        return response

    def status(
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Answers ModelService.GetModelStatus.

        Raises:
          RequestError: With TF Serving's code and message.
        """
        if not request.HasField("model_spec"):
            raise invalid_argument("Missing ModelSpec")
        response = get_model_status_pb2.GetModelStatusResponse()
        for version in self.manager.known_versions(request.model_spec):
            response.model_version_status.add(
                version=version.number,
                state=int(version.state),
                status={"error_code": version.code.value[0], "error_message": version.error},
            )
        return response


def find_signature(servable: Servable, name: str) -> Signature:
    """Finds a signature; an empty name means `serving_default`.

    Raises:
      RequestError: FAILED_PRECONDITION, there is none.
    """
    name = name or _DEFAULT_SIGNATURE
    signature = servable.signatures.get(name)
    if signature is None:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.'
        )
    return signature


def _check_outputs(signature: Signature, requested: Any) -> tuple[str, ...]:
    if not requested:
        return tuple(signature.outputs)
    for name in requested:
        if name not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {name} Outputs expected to be in "
                f"the set {{{','.join(signature.outputs)}}}."
            )
    names = tuple(sorted(set(requested)))
    if len(names) < len(requested):
        repeated = next(name for name in requested if list(requested).count(name) > 1)
        raise invalid_argument(f"duplicate output tensor alias: {repeated}")
    return names


def _wrong_inputs(signature: Signature, sent: Mapping[str, Any]) -> str:
    extra = sorted(sent.keys() - signature.inputs.keys())
    missing = sorted(signature.inputs.keys() - sent.keys())
    return (
        f"input size does not match signature: {len(sent)}!={len(signature.inputs)} "
        f"len({{{','.join(sorted(sent))}}}) != len({{{','.join(signature.inputs)}}}). "
        f"Sent extra: {{{','.join(extra)}}}. Missing but required: {{{','.join(missing)}}}."
    )


def _fits(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> bool:
    if expected is None:
        return True
    return len(shape) == len(expected) and all(
        wanted in (-1, size) for size, wanted in zip(shape, expected)
    )


def _response(call: Call, results: Arrays) -> predict_pb2.PredictResponse:
    response = predict_pb2.PredictResponse()
    spec = response.model_spec
    spec.name = call.servable.name
    spec.version.value = call.servable.version
    spec.signature_name = call.signature.name
    for name, array in results.items():
        tensors.fill_proto(response.outputs[name], array, call.signature.outputs[name].dtype)
    return response
