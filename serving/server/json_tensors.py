"""TF Serving's JSON forms of tensors: rows of `instances`, columns of `inputs`.

See https://www.tensorflow.org/tfx/serving/api_rest.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

from serving.server import tensors
from serving.server.errors import RequestError, invalid_argument
from serving.server.servable import Arrays, Signature, Tensor

_BASE64 = "b64"
# The end of the name of an output whose strings are bytes, not text.
_BYTES_SUFFIX = "_bytes"
_SHOWN = 80


def parse(body: bytes) -> dict[str, Any]:
    """Parses the body of a request to predict.

    Raises:
      RequestError: It is not a JSON object, or asks for what is not a string as signature.
    """
    if not body:
        raise invalid_argument("JSON Parse error: The document is empty")
    try:
        document = json.loads(body)
    except RecursionError:
        raise invalid_argument("JSON Parse error: nested too deeply") from None
    except ValueError as error:  # Also text that is not UTF-8, and numbers of thousands of digits
        raise invalid_argument(f"JSON Parse error: {error}") from None
    if not isinstance(document, dict):
        raise invalid_argument(f"JSON Value: {_show(document)} Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise invalid_argument(
            f"JSON Value: {_show(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return document


def to_arrays(document: Mapping[str, Any], signature: Signature) -> Arrays:
    """Reads the inputs of a request.

    Args:
      document: See `parse`.
      signature: Gives names and types.

    Returns:
      An array for each input.

    Raises:
      RequestError: INVALID_ARGUMENT, they do not fit.
    """
    if ("instances" in document) == ("inputs" in document):
        raise invalid_argument(
            "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist"
            if "inputs" in document
            else "Missing 'inputs' or 'instances' key"
        )
    if "inputs" in document:
        columns = document["inputs"]
        single = len(signature.inputs) == 1
        if not isinstance(columns, dict) or (single and _is_base64(columns)):
            if not single:
                raise invalid_argument(
                    "inputs is a plain value/list, but expecting an object as multiple input "
                    "tensors required as per tensorinfo_map"
                )
            columns = dict.fromkeys(signature.inputs, columns)
    else:
        columns = _columns(document["instances"], signature)
    for name in signature.inputs:
        if name not in columns:
            raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
    for name in columns:
        if name not in signature.inputs:
            raise invalid_argument(f"JSON object: does not have named input: {name}")
    return {name: _array(name, columns[name], t) for name, t in signature.inputs.items()}


def _columns(instances: Any, signature: Signature) -> dict[str, list[Any]]:
    if not isinstance(instances, list):
        raise invalid_argument("Expecting 'instances' to be an list/array")
    if not instances:
        raise invalid_argument("No values in 'instances' array")
    named = isinstance(instances[0], dict) and not _is_base64(instances[0])
    if not named and len(signature.inputs) != 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    if not named:
        return dict.fromkeys(signature.inputs, instances)
    for index, item in enumerate(instances):
        if not isinstance(item, dict):
            raise invalid_argument(f"Expecting object but got list at item {index} of input list")
        if item.keys() != signature.inputs.keys():
            raise invalid_argument(
                f"Failed to process element: {index} of 'instances' list. JSON object: "
                f"{_show(item)} keys must be equal to: {','.join(signature.inputs)}"
            )
    return {name: [item[name] for item in instances] for name in signature.inputs}


def _array(name: str, value: Any, tensor: Tensor) -> np.ndarray:
    if not tensors.is_supported(tensor.dtype):
        raise invalid_argument(
            f"input {name!r}: tensors of {tensors.type_name(tensor.dtype)} cannot be read"
        )
    if tensor.dtype == types_pb2.DT_STRING:
        try:
            array = np.array(_decode(value), np.object_)
        except (ValueError, RecursionError):
            raise _wrong_shape(name) from None
        if any(not isinstance(item, bytes) for item in array.ravel()):
            raise _wrong_shape(name)
        return array
    dtype = tf.dtypes.as_dtype(tensor.dtype).as_numpy_dtype
    try:
        array = np.array(value)
    except (ValueError, RecursionError, OverflowError):
        raise _wrong_shape(name) from None
    kinds = "b" if tensor.dtype == types_pb2.DT_BOOL else "iu"
    if np.issubdtype(dtype, np.floating):
        kinds = "iuf"
    if array.size and array.dtype.kind not in kinds:
        raise _wrong_type(value, tensor.dtype)
    if array.size and "f" not in kinds and "b" not in kinds:
        bounds = np.iinfo(dtype)
        if not bounds.min <= int(array.min()) <= int(array.max()) <= bounds.max:
            raise _wrong_type(value, tensor.dtype)
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if not _is_base64(value):
        raise _wrong_type(value, types_pb2.DT_STRING)
    try:
        return base64.b64decode(value[_BASE64], validate=True)
    except (binascii.Error, ValueError):
        raise invalid_argument("Unable to base64 decode") from None


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get(_BASE64), str)


def _wrong_shape(name: str) -> RequestError:
    return invalid_argument(f"input {name!r}: Encountered list at unexpected size: rows differ")


def _wrong_type(value: Any, dtype: int) -> RequestError:
    return invalid_argument(
        f"JSON Value: {_show(value)} is not of expected type: {tensors.type_name(dtype)}"
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def to_json(results: Arrays, signature: Signature, by_row: bool) -> bytes:
    """Writes the answer to a request to predict.

    Args:
      results: From the signature.
      signature: Gives types.
      by_row: Whether the request had `instances`: then the answer is a list, too.

    Raises:
      RequestError: INVALID_ARGUMENT, there are no rows in these outputs.
    """
    values = {name: _plain(array, name.endswith(_BYTES_SUFFIX)) for name, array in results.items()}
    if not by_row:
        outputs = next(iter(values.values())) if len(values) == 1 else values
        return json.dumps({"outputs": outputs}, indent=1).encode()
    sizes = {name: len(array) if array.ndim else None for name, array in results.items()}
    if None in sizes.values() or len(set(sizes.values())) != 1:
        raise invalid_argument(
            f"outputs have inconsistent batch sizes, ask for them by 'inputs': {sizes}"
        )
    rows: Sequence[Any] = [dict(zip(values, row)) for row in zip(*values.values())]
    if len(values) == 1:
        rows = next(iter(values.values()))
    return json.dumps({"predictions": rows}, indent=1).encode()


def _plain(array: np.ndarray, as_bytes: bool) -> Any:
    """Nested lists of what JSON has."""
    if array.dtype == np.object_:
        flat = [
            {_BASE64: base64.b64encode(item).decode()}
            if as_bytes
            else item.decode("utf-8", "replace")
            for item in array.ravel()
        ]
    elif array.dtype.kind == "f":
        # The shortest digits that give the same float32 back, not those of its float64.
        flat = [float(text) for text in array.ravel().astype(str)]
    else:
        return array.tolist()
    nested = np.empty(array.size, np.object_)
    nested[:] = flat
    return nested.reshape(array.shape).tolist()
