import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset import format as binary
from dataset import synthetic
from dataset.files import StorageError, exclusive
from dataset.format import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return synthetic.generate(tmp_path / "set", train=300, test=100)


def damage(path: Path, offset: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] = value
    path.write_bytes(content)


def test_decode_record_turns_planes_into_pixels():
    planes = np.arange(3072, dtype=np.uint32).astype(np.uint8)
    image, fine, coarse = binary.decode_record(bytes([7, 42]) + planes.tobytes())
    assert (fine, coarse) == (42, 7)
    pixels = np.frombuffer(image, np.uint8).reshape(32, 32, 3)
    for row, column, channel in ((0, 0, 0), (0, 1, 0), (1, 0, 2), (31, 31, 1)):
        assert pixels[row, column, channel] == planes[channel * 1024 + row * 32 + column]


@pytest.mark.parametrize("length", [0, 3073, 3075])
def test_decode_record_refuses_another_length(length: int):
    with pytest.raises(DataError, match=f"{length:,} bytes instead of 3,074"):
        binary.decode_record(bytes(length))


def test_records_survive_writing_and_reading(tmp_path: Path):
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (5, 32, 32, 3), np.uint8)
    fine, coarse = np.array([0, 99, 5, 6, 7]), np.array([19, 0, 1, 2, 3])
    path = tmp_path / "train.bin"
    binary.write_records(path, images, fine, coarse)
    assert os.listdir(tmp_path) == ["train.bin"]
    read, read_fine, read_coarse = binary.read_records(path)
    assert (read.dtype, read_fine.dtype, read_coarse.dtype) == (np.uint8, np.int64, np.int64)
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(read_fine, fine)
    np.testing.assert_array_equal(read_coarse, coarse)
    # And the same through the other reader, record by record.
    content = path.read_bytes()
    for index in range(5):
        record = content[index * 3074 : (index + 1) * 3074]
        assert binary.decode_record(record) == (
            images[index].tobytes(),
            fine[index],
            coarse[index],
        )


def test_write_records_refuses_what_the_format_cannot_hold(tmp_path: Path):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"fine labels must be 0 to 255, got 1\.\.256"):
        binary.write_records(tmp_path / "a", images, [1, 256], [0, 0])
    with pytest.raises(ValueError, match="float32"):
        binary.write_records(tmp_path / "a", images.astype(np.float32), [1, 2], [0, 0])
    with pytest.raises(ValueError, match=r"2 images but coarse labels of shape \(3,\)"):
        binary.write_records(tmp_path / "a", images, [1, 2], [0, 0, 0])
    assert os.listdir(tmp_path) == []


def test_sound_folder_passes(folder: Path):
    assert binary.check_folder(folder) == (300, 100)
    names = binary.read_label_names(folder)
    assert (len(names.fine), len(names.coarse)) == (100, 20)


def test_missing_folder_and_file_in_its_place(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        binary.check_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        binary.check_folder(tmp_path / "file")


@pytest.mark.parametrize("name", binary.FILES)
def test_missing_file(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"lacks {name}"):
        binary.check_folder(folder)


def test_size_that_is_no_multiple_of_a_record(folder: Path):
    path = folder / "train.bin"
    os.truncate(path, 3074 * 299 + 1000)
    with pytest.raises(DataError, match=r"920,126 bytes.* 299 records .* 1,000 bytes over"):
        binary.check_folder(folder)
    with pytest.raises(DataError, match="truncated"):
        binary.read_records(path)


def test_empty_file(folder: Path):
    os.truncate(folder / "test.bin", 0)
    with pytest.raises(DataError, match=r"test\.bin is empty"):
        binary.check_folder(folder)


@pytest.mark.parametrize(("column", "value", "kind"), [(1, 100, "fine"), (0, 20, "coarse")])
def test_label_out_of_range(folder: Path, column: int, value: int, kind: str):
    damage(folder / "test.bin", 3074 * 57 + column, value - 1)
    binary.check_folder(folder)  # the last legal label
    damage(folder / "test.bin", 3074 * 57 + column, value)
    with pytest.raises(DataError, match=rf"test\.bin: record 57 has {kind} label {value}"):
        binary.check_folder(folder)


def test_names_with_the_wrong_number_of_lines(folder: Path):
    path = folder / "fine_label_names.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match=r"fine_label_names\.txt has 99 lines .*: give each"):
        binary.check_folder(folder)
    path.write_text("\r\n".join(lines) + "\r\n\r\n")  # edited on Windows: sound
    assert binary.read_label_names(folder).fine == tuple(lines)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("", "line 3 is blank.*: write it there"), ("fish", "line 3 repeats .* of line 2: give each")],
)
def test_unusable_name(folder: Path, name: str, problem: str):
    path = folder / "coarse_label_names.txt"
    lines = path.read_text().splitlines()
    lines[1:3] = ["fish", name]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=problem):
        binary.check_folder(folder)


def test_blank_line_among_the_names_shifts_no_labels():
    """Whether the names (20) or the lines (19 names and a blank) come to the right number."""
    lines = [f"thing {index}" for index in range(20)]
    assert binary.parse_label_names("\n".join(lines) + "\n\n", 20, "a.txt") == tuple(lines)
    for index in (0, 7):
        for kept in (19, 20):
            text = "\n".join([*lines[:index], " ", *lines[index:kept]])
            with pytest.raises(DataError, match=rf"s3://a\.txt: line {index + 1} is blank"):
                binary.parse_label_names(text, 20, "s3://a.txt")
    with pytest.raises(DataError, match=r"a\.txt: line 1 is blank"):
        binary.parse_label_names("", 20, "a.txt")


def test_count_records():
    assert binary.count_records(2 * 3074, "train.bin") == 2
    with pytest.raises(DataError, match=r"s3://train\.bin is empty"):
        binary.count_records(0, "s3://train.bin")
    for size in (1, 3073, 3075):
        with pytest.raises(DataError, match=rf"s3://train\.bin has {size:,} bytes"):
            binary.count_records(size, "s3://train.bin")


def test_fingerprint_follows_contents_alone(folder: Path, tmp_path: Path):
    before = binary.fingerprint(folder)
    assert len(before) == 64
    os.utime(folder / "train.bin", (0, 0))
    assert binary.fingerprint(folder.rename(tmp_path / "elsewhere")) == before
    seen = {before}
    for name in binary.FILES:
        path = tmp_path / "elsewhere" / name
        content = path.read_bytes()
        damage(path, len(content) - 2, content[-2] ^ 1)
        seen.add(binary.fingerprint(tmp_path / "elsewhere"))
        path.write_bytes(content)
    assert len(seen) == 5
    assert binary.fingerprint(tmp_path / "elsewhere") == before


def test_fingerprint_tells_where_one_file_ends(folder: Path):
    before = binary.fingerprint(folder)
    train, test = folder / "train.bin", folder / "test.bin"
    content = train.read_bytes()
    train.write_bytes(content[:-3074])
    test.write_bytes(content[-3074:] + test.read_bytes())
    assert binary.fingerprint(folder) != before


def test_package_needs_no_tensorflow():
    code = (
        "import sys, dataset.locate; "
        "print([m for m in ('tensorflow', 'tfx', 'apache_beam', 'keras') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_in_place_of_the_lock_is_named(tmp_path: Path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(StorageError, match=r"\.lock: it is a folder, .*: remove or rename it"),
        exclusive(tmp_path, report=print),
    ):
        pass
