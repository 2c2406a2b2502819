"""Conversion to TFLite, the format of LiteRT (TensorFlow Lite), and running it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from tensorflow.lite.python import schema_py_generated as schema

from components.converter.saved_model import (
    INPUT,
    OUTPUT,
    SIGNATURE,
    ConversionError,
    PixelsToProbabilities,
    Predict,
)

# What is computed in int8: the operations that hold the weights, and most of the arithmetic.
# Products of activations, softmax, normalizations and the residual stream stay in float32. With
# all of them in int8, too, a shortly trained model of four blocks agreed with the SavedModel on 4
# (TensorFlow 2.16) to 11 (2.21) of 100 images less, and took three times as long or longer:
# XNNPACK, which computes on CPUs, has int8 kernels for few of them.
_INT8_OPERATIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_FLOAT_OPERATIONS = [
    name for name in vars(schema.BuiltinOperator) if name.isupper() and name not in _INT8_OPERATIONS
]


def convert_float16(model: PixelsToProbabilities) -> bytes:
    """Converts a model; its weights are stored in float16.

    Raises:
      ConversionError: TFLite cannot express it.
    """
    with tempfile.TemporaryDirectory(prefix="tflite-") as folder:
        converter = _converter(model, folder)
        converter.target_spec.supported_types = [tf.float16]
        return _run(converter.convert)


def convert_int8(model: PixelsToProbabilities, representative: np.ndarray) -> bytes:
    """Converts a model; convolutions and dense layers compute with 8 bits.

    Args:
      model: What to convert.
      representative: uint8 [N, H, W, 3], images from which the ranges of the activations are
        taken: of the training split, as the test split is there to measure on.

    Raises:
      ConversionError: TFLite cannot express it.
    """

    def images() -> Iterator[dict[str, np.ndarray]]:
        return ({INPUT: image[None]} for image in representative)

    with tempfile.TemporaryDirectory(prefix="tflite-") as folder:
        converter = _converter(model, folder)
        converter.representative_dataset = images
        # The one public way to exempt operations; nothing is debugged. It makes an interpreter of
        # TensorFlow's own, which warns that LiteRT's is to be used.
        options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=_FLOAT_OPERATIONS)
        return _run(
            lambda: tf.lite.experimental.QuantizationDebugger(
                converter=converter, debug_dataset=images, debug_options=options
            ).get_nondebug_quantized_model()
        )


def _converter(model: PixelsToProbabilities, folder: str) -> tf.lite.TFLiteConverter:
    # By way of a SavedModel: without one, the file would have no signature.
    tf.saved_model.save(model, folder, signatures={SIGNATURE: model.predict})
    converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[SIGNATURE])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return converter


def _run(convert: Callable[[], bytes]) -> bytes:
    try:
        return convert()
    except Exception as error:  # of many types, none of which is documented
        raise ConversionError(f"TFLite's converter failed: {error}") from error


def load(content: bytes) -> Predict:
    """Makes a converted model ready to be called, on one thread.

    Args:
      content: The file's.

    Raises:
      ConversionError: It is no model, or needs operations that the interpreter does not have.
    """
    try:
        interpreter = Interpreter(model_content=content, num_threads=1)
        run = interpreter.get_signature_runner(SIGNATURE)
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"TFLite's interpreter cannot run it: {error}") from error
    return lambda images: run(**{INPUT: images})[OUTPUT]
