"""Export for TF Serving: a SavedModel with three signatures that agree on the same pixels.

| signature          | input                                                    |
|--------------------|----------------------------------------------------------|
| `serving_default`  | `images`: uint8 [N, 32, 32, 3], RGB                      |
| `serving_bytes`    | `image_bytes`: string [N], encoded PNG or JPEG, any size |
| `serving_examples` | `examples`: string [N], serialized tf.Examples           |

All return, for each image, the most probable first: `top_5_names` string [N, 5], their superclasses
`top_5_coarse_names` string [N, 5], `top_5_ids` int32 [N, 5], `top_5_probabilities` float32 [N, 5];
and `probabilities` float32 [N, 100].

`serving_bytes` resizes an image of another size to 32 x 32 with an antialiased bilinear filter,
without keeping its aspect ratio, and rounds to uint8: an image of 32 x 32 passes unchanged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from trainer import preprocessing, weights
from trainer.network import inference

SERVING_DEFAULT = "serving_default"
SERVING_BYTES = "serving_bytes"
SERVING_EXAMPLES = "serving_examples"
TOP_K = 5

# Files beside the graph that no signature reads: what the model was made from.
EXTRA_ASSETS = "assets.extra"
TRAINING_REPORT_FILE = "training.json"
DATASET_CARD_FILE = "dataset.json"
# For training that goes on from this model (trainer/warm_start.py): the SavedModel's weights are
# multiplied out for inference, and such products cannot be taken apart.
WEIGHTS_FILE = "trained_weights.npz"

_PARITY_TOLERANCE = 1e-5


class ClassNames(NamedTuple):
    """The names of the classes, in the order of the logits.

    Attributes:
      fine: Of each class.
      coarse: Of each class's superclass; empty where the data do not tell.
    """

    fine: Sequence[str]
    coarse: Sequence[str]


def class_names(card: Mapping[str, Any]) -> ClassNames:
    """Reads the class names out of a data set's card (see components/example_gen)."""
    coarse = card["coarse_label_names"]
    superclasses = ["" if label is None else coarse[label] for label in card["superclasses"]]
    return ClassNames(card["fine_label_names"], superclasses)


class ExportError(RuntimeError):
    """The model could not be written, or would not serve what it was trained on."""


def channel_statistics(transform_output: tft.TFTransformOutput) -> tuple[np.ndarray, np.ndarray]:
    """Reads the normalisation constants out of the transform graph.

    Returns:
      (mean, variance), each float32 [3].
    """
    transformed = _apply_transform(
        transform_output, np.zeros((1, *preprocessing.IMAGE_SHAPE), "u1")
    )
    return (
        transformed[preprocessing.IMAGE_MEAN_KEY][0].numpy(),
        transformed[preprocessing.IMAGE_VARIANCE_KEY][0].numpy(),
    )


def check_parity(transform_output: tft.TFTransformOutput) -> None:
    """Refuses a transform graph that no longer computes what `preprocessing.normalize` does.

    The graph is a file that may be older than the code and the libraries here; a model trained
    through it and served through them would see other pixels than it learned from.

    Raises:
      ExportError: They differ.
    """
    levels = np.arange(256, dtype=np.uint8)
    size = int(np.prod(preprocessing.IMAGE_SHAPE))
    pixels = np.resize(levels, (1, size)).reshape(1, *preprocessing.IMAGE_SHAPE)
    trained_on = _apply_transform(transform_output, pixels)[preprocessing.IMAGE_KEY]
    served = preprocessing.normalize(pixels, *channel_statistics(transform_output))
    difference = float(tf.reduce_max(tf.abs(trained_on - served)))
    if not difference <= _PARITY_TOLERANCE:
        raise ExportError(
            f"the transform graph and trainer/preprocessing.py normalise differently (by up to "
            f"{difference:.3g}): the code changed after Transform ran. Run again with --no_cache."
        )


def _apply_transform(
    transform_output: tft.TFTransformOutput, pixels: np.ndarray
) -> dict[str, tf.Tensor]:
    raw = tf.constant([image.tobytes() for image in pixels])
    labels = tf.zeros([len(pixels)], tf.int64)
    return transform_output.transform_features_layer()(
        {preprocessing.IMAGE_KEY: raw, preprocessing.FINE_LABEL_KEY: labels}
    )


def _decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """PNG or JPEG, string [] -> uint8 [32, 32, 3]."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    resized = tf.image.resize(image, preprocessing.IMAGE_SHAPE[:2], antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def build_archive(
    model: keras.Model,
    transform_output: tft.TFTransformOutput,
    class_names: ClassNames,
) -> keras.export.ExportArchive:
    """Wraps a model in the three signatures.

    Args:
      model: float32 [N, 32, 32, 3] normalised images -> logits [N, classes].
      transform_output: Gives the constants of the normalisation.
      class_names: As many as there are logits.

    Raises:
      ExportError: See `check_parity`; or the number of names is not that of the logits.
    """
    num_classes = model.output_shape[-1]
    if not len(class_names.fine) == len(class_names.coarse) == num_classes:
        raise ExportError(f"{len(class_names.fine)} class names for {num_classes} logits")
    check_parity(transform_output)
    mean, variance = channel_statistics(transform_output)
    model = inference.for_inference(model)
    names, coarse_names = (tf.constant(list(names)) for names in class_names)

    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        normalized = preprocessing.normalize(images, mean, variance)
        logits = model(normalized, training=False)  # (N, classes)
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float32))
        top = tf.math.top_k(probabilities, k=TOP_K)
        return {
            "top_5_names": tf.gather(names, top.indices),
            "top_5_coarse_names": tf.gather(coarse_names, top.indices),
            "top_5_ids": top.indices,
            "top_5_probabilities": top.values,
            "probabilities": probabilities,
        }

    def serve_images(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return predict(images)

    def serve_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        images = tf.map_fn(
            _decode_image,
            image_bytes,
            fn_output_signature=tf.TensorSpec(preprocessing.IMAGE_SHAPE, tf.uint8),
        )
        return predict(images)

    def serve_examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        feature = {preprocessing.IMAGE_KEY: tf.io.FixedLenFeature([], tf.string)}
        parsed = tf.io.parse_example(examples, feature)
        return predict(preprocessing.decode_images(parsed[preprocessing.IMAGE_KEY]))

    # The endpoints bring the variables that they use. `track` would add all of the model's, the
    # states of dropout's generators among them.
    archive = keras.export.ExportArchive()
    for name, function, spec in (
        (
            SERVING_DEFAULT,
            serve_images,
            tf.TensorSpec([None, *preprocessing.IMAGE_SHAPE], tf.uint8, name="images"),
        ),
        (SERVING_BYTES, serve_bytes, tf.TensorSpec([None], tf.string, name="image_bytes")),
        (SERVING_EXAMPLES, serve_examples, tf.TensorSpec([None], tf.string, name="examples")),
    ):
        archive.add_endpoint(name, function, input_signature=[spec])
    return archive


def export_model(
    model: keras.Model,
    transform_output: tft.TFTransformOutput,
    class_names: ClassNames,
    target: str,
    extra: Mapping[str, Any],
) -> None:
    """Writes the SavedModel; `target` appears when it is whole, or not at all.

    Args:
      model: See `build_archive`.
      transform_output: See `build_archive`.
      class_names: See `build_archive`.
      target: Folder to create.
      extra: File name -> JSON-serializable value, written to `assets.extra/`, beside the model's
        own weights in `WEIGHTS_FILE`.

    Raises:
      ExportError: See `build_archive`; or the disk is full or not writable.
    """
    archive = build_archive(model, transform_output, class_names)
    with _whole_or_nothing(target) as partial:
        archive.write_out(partial, verbose=False)
        folder = f"{partial}/{EXTRA_ASSETS}"
        tf.io.gfile.makedirs(folder)
        for name, value in extra.items():
            with tf.io.gfile.GFile(f"{folder}/{name}", "w") as file:
                file.write(json.dumps(value, indent=1) + "\n")
        with tf.io.gfile.GFile(f"{folder}/{WEIGHTS_FILE}", "wb") as file:
            file.write(weights.pack(model))


@contextlib.contextmanager
def _whole_or_nothing(target: str) -> Iterator[str]:
    partial = f"{target}.partial"
    if tf.io.gfile.exists(partial):
        tf.io.gfile.rmtree(partial)
    try:
        yield partial
        tf.io.gfile.rename(partial, target)
    except (OSError, tf.errors.OpError) as error:
        raise ExportError(
            f"the model could not be written to {target}: {error}. "
            "Free space on that disk or make the folder writable, and run again."
        ) from error
    finally:
        if tf.io.gfile.exists(partial):
            tf.io.gfile.rmtree(partial)
