"""JSON of a request to predict and of its answer, for the signatures of a model."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from serving.server import tensors
from serving.server.errors import invalid_argument
from serving.server.json_input import BASE64, Kind, Signatures
from serving.server.servable import Arrays, Servable, Signature

# The end of the name of an output whose strings are bytes, not text.
_BYTES_SUFFIX = "_bytes"


def signatures(servable: Servable) -> Signatures:
    """What `json_input.parse` has to know of a model."""
    return {
        name: {key: _kind(tensor.dtype) for key, tensor in signature.inputs.items()}
        for name, signature in servable.signatures.items()
    }


def _kind(dtype: int) -> Kind:
    name = tensors.type_name(dtype)
    if not tensors.is_supported(dtype):
        return Kind("", name)
    return Kind(np.dtype(tf.dtypes.as_dtype(dtype).as_numpy_dtype).name, name)


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
            {BASE64: base64.b64encode(item).decode()}
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
