import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset import format as binary
from dataset import pickled, synthetic
from dataset.format import DataError


def python2_pickle(value: Any) -> bytes:
    """Pickles as Python 2's cPickle did in protocol 2, NumPy arrays included."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, bytes):
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
    assert value.dtype == np.uint8
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"".join(map(_python2, value.shape)) + b"\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    dtype += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + _python2(value.tobytes()) + b"tb"


def python3_pickle(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


def batch(path: Path) -> dict[bytes, Any]:
    """What the official files hold, made from a binary file."""
    records = np.fromfile(path, np.uint8).reshape(-1, 3074)
    return {
        b"filenames": [b"image_%05d.png" % index for index in range(len(records))],
        b"batch_label": b"training batch 1 of 1",
        b"fine_labels": records[:, 1].tolist(),
        b"coarse_labels": records[:, 0].tolist(),
        b"data": np.ascontiguousarray(records[:, 2:]),
    }


def meta(folder: Path) -> dict[bytes, Any]:
    names = binary.read_label_names(folder)
    return {
        b"fine_label_names": [name.encode() for name in names.fine],
        b"coarse_label_names": [name.encode() for name in names.coarse],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.generate(tmp_path_factory.mktemp("data") / "set", train=200, test=100)


@pytest.fixture
def source(tmp_path: Path, folder: Path) -> Path:
    """A folder in the python form."""
    source = tmp_path / "cifar-100-python"
    source.mkdir()
    (source / "train").write_bytes(python2_pickle(batch(folder / "train.bin")))
    (source / "test").write_bytes(python2_pickle(batch(folder / "test.bin")))
    (source / "meta").write_bytes(python2_pickle(meta(folder)))
    return source


def test_pickles_of_these_tests_are_what_numpy_reads(folder: Path):
    expected = batch(folder / "test.bin")
    read = pickle.loads(python2_pickle(expected), encoding="bytes")
    np.testing.assert_array_equal(read.pop(b"data"), expected.pop(b"data"))
    assert read == expected


def test_round_trip_is_byte_exact(tmp_path: Path, source: Path, folder: Path):
    (tmp_path / "out").mkdir()
    pickled.convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(binary.FILES)
    for name in binary.FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("text_keys", [False, True])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_pickled_again_by_python_3(
    source: Path, folder: Path, tmp_path: Path, text_keys: bool, module: bytes
):
    content: dict[Any, Any] = batch(folder / "train.bin")
    content[b"data"] = np.asfortranarray(content[b"data"])
    if text_keys:
        content = {key.decode(): value for key, value in content.items()}
    data = python3_pickle(content)
    written = b"numpy._core" if b"cnumpy._core.multiarray\n" in data else b"numpy.core"
    data = data.replace(b"c" + written + b".multiarray\n", b"c" + module + b".multiarray\n")
    (source / "train").write_bytes(data)
    (tmp_path / "out").mkdir()
    pickled.convert(source, tmp_path / "out")
    assert (tmp_path / "out/train.bin").read_bytes() == (folder / "train.bin").read_bytes()


class Call:
    """Pickles to a call."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def test_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, source: Path):
    def attack(victim: Path) -> bytes:
        return pickle.dumps({b"data": Call(os.system, f"touch {victim}")}, protocol=2)

    pickle.loads(attack(tmp_path / "control"))
    assert (tmp_path / "control").exists()  # the attack works on those who use pickle.load

    (source / "test").write_bytes(attack(tmp_path / "victim"))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"test: it asks for (posix|nt)\.system.*nothing of it was"):
        pickled.convert(source, tmp_path / "out")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\neval\n(U\x011tR.",
        b"cnumpy.testing._private.utils\nrunstring\n(U\x011}tR.",
        b"cnumpy\nload\n(U\x011tR.",
        b"c_codecs\ndecode\n(U\x011tR.",
        b"\x8c\x08builtins\x8c\x04exec\x93\x8c\x011\x85R.",
    ],
)
def test_only_what_is_needed_is_allowed(tmp_path: Path, call: bytes):
    (tmp_path / "train").write_bytes(b"\x80\x04" + call)
    with pytest.raises(DataError, match=r"it asks for .*unsafe"):
        pickled.load(tmp_path / "train")


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_truncated_pickle(source: Path, kept: int):
    data = (source / "train").read_bytes()[:kept]
    (source / "train").write_bytes(data)
    with pytest.raises(DataError, match=rf"train \({len(data):,} bytes\) is truncated or damaged"):
        pickled.load(source / "train")


def test_damaged_in_any_place_is_an_error_of_ours(source: Path):
    """No byte of the structure makes the reader raise anything else."""
    path = source / "meta"
    data = path.read_bytes()
    raised = 0
    for index in range(0, 300):
        path.write_bytes(data[:index] + bytes([data[index] ^ 0x15]) + data[index + 1 :])
        try:
            pickled.load(path)
        except DataError:
            raised += 1
    assert raised > 20


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({b"data": np.zeros((100, 3072), np.float32)}, "array of type 'f4'"),
        ({b"data": np.zeros((100, 1024), np.uint8)}, r"planes must be uint8 \[N, 3072\]"),
        ({b"data": [1, 2]}, "data is a list"),
        ({b"fine_labels": [1] * 99}, r"100 images but fine labels of shape \(99,\)"),
        ({b"fine_labels": [300] * 100}, r"fine labels must be 0 to 255, got 300\.\.300"),
        ({b"coarse_labels": ["a"] * 100}, "coarse_labels is not a list of integers"),
    ],
)
def test_fields_that_do_not_fit(
    tmp_path: Path, source: Path, folder: Path, change: dict[bytes, Any], problem: str
):
    (source / "test").write_bytes(python3_pickle(batch(folder / "test.bin") | change))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=problem):
        pickled.convert(source, tmp_path / "out")


def test_missing_field_and_file(tmp_path: Path, source: Path):
    (tmp_path / "out").mkdir()
    (source / "test").write_bytes(python2_pickle({b"labels": []}))
    with pytest.raises(DataError, match=r"test lacks 'data' \(it has labels\)"):
        pickled.convert(source, tmp_path / "out")
    (source / "test").unlink()
    with pytest.raises(DataError, match="test does not exist"):
        pickled.convert(source, tmp_path / "out")
