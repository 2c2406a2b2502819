"""Warm-up requests, which a model server sends to a model before its clients may."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from serving import tensors
from serving.encoding import INPUTS
from serving.protos import prediction_log_pb2

# https://www.tensorflow.org/tfx/serving/saved_model_warmup: where, in which format, how many.
WARMUP_FILE = os.path.join("assets.extra", "tf_serving_warmup_requests")
MAX_RECORDS = 1000


def write(model_dir: str, inputs: dict[str, Any], batch_sizes: Sequence[int]) -> int:
    """Adds the warm-up file to a SavedModel: each signature at each batch size.

    The first request of a shape is slow: TensorFlow prepares its kernels. With batches padded to
    few sizes, these are all the shapes that there will be.

    Args:
      model_dir: Folder of the SavedModel.
      inputs: Signature -> the input for one image, with the batch dimension.
      batch_sizes: `allowed_batch_sizes` of the batching parameters.

    Returns:
      The number of records.

    Raises:
      ValueError: There are more records than a server reads.
    """
    records = [
        record(signature, one, size) for signature, one in inputs.items() for size in batch_sizes
    ]
    if len(records) > MAX_RECORDS:
        raise ValueError(
            f"{len(batch_sizes)} batch sizes of {len(inputs)} signatures are {len(records)} "
            f"warm-up requests, more than the {MAX_RECORDS} that are read: allow fewer sizes."
        )
    path = os.path.join(model_dir, WARMUP_FILE)
    tf.io.gfile.makedirs(os.path.dirname(path))
    with tf.io.TFRecordWriter(path) as writer:
        for item in records:
            writer.write(item.SerializeToString())
    return len(records)


def record(signature: str, one: Any, batch_size: int) -> Any:
    """Makes the PredictionLog of a request for a batch.

    Args:
      signature: The signature's name.
      one: Its input for one image, with the batch dimension: uint8, or a list of bytes.
      batch_size: Images in the request.
    """
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.signature_name = signature
    if isinstance(one, list):
        tensor = tensors.to_proto(one * batch_size)
    else:
        # One value for all that are missing: as small for a batch of 256 as for one image, and
        # what is in the images makes no difference to how long they take.
        tensor = tensors.to_proto(one)
        tensor.int_val.append(tensor.tensor_content[0])
        tensor.ClearField("tensor_content")
        tensor.tensor_shape.dim[0].size = batch_size
    request.inputs[INPUTS[signature]].CopyFrom(tensor)
    return log
