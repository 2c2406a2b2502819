"""NumPy arrays as TF Serving's TensorProtos and back, without TensorFlow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from serving.protos import tensor_pb2, types_pb2

# DataType -> the NumPy type, and the field that holds values which are not in `tensor_content`.
_TYPES = {
    types_pb2.DT_BOOL: (np.dtype(np.bool_), "bool_val"),
    types_pb2.DT_UINT8: (np.dtype(np.uint8), "int_val"),
    types_pb2.DT_INT32: (np.dtype(np.int32), "int_val"),
    types_pb2.DT_INT64: (np.dtype(np.int64), "int64_val"),
    types_pb2.DT_FLOAT: (np.dtype(np.float32), "float_val"),
    types_pb2.DT_DOUBLE: (np.dtype(np.float64), "double_val"),
    types_pb2.DT_STRING: (np.dtype(object), "string_val"),
}
_DATA_TYPES = {dtype: data_type for data_type, (dtype, _) in _TYPES.items()}


def type_name(data_type: int) -> str:
    """Names a DataType as NumPy does; strings of bytes are `string`."""
    if data_type == types_pb2.DT_STRING:
        return "string"
    if data_type in _TYPES:
        return _TYPES[data_type][0].name
    return str(types_pb2.DataType.Name(data_type)).removeprefix("DT_").lower()


def to_proto(values: Any) -> Any:
    """Encodes an array.

    Args:
      values: An array, or what makes one; of bytes for a string tensor.

    Returns:
      The TensorProto.

    Raises:
      ValueError: The array's type is none of bool, uint8, int32, int64, float32, float64, bytes.
    """
    array = np.asarray(values)
    if array.dtype.kind == "S":
        # NumPy would drop zero bytes at the end.
        array = np.asarray(values, dtype=object)
    if array.dtype not in _DATA_TYPES:
        raise ValueError(f"a tensor of {array.dtype} cannot be sent: use {_names()}.")
    proto = tensor_pb2.TensorProto(dtype=_DATA_TYPES[array.dtype])
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if array.dtype == object:
        proto.string_val.extend(array.ravel().tolist())
    else:
        proto.tensor_content = array.tobytes()
    return proto


def to_array(proto: Any) -> np.ndarray:
    """Decodes a TensorProto: `tensor_content`, or the field of its type.

    Fewer values than elements are completed with the last one, as TensorFlow does.

    Raises:
      ValueError: The tensor's type is not known here, or the values do not fit its shape.
    """
    if proto.dtype not in _TYPES:
        raise ValueError(f"a tensor of type {type_name(proto.dtype)} cannot be read.")
    dtype, field = _TYPES[proto.dtype]
    shape = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_content:
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    values = np.empty(len(getattr(proto, field)), dtype)
    values[:] = getattr(proto, field)
    missing = math.prod(shape) - len(values)
    if missing > 0 and len(values):
        values = np.concatenate([values, np.repeat(values[-1:], missing)])
    return values.reshape(shape)


def _names() -> str:
    return ", ".join(type_name(data_type) for data_type in _TYPES)
