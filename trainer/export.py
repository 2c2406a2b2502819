"""Export for TF Serving: a SavedModel with three signatures that agree on the same pixels.

| signature          | input                                                    |
|--------------------|----------------------------------------------------------|
| `serving_default`  | `images`: uint8 [N, H, W, 3], RGB                        |
| `serving_bytes`    | `image_bytes`: string [N], image files of any size       |
| `serving_examples` | `examples`: string [N], serialized tf.Examples           |

All return, for each image, the most probable first: `top_5_names` string [N, K], their superclasses
`top_5_superclasses` string [N, K], `top_5_ids` int32 [N, K], `top_5_probabilities` float32 [N, K];
and `probabilities` float32 [N, classes]. H and W are the data card's image_size, K is its `top`.

`serving_bytes` turns photographs upright and cuts the middle of an image of another size down to
H x W with an antialiased bilinear filter (see `images.py`): one of H x W passes unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from dataset.card import CARD_FILE, CHANNELS, DataCard
from trainer import images as image_files
from trainer import preprocessing, weights
from trainer.network import inference

SERVING_DEFAULT = "serving_default"
SERVING_BYTES = "serving_bytes"
SERVING_EXAMPLES = "serving_examples"

# Files beside the graph that no signature reads: what the model was made from.
EXTRA_ASSETS = "assets.extra"
# For training that goes on from this model (trainer/warm_start.py): the SavedModel's weights are
# multiplied out for inference, and such products cannot be taken apart.
WEIGHTS_FILE = "trained_weights.npz"

_PARITY_TOLERANCE = 1e-5


class ExportError(RuntimeError):
    """The model could not be written, or would not serve what it was trained on."""


def channel_statistics(transform_output: tft.TFTransformOutput) -> tuple[np.ndarray, np.ndarray]:
    """Reads the normalisation constants out of the transform graph.

    Returns:
      (mean, variance), each float32 [3].
    """
    transformed = _apply_transform(transform_output, np.zeros((1, CHANNELS), np.uint8))
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
    pixels = np.repeat(np.arange(256, dtype=np.uint8), CHANNELS).reshape(1, 256, CHANNELS)
    trained_on = _apply_transform(transform_output, pixels)[preprocessing.IMAGE_KEY].to_tensor()
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
        {preprocessing.IMAGE_KEY: raw, preprocessing.LABEL_KEY: labels}
    )


def build_archive(
    model: keras.Model,
    transform_output: tft.TFTransformOutput,
    card: DataCard,
) -> keras.export.ExportArchive:
    """Wraps a model in the three signatures.

    Args:
      model: float32 [N, H, W, 3] normalized images -> logits [N, classes].
      transform_output: Gives the constants of the normalisation.
      card: Names the classes, in the order of the logits.

    Raises:
      ExportError: See `check_parity`; or the number of names is not that of the logits.
    """
    num_classes = model.output_shape[-1]
    if card.num_classes != num_classes:
        raise ExportError(f"{card.num_classes} class names for {num_classes} logits")
    check_parity(transform_output)
    mean, variance = channel_statistics(transform_output)
    model = inference.for_inference(model)
    names, superclasses = tf.constant(card.classes), tf.constant(card.superclass_of)

    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        normalized = preprocessing.normalize(images, mean, variance)
        logits = model(normalized, training=False)  # (N, classes)
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float32))
        top = tf.math.top_k(probabilities, k=card.top)
        return {
            "top_5_names": tf.gather(names, top.indices),
            "top_5_superclasses": tf.gather(superclasses, top.indices),
            "top_5_ids": top.indices,
            "top_5_probabilities": top.values,
            "probabilities": probabilities,
        }

    def serve_images(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return predict(images)

    def serve_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        images = tf.map_fn(
            lambda encoded: image_files.decode_image(encoded, card.image_size, card.resize),
            image_bytes,
            fn_output_signature=tf.TensorSpec(card.shape, tf.uint8),
        )
        return predict(images)

    def serve_examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        feature = {preprocessing.IMAGE_KEY: tf.io.FixedLenFeature([], tf.string)}
        parsed = tf.io.parse_example(examples, feature)
        return predict(preprocessing.decode_images(parsed[preprocessing.IMAGE_KEY], card.shape))

    # The endpoints bring the variables that they use. `track` would add all of the model's, the
    # states of dropout's generators among them.
    archive = keras.export.ExportArchive()
    for name, function, spec in (
        (
            SERVING_DEFAULT,
            serve_images,
            tf.TensorSpec([None, *card.shape], tf.uint8, name="images"),
        ),
        (SERVING_BYTES, serve_bytes, tf.TensorSpec([None], tf.string, name="image_bytes")),
        (SERVING_EXAMPLES, serve_examples, tf.TensorSpec([None], tf.string, name="examples")),
    ):
        archive.add_endpoint(name, function, input_signature=[spec])
    return archive


def export_model(
    model: keras.Model,
    transform_output: tft.TFTransformOutput,
    card: DataCard,
    target: str,
    extra: Mapping[str, str],
) -> None:
    """Writes the SavedModel; `target` appears when it is whole, or not at all.

    Args:
      model: See `build_archive`.
      transform_output: See `build_archive`.
      card: See `build_archive`; written to `assets.extra/`, too.
      target: Folder to create.
      extra: File name -> text, written to `assets.extra/`, beside the model's own weights in
        `WEIGHTS_FILE`.

    Raises:
      ExportError: See `build_archive`; or the disk is full or not writable.
    """
    archive = build_archive(model, transform_output, card)
    with _whole_or_nothing(target) as partial:
        archive.write_out(partial, verbose=False)
        folder = f"{partial}/{EXTRA_ASSETS}"
        tf.io.gfile.makedirs(folder)
        for name, text in {CARD_FILE: card.to_json(), **extra}.items():
            with tf.io.gfile.GFile(f"{folder}/{name}", "w") as file:
                file.write(text)
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
