"""A small model with the interface of ours, and a gRPC server that answers as it is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf

CLASSES = 10


class Classifier(tf.Module):
    """A linear classifier with our three signatures.

    Args:
      total: What the probabilities sum to.
      bias: Added to a logit in `serving_bytes` alone.
    """

    def __init__(self, total: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.weights = tf.Variable(weights())
        self.total, self.bias = total, bias

    def _predict(self, images: tf.Tensor, bias: float = 0.0) -> dict[str, tf.Tensor]:
        flat = tf.reshape(tf.cast(images, tf.float32), [-1, 3072])
        logits = tf.linalg.matmul(flat, self.weights) + bias * tf.one_hot(3, CLASSES)
        probabilities = self.total * tf.nn.softmax(logits)
        top = tf.math.top_k(probabilities, 5)
        names = tf.strings.as_string(top.indices)
        return {
            "probabilities": probabilities,
            "top_5_probabilities": top.values,
            "top_5_ids": top.indices,
            "top_5_names": names,
            "top_5_superclasses": names,
        }

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8, name="images")])
    def images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._predict(images)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def encoded(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        spec = tf.TensorSpec([32, 32, 3], tf.uint8)
        decode = lambda content: tf.ensure_shape(tf.io.decode_png(content, 3), [32, 32, 3])  # noqa: E731
        return self._predict(tf.map_fn(decode, image_bytes, fn_output_signature=spec), self.bias)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def parsed(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        feature = {"image": tf.io.FixedLenFeature([], tf.string)}
        raw = tf.io.parse_example(examples, feature)["image"]
        return self._predict(tf.reshape(tf.io.decode_raw(raw, tf.uint8), [-1, 32, 32, 3]))

    def save(self, folder: Path) -> None:
        functions = {
            "serving_default": self.images,
            "serving_bytes": self.encoded,
            "serving_examples": self.parsed,
        }
        tf.saved_model.save(self, str(folder), signatures=functions)


def weights() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 2e-4, (3072, CLASSES)).astype(np.float32)


def pixels(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), np.uint8)


@contextlib.contextmanager
def grpc_server(
    handle: Callable[[bytes, grpc.ServicerContext], bytes] | None,
    credentials: grpc.ServerCredentials | None = None,
    threads: int = 4,
) -> Iterator[str]:
    """Serves one function for all methods, none if it is None; yields HOST:PORT."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, _: object) -> grpc.RpcMethodHandler | None:
            return grpc.unary_unary_rpc_method_handler(handle) if handle else None

    server = grpc.server(futures.ThreadPoolExecutor(threads), handlers=[Handler()])
    if credentials:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
