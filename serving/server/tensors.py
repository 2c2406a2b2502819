"""TensorProto to NumPy and back, trusting no field of what a client sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

from serving.server.errors import invalid_argument

# The field that holds the values of a type where tensor_content is empty (tensor.proto).
_VALUE_FIELDS = {
    types_pb2.DT_FLOAT: "float_val",
    types_pb2.DT_DOUBLE: "double_val",
    types_pb2.DT_INT8: "int_val",
    types_pb2.DT_UINT8: "int_val",
    types_pb2.DT_INT16: "int_val",
    types_pb2.DT_UINT16: "int_val",
    types_pb2.DT_INT32: "int_val",
    types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_INT64: "int64_val",
    types_pb2.DT_UINT64: "uint64_val",
    types_pb2.DT_BOOL: "bool_val",
}
_NUMPY_TYPES = {dtype: tf.dtypes.as_dtype(dtype).as_numpy_dtype for dtype in _VALUE_FIELDS}
_NUMPY_TYPES[types_pb2.DT_STRING] = np.object_

_MAX_RANK = 32  # NumPy's limit before 2.0
_MAX_ELEMENTS = 1 << 48
# What few values may be repeated to: a request of 42 bytes can ask for 64 MB of them.
_REPEATED_BYTES = 1 << 20
# So many values at a time become Python objects, with the interpreter locked.
_STEP = 1 << 16


def type_name(dtype: int) -> str:
    """The name of a DataType as TensorFlow's messages have it, such as `uint8`."""
    try:
        return types_pb2.DataType.Name(dtype).removeprefix("DT_").lower()
    except ValueError:
        return f"unknown type {dtype}"


def is_supported(dtype: int) -> bool:
    """Whether tensors of a DataType can be sent to this server."""
    return dtype in _NUMPY_TYPES


def format_shape(shape: Sequence[int] | None) -> str:
    """A shape as TensorFlow's messages have it: `[-1,32,32,3]`."""
    return "unknown" if shape is None else f"[{','.join(map(str, shape))}]"


def to_numpy(
    proto: tensor_pb2.TensorProto,
    name: str,
    max_bytes: int,
    max_repeated_bytes: int = _REPEATED_BYTES,
) -> np.ndarray:
    """Reads a tensor.

    Args:
      proto: From a client. Its values are in `tensor_content` or in the field of its type, where,
        as in TensorFlow, the last value stands for all that are missing.
      name: Of the input, for messages.
      max_bytes: What the tensor may take in memory.
      max_repeated_bytes: What it may take where values are missing that the last one stands for.

    Returns:
      An array of the shape that the proto gives, not writable where it is numeric content.

    Raises:
      RequestError: INVALID_ARGUMENT, the tensor is not one.
    """
    dtype = proto.dtype
    numpy_type = _NUMPY_TYPES.get(dtype)
    if numpy_type is None:
        raise invalid_argument(
            f"tensor parsing error: {name}: tensors of {type_name(dtype)} cannot be read"
        )
    shape = _shape(proto, name)
    count = math.prod(shape)
    if dtype == types_pb2.DT_STRING:
        return _strings(proto, shape, count, name)
    itemsize = np.dtype(numpy_type).itemsize
    content = proto.tensor_content
    if content:
        if len(content) != count * itemsize:
            raise invalid_argument(
                f"tensor parsing error: {name}: {len(content)} bytes of content for the shape "
                f"{format_shape(shape)} of {type_name(dtype)}, which takes {count * itemsize}"
            )
        array = np.frombuffer(content, numpy_type)
        if dtype == types_pb2.DT_BOOL:
            # Any other byte would be neither true nor false to the kernels.
            array = array.view(np.uint8) != 0
        return array.reshape(shape)
    values = getattr(proto, _VALUE_FIELDS[dtype])
    is_repeated = len(values) < count
    allowed = min(max_bytes, max_repeated_bytes) if is_repeated else max_bytes
    if count * itemsize > allowed:
        raise invalid_argument(
            f"tensor parsing error: {name}: the shape {format_shape(shape)} of {type_name(dtype)} "
            f"takes {count * itemsize} bytes, more than the {allowed} that are allowed"
            + (f" for {len(values)} values, of which the last is repeated" if is_repeated else "")
        )
    if len(values) > count:
        raise _too_many(name, len(values), shape)
    if not values:
        return np.zeros(shape, numpy_type)
    array = np.empty(count, numpy_type)
    for begin in range(0, len(values), _STEP):
        step = np.array(values[begin : begin + _STEP])
        array[begin : begin + len(step)] = step.astype(numpy_type)
    array[len(values) :] = array[len(values) - 1]
    return array.reshape(shape)


def _shape(proto: tensor_pb2.TensorProto, name: str) -> tuple[int, ...]:
    shape = proto.tensor_shape
    sizes = tuple([dim.size for dim in shape.dim])
    if shape.unknown_rank or len(sizes) > _MAX_RANK or (sizes and min(sizes) < 0):
        raise invalid_argument(
            f"tensor parsing error: {name}: "
            + (
                "the shape is unknown"
                if shape.unknown_rank
                else f"{len(sizes)} dimensions"
                if len(sizes) > _MAX_RANK
                else f"the shape {format_shape(sizes)} has a negative dimension"
            )
        )
    if math.prod(size for size in sizes if size) > _MAX_ELEMENTS:  # An empty one can be, too
        raise invalid_argument(
            f"tensor parsing error: {name}: the shape {format_shape(sizes)} is too large"
        )
    return sizes


def _strings(
    proto: tensor_pb2.TensorProto, shape: tuple[int, ...], count: int, name: str
) -> np.ndarray:
    if proto.tensor_content:
        raise invalid_argument(
            f"tensor parsing error: {name}: strings are sent in string_val, not in tensor_content"
        )
    values = proto.string_val
    if len(values) > count:
        raise _too_many(name, len(values), shape)
    if len(values) < count:
        # TensorFlow would repeat the last one. Nobody means that of strings, and it is the
        # cheapest way to ask for a million images to be decoded.
        raise invalid_argument(
            f"tensor parsing error: {name}: {len(values)} strings for the shape "
            f"{format_shape(shape)}"
        )
    array = np.empty(count, np.object_)
    array[:] = values
    return array.reshape(shape)


def _too_many(name: str, count: int, shape: tuple[int, ...]) -> Exception:
    return invalid_argument(
        f"tensor parsing error: {name}: {count} values for the shape {format_shape(shape)}"
    )


def fill_proto(proto: tensor_pb2.TensorProto, array: np.ndarray, dtype: int) -> None:
    """Writes an array into an empty TensorProto, numbers as `tensor_content`."""
    proto.dtype = dtype
    for size in array.shape:
        proto.tensor_shape.dim.add().size = size
    if dtype == types_pb2.DT_STRING:
        proto.string_val.extend(array.ravel().tolist())
    else:
        proto.tensor_content = array.tobytes()


def to_shape(proto: Any) -> tuple[int, ...] | None:
    """A TensorShapeProto of a signature as sizes, -1 for an unknown one; None: unknown rank."""
    return None if proto.unknown_rank else tuple(dim.size for dim in proto.dim)
