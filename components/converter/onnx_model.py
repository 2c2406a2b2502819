"""Conversion to ONNX, and running it; needs the package's extra `onnx`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tf2onnx
from tensorflow.python.framework import convert_to_constants
from tf2onnx.handler import tf_op

from components.converter.saved_model import (
    INPUT,
    OUTPUT,
    ConversionError,
    PixelsToProbabilities,
    Predict,
)

# Of December 2022; ONNX Runtime has it since 1.14.
_OPSET = 18
_LABELS_KEY = "labels"


@tf_op("Erfc")
class _ComplementaryErrorFunction:
    """1 - erf(x): neither ONNX nor tf2onnx has erfc, of which Keras 3.15 makes GELU."""

    @classmethod
    def version_9(cls, ctx: Any, node: Any, **kwargs: Any) -> None:
        (output,) = node.output
        shape, dtype = ctx.get_shape(output), ctx.get_dtype(output)
        erf = ctx.make_node("Erf", node.input, shapes=[shape], dtypes=[dtype]).output[0]
        one = np.ones((), tf2onnx.utils.map_onnx_to_numpy_type(dtype))
        one = ctx.make_const(tf2onnx.utils.make_name("one"), one).output[0]
        ctx.remove_node(node.name)
        ctx.make_node("Sub", [one, erf], outputs=[output], shapes=[shape], dtypes=[dtype])


def convert(model: PixelsToProbabilities, labels: Sequence[str]) -> bytes:
    """Converts a model.

    Args:
      model: What to convert.
      labels: The classes' names, for the file's metadata (`labels`, one a line).

    Raises:
      ConversionError: ONNX cannot express it.
    """
    # tf2onnx would do this itself, but then take the tables of names, which the model holds and
    # its probabilities do not depend on, for inputs.
    frozen = convert_to_constants.convert_variables_to_constants_v2(
        model.predict.get_concrete_function()
    )
    (given,), (returned,) = frozen.inputs, frozen.outputs
    try:
        converted, _ = tf2onnx.convert.from_graph_def(
            frozen.graph.as_graph_def(),
            name="vit",
            input_names=[given.name],
            output_names=[returned.name],
            tensors_to_rename={given.name: INPUT, returned.name: OUTPUT},
            opset=_OPSET,
        )
        for value in (*converted.graph.input, *converted.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        onnx.helper.set_model_props(converted, {_LABELS_KEY: "\n".join(labels)})
        onnx.checker.check_model(converted, full_check=True)
    except Exception as error:  # of many types, none of which is documented
        raise ConversionError(f"tf2onnx failed: {error}") from error
    return bytes(converted.SerializeToString())


def load(content: bytes) -> Predict:
    """Makes a converted model ready to be called, on one thread.

    Args:
      content: The file's.

    Raises:
      ConversionError: It is no model, or ONNX Runtime does not have its operations.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types derive from nothing more specific
        raise ConversionError(f"ONNX Runtime cannot run it: {error}") from error

    def predict(images: np.ndarray) -> np.ndarray:
        (probabilities,) = session.run([OUTPUT], {INPUT: images})
        return np.asarray(probabilities)

    return predict
