import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.types import artifact_utils, standard_artifacts

from components.example_gen.component import Cifar100ExampleGen
from components.example_gen.executor import Executor
from dataset import format as binary
from dataset import synthetic
from dataset.card import CARD_FILE, SPLITS, DataCard, Superclasses, from_json
from dataset.format import DataError
from dataset.locate import locate
from pipeline.execution import beam_arguments

Split = tuple[list[bytes], list[int], list[int]]


def ingest(
    folder: Path, output: Path, limit: int | None = None, dataset_name: str = "synthetic"
) -> standard_artifacts.Examples:
    """Runs the executor with the component's own properties, as an orchestrator without drivers."""
    component = Cifar100ExampleGen(
        str(folder), dataset_name=dataset_name, content_fingerprint="f1", limit=limit
    )
    properties: dict[str, Any] = dict(component.exec_properties)
    assert not {"span", "version"} & {key for key, value in properties.items() if value is not None}
    examples = standard_artifacts.Examples()
    examples.uri = str(output)
    context = BaseBeamExecutor.Context(
        beam_pipeline_args=beam_arguments(workers=1),
        tmp_dir=str(output.parent / "tmp"),
        unique_id="1",
    )
    Executor(context).Do({}, {"examples": [examples]}, properties)
    return examples


def read_split(examples: standard_artifacts.Examples, split: str) -> Split:
    """Reads (images, fine labels, coarse labels), ordered by image since Beam keeps no order."""
    folder = artifact_utils.get_split_uri([examples], split)
    files = [os.path.join(folder, name) for name in os.listdir(folder)]
    rows = []
    for record in tf.data.TFRecordDataset(files, compression_type="GZIP").as_numpy_iterator():
        feature = tf.train.Example.FromString(record).features.feature
        assert sorted(feature) == ["superclass", "label", "image"]
        (image,) = feature["image"].bytes_list.value
        (fine,) = feature["label"].int64_list.value
        (coarse,) = feature["superclass"].int64_list.value
        rows.append((image, fine, coarse))
    images, fine_labels, coarse_labels = zip(*sorted(rows))
    return list(images), list(fine_labels), list(coarse_labels)


def expected_split(file: Path, begin: int, end: int) -> Split:
    images, fine, coarse = binary.read_records(file)
    rows = sorted(
        (images[index].tobytes(), int(fine[index]), int(coarse[index]))
        for index in range(begin, end)
    )
    ordered_images, fine_labels, coarse_labels = zip(*rows)
    return list(ordered_images), list(fine_labels), list(coarse_labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.generate(tmp_path_factory.mktemp("data") / "set", train=1005, test=250)


@pytest.fixture(scope="module")
def examples(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> standard_artifacts.Examples:
    return ingest(folder, tmp_path_factory.mktemp("examples") / "output")


def test_each_split_holds_exactly_its_records(folder: Path, examples: standard_artifacts.Examples):
    # The last tenth of train.bin, rounded down, is the validation split: 905 and 100 of 1,005.
    assert read_split(examples, "train") == expected_split(folder / "train.bin", 0, 905)
    assert read_split(examples, "validation") == expected_split(folder / "train.bin", 905, 1005)
    assert read_split(examples, "test") == expected_split(folder / "test.bin", 0, 250)


def test_pixels_are_rows_of_rgb(folder: Path, examples: standard_artifacts.Examples):
    images, _, _ = binary.read_records(folder / "test.bin")
    pixels = np.frombuffer(read_split(examples, "test")[0][0], np.uint8).reshape(32, 32, 3)
    assert any(np.array_equal(pixels, image) for image in images)


def test_artifact_says_what_it_holds(examples: standard_artifacts.Examples):
    assert artifact_utils.decode_split_names(examples.split_names) == list(SPLITS)
    assert examples.get_string_custom_property("payload_format") == "FORMAT_TF_EXAMPLE"
    assert examples.get_string_custom_property("file_format") == "tfrecords_gzip"
    assert examples.get_string_custom_property("dataset_name") == "synthetic"
    assert examples.get_string_custom_property("content_fingerprint") == "f1"


def read_card(examples: standard_artifacts.Examples) -> DataCard:
    path = Path(examples.uri, CARD_FILE)
    return from_json(path.read_text(), str(path))


def test_card_carries_the_class_names(folder: Path, examples: standard_artifacts.Examples):
    _, fine, coarse = binary.read_records(folder / "train.bin")
    superclass = dict(zip(fine.tolist(), coarse.tolist()))
    card = read_card(examples)
    assert (card.name, card.limit, card.subset) == ("synthetic", None, False)
    assert (card.source.kind, card.source.fingerprint) == ("synthetic", "f1")
    assert card.classes == synthetic.LABEL_NAMES.fine
    assert card.superclasses == Superclasses(
        synthetic.LABEL_NAMES.coarse, tuple(superclass.get(label) for label in range(100))
    )


def test_card_says_when_the_data_are_a_part_of_cifar_100(
    folder: Path, limited: standard_artifacts.Examples, tmp_path: Path
):
    assert read_card(limited).subset
    fewer_records = ingest(folder, tmp_path / "output", dataset_name="cifar-100")
    assert read_card(fewer_records).subset


@pytest.fixture(scope="module")
def limited(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> standard_artifacts.Examples:
    return ingest(folder, tmp_path_factory.mktemp("limited") / "output", limit=230)


@pytest.mark.parametrize(
    ("split", "begin", "end"), [("train", 0, 905), ("validation", 905, 1005), ("test", 0, 250)]
)
def test_limit_takes_the_first_of_each_class(
    folder: Path,
    limited: standard_artifacts.Examples,
    split: str,
    begin: int,
    end: int,
):
    # 230 of 100 classes: three of each class below 30 and two of the others.
    file = "test.bin" if split == "test" else "train.bin"
    images, fine, _ = (values[begin:end] for values in binary.read_records(folder / file))
    chosen: list[bytes] = []
    for label in range(100):
        indices = np.flatnonzero(fine == label)[: 3 if label < 30 else 2]
        chosen += [images[index].tobytes() for index in indices]
    assert read_split(limited, split)[0] == sorted(chosen)


def test_limit_takes_the_same_examples_again(
    folder: Path, limited: standard_artifacts.Examples, tmp_path: Path
):
    again = ingest(folder, tmp_path / "again", limit=230)
    for split in SPLITS:
        assert read_split(again, split) == read_split(limited, split)


def test_real_images(real_data: Path, tmp_path: Path):
    folder = copy(locate(str(real_data), tmp_path / "work").folder, tmp_path / "set")
    os.truncate(folder / "train.bin", 500 * binary.RECORD_BYTES)
    os.truncate(folder / "test.bin", 100 * binary.RECORD_BYTES)
    examples = ingest(folder, tmp_path / "output")
    assert read_split(examples, "train") == expected_split(folder / "train.bin", 0, 450)
    assert read_split(examples, "validation") == expected_split(folder / "train.bin", 450, 500)
    assert read_split(examples, "test") == expected_split(folder / "test.bin", 0, 100)


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in binary.FILES:
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("name", ["train.bin", "test.bin"])
def test_missing_file(folder: Path, tmp_path: Path, name: str):
    broken = copy(folder, tmp_path / "set")
    (broken / name).unlink()
    with pytest.raises(DataError, match=rf"{name} does not exist; the data folder must hold"):
        ingest(broken, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", ["train.bin", "test.bin"])
def test_size_that_is_no_multiple_of_a_record(folder: Path, tmp_path: Path, name: str):
    broken = copy(folder, tmp_path / "set")
    os.truncate(broken / name, 100 * 3074 + 17)
    with pytest.raises(
        DataError, match=rf"{name} has 307,417 bytes, which is 100 records .* and 17 bytes over"
    ):
        ingest(broken, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_missing_class_names(folder: Path, tmp_path: Path):
    broken = copy(folder, tmp_path / "set")
    (broken / "coarse_label_names.txt").unlink()
    with pytest.raises(DataError, match=r"coarse_label_names\.txt does not exist"):
        ingest(broken, tmp_path / "output")
    assert not (tmp_path / "output").exists()
