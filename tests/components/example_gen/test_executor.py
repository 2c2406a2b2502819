import os
from pathlib import Path

import numpy as np
import pytest
from tfx.types import artifact_utils, standard_artifacts

from dataset import format as binary
from dataset import synthetic
from dataset.card import SPLITS, Superclasses
from dataset.format import DataError
from dataset.locate import locate
from tests.support.ingest import digest, files, ingest, read_card, read_rows

Split = tuple[list[bytes], list[int], list[int]]


def read_split(examples: standard_artifacts.Examples, split: str) -> Split:
    """Reads (images, fine labels, coarse labels) in the order of the images' bytes."""
    images, fine_labels, coarse_labels = zip(*sorted(read_rows(examples, split)))
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


def test_card_carries_the_class_names(folder: Path, examples: standard_artifacts.Examples):
    _, fine, coarse = binary.read_records(folder / "train.bin")
    superclass = dict(zip(fine.tolist(), coarse.tolist()))
    card = read_card(examples)
    assert (card.name, card.limit, card.subset) == ("synthetic", None, False)
    assert (card.source.kind, card.source.fingerprint) == (
        "synthetic",
        binary.fingerprint(folder),
    )
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
    os.truncate(folder / "train.bin", 2000 * binary.RECORD_BYTES)  # of every class
    os.truncate(folder / "test.bin", 100 * binary.RECORD_BYTES)
    examples = ingest(folder, tmp_path / "output")
    assert read_split(examples, "train") == expected_split(folder / "train.bin", 0, 1800)
    assert read_split(examples, "validation") == expected_split(folder / "train.bin", 1800, 2000)
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


# Of what this project's first ExampleGen made of the same files, whatever the order.
SYNTHETIC_DIGESTS = {
    (None, "train"): "6b0e41110b9164e9c717c082f0ea234c4c45c15e342a7fddd960b82cce81cf02",
    (None, "validation"): "a7fbf097e1f03f21ed3961ff1f1a2304551c0008865cf9ceaba551f2adc41931",
    (None, "test"): "424d84b011ac2d40e89b5f4ce83b7f065c26857389dbedbbb2a6e5682630af4a",
    (230, "train"): "bf4d54a11813b3ac076dbe5c28271334434cff6bbcdec92afbe23194cf5adb12",
    (230, "validation"): "c2ec2416cb402729e93326d244c9499dd7071b9f6b6d44f0ee1b2bed4031a405",
    (230, "test"): "08ae210adb561fb0efa0481d575720654a7e8519a9d3b03007834f6af53a6010",
}
CIFAR_100_DIGESTS = {
    (None, "train"): "61d3b20881d8ff8ad0004151daa40a3281e8d27cc59f44f976a9b014bb9f1875",
    (None, "validation"): "23220753ee316a5a49ea7321b541eb2de45f14924c50641ff49cfc671a655e0d",
    (None, "test"): "b3dd1c2b260aebe533b65fe6bd2822badc19aa5436d4c186eae1c79901e08aaa",
    (230, "train"): "ef476785233bdc1e9b5d4ee7e6939df6d59c9b8f5cfd9092dd45dafaefb7a8b1",
    (230, "validation"): "673857e53b09342beba2678791e06072857de4e7c5afff7561b977f29343a06a",
    (230, "test"): "9f7f9254c6c7a1bbb5a30b2231ae17d4a573fbc54da103734bb68f565d66ef55",
}


@pytest.mark.parametrize("limit", [None, 230])
@pytest.mark.parametrize("name", ["synthetic", "cifar-100"])
def test_examples_are_those_of_the_first_version(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest, name: str, limit: int | None
):
    expected = SYNTHETIC_DIGESTS
    if name == "cifar-100":
        expected = CIFAR_100_DIGESTS
        data = request.getfixturevalue("real_data")
        folder = locate(str(data), tmp_path / "work").folder
    examples = ingest(folder, tmp_path / "output", limit=limit, dataset_name=name)
    for split in SPLITS:
        rows = read_rows(examples, split)
        assert digest(rows) == expected[limit, split]
        assert read_card(examples).splits[split].examples == len(rows)


def test_the_same_data_give_the_same_bytes(folder: Path, tmp_path: Path):
    """In the order of the records, also with several processes that finish as they can."""
    one, two = (ingest(folder, tmp_path / f"of {n}" / "output", workers=n) for n in (1, 2))
    for split in SPLITS:
        for path, other in zip(files(one, split), files(two, split), strict=True):
            assert Path(path).name == Path(other).name
            assert Path(path).read_bytes() == Path(other).read_bytes()
    images, _, _ = binary.read_records(folder / "train.bin")
    assert [row.image for row in read_rows(one, "train")] == [x.tobytes() for x in images[:905]]
