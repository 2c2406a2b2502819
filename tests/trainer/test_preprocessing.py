"""One preprocessing, whichever way the pixels come: by hand, tf.data, Transform's graph or served.

The splits are made by ExampleGen's own code and analyzed by TensorFlow Transform on Beam, from
serialized examples, as the pipeline does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from tfx_bsl.public import tfxio

from dataset import format as binary
from dataset import synthetic
from dataset.card import SPLITS, TRAIN
from dataset.locate import locate
from tests.support.cards import make_card
from tests.support.ingest import ingest
from trainer import export, preprocessing
from trainer.input import make_dataset, read_examples

SHAPE = (32, 32, 3)
FEATURE_SPEC = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "label": tf.io.FixedLenFeature([], tf.int64),
    "superclass": tf.io.FixedLenFeature([], tf.int64),
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set with what ExampleGen and Transform make of it."""

    folder: Path
    examples: Path
    transform_output: tft.TFTransformOutput

    def files(self, split: str) -> list[str]:
        return [str(self.examples / f"Split-{split}" / "*.gz")]

    def train_images(self) -> np.ndarray:
        """The train split, uint8 [N, 32, 32, 3], read without any of the code under test."""
        images, _, _ = binary.read_records(self.folder / binary.TRAIN_FILE)
        return images[: len(images) - len(images) // 10]


@pytest.fixture(scope="module", params=["synthetic", "cifar-100"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    work = tmp_path_factory.mktemp(request.param)
    if request.param == "synthetic":
        folder = synthetic.generate(work / "data", train=1000, test=100)
    elif data := os.environ.get("CIFAR100_DATA"):
        folder = locate(data, work).folder
    else:
        pytest.skip("CIFAR100_DATA, the path of CIFAR-100's archive or folder, is not set")
    ingest(folder, work / "examples", dataset_name=request.param)
    metadata = tft.DatasetMetadata.from_feature_spec(FEATURE_SPEC)
    source = tfxio.TFExampleRecord(
        str(work / "examples" / f"Split-{TRAIN}" / "*.gz"), schema=metadata.schema
    )
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(work / "tmp")):
        rows = pipeline | source.BeamSource()
        graph = (rows, source.TensorAdapterConfig()) | tft_beam.AnalyzeDataset(
            preprocessing.preprocessing_fn
        )
        _ = graph | tft_beam.WriteTransformFn(str(work / "transform"))
    return Prepared(folder, work / "examples", tft.TFTransformOutput(str(work / "transform")))


@pytest.fixture(scope="module")
def exported(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel whose answers reveal what its model was given.

    The logits are the pixels and, last, a zero: the log of the ratio of a probability to the last
    one is a pixel.
    """
    pixels = int(np.prod(SHAPE))
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Reshape((pixels, 1)),
            keras.layers.ZeroPadding1D((0, 1)),
            keras.layers.Flatten(),
        ]
    )
    target = tmp_path_factory.mktemp("export") / "model"
    names = [str(index) for index in range(pixels + 1)]
    export.export_model(model, prepared.transform_output, make_card(names), str(target), {})
    return target


def seen_by_model(outputs: dict[str, tf.Tensor]) -> np.ndarray:
    logarithms = np.log(outputs["probabilities"].numpy().astype(np.float64))
    return (logarithms[:, :-1] - logarithms[:, -1:]).reshape(-1, *SHAPE)


def test_mean_and_variance_are_those_of_the_train_split(prepared: Prepared):
    images = prepared.train_images()
    # By histogram: exact integers, where sums of float32 over 46 million pixels are not.
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    levels = np.arange(256)
    expected_mean = counts @ levels / counts.sum(axis=1)
    expected_variance = counts @ levels**2 / counts.sum(axis=1) - expected_mean**2
    mean, variance = export.channel_statistics(prepared.transform_output)
    assert mean.dtype == variance.dtype == np.float32
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-5)
    # Sharp enough to tell the train split from all of train.bin.
    everything, _, _ = binary.read_records(prepared.folder / binary.TRAIN_FILE)
    assert len(images) == 0.9 * len(everything)
    assert not np.allclose(mean, everything.mean(axis=(0, 1, 2), dtype=np.float64), rtol=1e-5)


def analyzed(images: Sequence[np.ndarray], parts: int, folder: Path) -> tuple[np.ndarray, ...]:
    """Statistics of images that Beam gets in so many parts."""
    source = tft.DatasetMetadata.from_feature_spec(FEATURE_SPEC)
    rows = [{"image": image.tobytes(), "label": 0, "superclass": 0} for image in images]
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(folder / "tmp")):
        collections = [
            pipeline | f"Create{part}" >> beam.Create(rows[part::parts]) for part in range(parts)
        ]
        data = (collections | beam.Flatten(), source)
        graph = data | tft_beam.AnalyzeDataset(preprocessing.preprocessing_fn)
        _ = graph | tft_beam.WriteTransformFn(str(folder / "graph"))
    return export.channel_statistics(tft.TFTransformOutput(str(folder / "graph")))


def test_statistics_do_not_depend_on_the_order_of_the_examples(tmp_path: Path):
    draw = np.random.default_rng(0)
    # Skewed, so that sums of floats do depend on it.
    images = (255 * draw.random((400, 20, 24, 3)) ** 3).astype(np.uint8)
    pixels = images.reshape(-1, 3).astype(np.int64)
    mean = pixels.sum(axis=0) / len(pixels)
    expected = mean, (pixels**2).sum(axis=0) / len(pixels) - mean**2
    for parts, order in enumerate((np.arange(400), draw.permutation(400), draw.permutation(400))):
        found = analyzed(images[order], 1 + 2 * parts, tmp_path / str(parts))
        for ours, exact in zip(found, expected, strict=True):
            assert ours.tolist() == exact.astype(np.float32).tolist()


def test_normalized_train_split_has_zero_mean_and_unit_variance(prepared: Prepared):
    images = prepared.train_images()[:5000]
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    variance = images.var(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    normalized = preprocessing.normalize(images, mean, variance).numpy().astype(np.float64)
    np.testing.assert_allclose(normalized.mean(axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(normalized.var(axis=(0, 1, 2)), 1.0, rtol=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_all_ways_give_the_model_the_same_pixels(prepared: Prepared, exported: Path, split: str):
    raw, labels = read_examples(prepared.files(split))
    raw, labels = raw[:50], labels[:50]
    pixels = np.stack([np.frombuffer(r, np.uint8).reshape(32, 32, 3) for r in raw])
    mean, variance = export.channel_statistics(prepared.transform_output)

    by_definition = (pixels - mean.astype(np.float64)) / np.sqrt(variance.astype(np.float64))
    eager = preprocessing.normalize(pixels, mean, variance)
    mapped = tf.data.Dataset.from_tensor_slices(pixels).batch(20)
    mapped = mapped.map(lambda batch: preprocessing.normalize(batch, mean, variance))
    trained_on = make_dataset(raw, labels, prepared.transform_output, SHAPE, batch_size=20)
    layer = prepared.transform_output.transform_features_layer()
    transformed = layer({"image": tf.constant(raw), "label": tf.constant(labels)})
    signatures = tf.saved_model.load(str(exported)).signatures
    examples = [
        tf.train.Example(
            features=tf.train.Features(
                feature={"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[r]))}
            )
        ).SerializeToString()
        for r in raw
    ]
    pngs = [tf.io.encode_png(image).numpy() for image in pixels]

    assert by_definition.std() > 0.3  # real content, not a constant image
    for name, images in {
        "eager": eager.numpy(),
        "tf.data": np.concatenate(list(mapped.as_numpy_iterator())),
        "training": np.concatenate([batch for batch, _ in trained_on.as_numpy_iterator()]),
        "transform graph": transformed["image"].to_tensor().numpy(),
        "serving_default": seen_by_model(signatures["serving_default"](tf.constant(pixels))),
        "serving_bytes": seen_by_model(signatures["serving_bytes"](tf.constant(pngs))),
        "serving_examples": seen_by_model(signatures["serving_examples"](tf.constant(examples))),
    }.items():
        np.testing.assert_allclose(
            images.reshape(by_definition.shape), by_definition, atol=2e-6, err_msg=name
        )
    np.testing.assert_array_equal(transformed["label"], labels)


def test_examples_are_the_records_in_row_major_rgb(prepared: Prepared):
    raw, labels = read_examples(prepared.files("test"))
    images, fine, _ = binary.read_records(prepared.folder / binary.TEST_FILE)
    decoded = preprocessing.decode_images(tf.constant(raw), SHAPE).numpy()
    assert decoded.dtype == np.uint8
    # Beam writes shards in any order.
    key = [image.tobytes() for image in images]
    assert sorted(zip(key, fine.tolist())) == sorted(
        zip((image.tobytes() for image in decoded), labels.tolist())
    )


def test_images_of_another_length_are_refused():
    image = bytes(3072)
    assert preprocessing.decode_images(tf.constant([image] * 2), SHAPE).shape == (2, 32, 32, 3)
    assert preprocessing.decode_images(tf.constant([], tf.string), SHAPE).shape == (0, 32, 32, 3)
    for wrong in (image * 2, image[:-1], b""):
        with pytest.raises(tf.errors.InvalidArgumentError):
            preprocessing.decode_images(tf.constant([wrong, wrong]), SHAPE)


def test_a_constant_channel_becomes_zero():
    pixels = np.full((1, 32, 32, 3), 7, np.uint8)
    mean, variance = np.float32([7, 7, 7]), np.float32([0, 0, 0])
    np.testing.assert_array_equal(preprocessing.normalize(pixels, mean, variance), 0 * pixels)
