"""The Trainer's input: all examples once an epoch, in the right order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam

from trainer import export, preprocessing
from trainer.input import make_dataset, read_examples, training_batches
from trainer.network.mixing import Mixing
from trainer.preset import Augmentation

SHAPE = (32, 32, 3)
COUNT = 103  # not a multiple of the batch size
BATCH = 20


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Each its own, so that it identifies the example."""
    return np.arange(COUNT)


@pytest.fixture(scope="module")
def transform_output(
    images: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> tft.TFTransformOutput:
    folder = tmp_path_factory.mktemp("transform")
    metadata = tft.DatasetMetadata.from_feature_spec(
        {
            "image": tf.io.FixedLenFeature([], tf.string),
            "label": tf.io.FixedLenFeature([], tf.int64),
        }
    )
    rows = [{"image": image.tobytes(), "label": 0} for image in images]
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(folder / "tmp")):
        data = (pipeline | beam.Create(rows), metadata)
        graph = data | tft_beam.AnalyzeDataset(preprocessing.preprocessing_fn)
        _ = graph | tft_beam.WriteTransformFn(str(folder / "graph"))
    return tft.TFTransformOutput(str(folder / "graph"))


def write_examples(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for image, label in zip(images, labels):
            feature = {
                "image": tf.train.Feature(
                    bytes_list=tf.train.BytesList(value=[image.tobytes()]),
                ),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                "superclass": tf.train.Feature(int64_list=tf.train.Int64List(value=[0])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())


def raw(images: np.ndarray) -> np.ndarray:
    return np.array([image.tobytes() for image in images], object)


def label_order(dataset: tf.data.Dataset) -> list[int]:
    return np.concatenate([label for _, label in dataset.as_numpy_iterator()]).tolist()


def test_reads_all_files_in_their_order(tmp_path: Path, images: np.ndarray, labels: np.ndarray):
    # Two patterns, one of two files; written in another order than that of their names.
    write_examples(tmp_path / "a" / "data-1.gz", images[40:70], labels[40:70])
    write_examples(tmp_path / "b" / "data-0.gz", images[70:], labels[70:])
    write_examples(tmp_path / "a" / "data-0.gz", images[:40], labels[:40])
    patterns = [str(tmp_path / "b" / "*"), str(tmp_path / "a" / "*")]
    first, first_labels = read_examples(patterns)
    assert first_labels.dtype == np.int64
    assert {len(image) for image in first} == {3072}
    # Files are read side by side, so examples of different files alternate, always alike.
    assert sorted(first_labels) == labels.tolist()
    by_label = dict(zip(first_labels.tolist(), first))
    assert [by_label[label] for label in range(COUNT)] == raw(images).tolist()
    again, again_labels = read_examples(patterns[::-1])
    assert again_labels.tolist() == first_labels.tolist()
    assert again.tolist() == first.tolist()


def test_reads_one_file_in_its_order(tmp_path: Path, images: np.ndarray, labels: np.ndarray):
    write_examples(tmp_path / "data.gz", images[::-1], labels[::-1])
    assert read_examples([str(tmp_path / "*")])[1].tolist() == labels.tolist()[::-1]


def test_a_folder_is_taken_by_its_name_whatever_characters_it_has(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray
):
    write_examples(tmp_path / "photos [ab]" / "data.gz", images[:3], labels[:3])
    write_examples(tmp_path / "photos a" / "data.gz", images[3:], labels[3:])
    assert read_examples([str(tmp_path / "photos [ab]" / "*")])[1].tolist() == [0, 1, 2]


def test_a_split_without_examples_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no examples in .*/Split-train/\*"):
        read_examples([str(tmp_path / "Split-train" / "*")])
    write_examples(tmp_path / "Split-train" / "data.gz", np.empty((0,)), np.empty((0,)))
    with pytest.raises(ValueError, match=r"no examples in .*/Split-train/\*"):
        read_examples([str(tmp_path / "Split-train" / "*")])


def test_batches(images: np.ndarray, labels: np.ndarray, transform_output: tft.TFTransformOutput):
    dataset = make_dataset(raw(images), labels, transform_output, SHAPE, batch_size=BATCH)
    image_spec, label_spec = dataset.element_spec
    assert (image_spec.shape.as_list(), image_spec.dtype) == ([None, 32, 32, 3], tf.float32)
    assert (label_spec.shape.as_list(), label_spec.dtype) == ([None], tf.int64)
    # The schedule's length and the progress bar come from it.
    assert len(dataset) == 6
    assert [len(label) for _, label in dataset.as_numpy_iterator()] == [20, 20, 20, 20, 20, 3]
    expected = preprocessing.normalize(images, *export.channel_statistics(transform_output))
    batches = np.concatenate([image for image, _ in dataset.as_numpy_iterator()])
    np.testing.assert_allclose(batches, expected, atol=1e-6)


def test_order_is_kept(
    images: np.ndarray, labels: np.ndarray, transform_output: tft.TFTransformOutput
):
    dataset = make_dataset(raw(images), labels, transform_output, SHAPE, batch_size=BATCH)
    assert label_order(dataset) == label_order(dataset) == labels.tolist()


STEPS = 6  # of a pass: the last batch has three examples


def batches_of(
    images: np.ndarray,
    labels: np.ndarray,
    transform_output: tft.TFTransformOutput,
    number: int,
    **options: Any,
) -> list[tuple[np.ndarray, np.ndarray]]:
    dataset = training_batches(
        raw(images), labels, transform_output, SHAPE, batch_size=BATCH, **options
    )
    return list(dataset.take(number).as_numpy_iterator())


def test_every_pass_has_another_order_of_all_examples(
    images: np.ndarray, labels: np.ndarray, transform_output: tft.TFTransformOutput
):
    def passes(seed: int) -> list[list[int]]:
        batches = batches_of(images, labels, transform_output, 3 * STEPS, seed=seed)
        assert [len(label) for _, label in batches] == 3 * [20, 20, 20, 20, 20, 3]
        order = np.concatenate([label for _, label in batches]).tolist()
        return [order[start : start + COUNT] for start in range(0, len(order), COUNT)]

    orders = passes(seed=1)
    assert all(sorted(order) == labels.tolist() for order in orders)
    assert len({tuple(order) for order in [*orders, labels.tolist()]}) == 4
    assert passes(seed=1) == orders
    assert passes(seed=2)[0] != orders[0]
    # Over the whole split, not within a window: the first batch comes from everywhere.
    assert max(orders[0][:BATCH]) - min(orders[0][:BATCH]) > COUNT // 2


@pytest.mark.parametrize("first_step", [STEPS, 2 * STEPS + 2])
def test_a_batch_and_its_mixing_depend_on_seed_and_step_alone(
    images: np.ndarray,
    labels: np.ndarray,
    transform_output: tft.TFTransformOutput,
    first_step: int,
):
    options = {"seed": 3, "mixing": Mixing(Augmentation(mixup=0.8, cutmix=1.0), COUNT)}
    whole = batches_of(images, labels, transform_output, 3 * STEPS, **options)
    rest = batches_of(
        images,
        labels,
        transform_output,
        3 * STEPS - first_step,
        first_step=first_step,
        **options,
    )
    for expected, continued in zip(whole[first_step:], rest, strict=True):
        for ours, theirs in zip(continued, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    shares = [label.tobytes() for _, label in whole]
    assert len(set(shares)) == len(shares)


def test_labels_stay_with_their_images(
    images: np.ndarray, labels: np.ndarray, transform_output: tft.TFTransformOutput
):
    expected = preprocessing.normalize(images, *export.channel_statistics(transform_output)).numpy()
    for image, label in batches_of(images, labels, transform_output, STEPS, seed=1):
        np.testing.assert_allclose(image, expected[label], atol=1e-6)
