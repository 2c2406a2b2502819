import bz2
import io
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset import archive, synthetic
from dataset.format import FILES, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.generate(tmp_path_factory.mktemp("data") / "set", train=300, test=100)


def make_tar(path: Path, folder: Path, *extra: tarfile.TarInfo, mode: str = "w:gz") -> Path:
    """The folder as an archive, with further members in front."""
    with tarfile.open(path, mode) as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
        tar.add(folder, "cifar-100-binary")
    return path


def member(name: str, **attributes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_extracts_the_files_alone(tmp_path: Path, folder: Path, mode: str):
    extra = member("cifar-100-binary/file.txt~", size=10), member("cifar-100-binary/._train.bin")
    path = make_tar(tmp_path / "a", folder, *extra, mode=mode)
    assert archive.extract(path, tmp_path / "out") == "binary"
    assert sorted(os.listdir(tmp_path / "out")) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.9999])
def test_truncated_archive(tmp_path: Path, folder: Path, kept: float):
    path = make_tar(tmp_path / "a.tar.gz", folder)
    size = int(path.stat().st_size * kept)
    os.truncate(path, size)
    with pytest.raises(DataError, match=rf"a\.tar\.gz \({size:,} bytes\) is truncated or damaged"):
        archive.extract(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_flipped_bit_is_noticed(tmp_path: Path, folder: Path):
    """Stored, not deflated: only the checksum at the end of the stream can tell."""
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(folder, "cifar-100-binary")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        archive.extract(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (member("../train.bin", size=5), r"'\.\./train\.bin' would be written outside"),
        (member("a/../../train.bin", size=5), "would be written outside"),
        (member("/tmp/train.bin", size=5), "would be written outside"),
        (
            member("train.bin", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "is a link .*/etc/passwd",
        ),
        (member("train.bin", type=tarfile.LNKTYPE, linkname="b"), "is a link"),
        (member("test.bin", type=tarfile.FIFOTYPE), "is not a plain file"),
        (member("test.bin", type=tarfile.CHRTYPE), "is not a plain file"),
    ],
)
def test_unsafe_member(tmp_path: Path, folder: Path, bad: tarfile.TarInfo, problem: str):
    path = make_tar(tmp_path / "a.tar.gz", folder, bad)
    with pytest.raises(DataError, match=problem):
        archive.extract(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_member_that_claims_to_be_huge(tmp_path: Path):
    header = member("train.bin", size=600 << 20).tobuf()
    (tmp_path / "a.tar").write_bytes(header)
    with pytest.raises(DataError, match=r"'train\.bin' has 629,145,600 bytes"):
        archive.extract(tmp_path / "a.tar", tmp_path / "out")


def test_decompression_bomb(tmp_path: Path, folder: Path):
    """Zeros that pass each member's check, and zeros behind the last member."""
    many = [member(f"filler{index}", size=1 << 20) for index in range(4)]
    path = make_tar(tmp_path / "a.tar.gz", folder, *many)
    with pytest.raises(DataError, match=r"unpacks to more than 3,145,728 bytes \(at member 'fill"):
        archive.extract(path, tmp_path / "out", max_bytes=3 << 20)
    plain = make_tar(tmp_path / "b.tar", folder, mode="w")
    with open(plain, "ab") as file:
        file.truncate(4 << 20)
    with pytest.raises(DataError, match="unpacks to more than"):
        archive.extract(plain, tmp_path / "out", max_bytes=3 << 20)
    assert not (tmp_path / "out").exists()


def test_archive_of_something_else(tmp_path: Path, folder: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "train.bin", "notes.bin")
    with pytest.raises(DataError, match="none of CIFAR-100's or CIFAR-10's files"):
        archive.extract(tmp_path / "a.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_zip(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cifar-100-binary/train.bin", content)


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_zip, r"looks like a zip archive \(it begins with the bytes 50 4b 03 04"),
        (lambda path, content: path.write_bytes(lzma.compress(content)), "an xz-compressed file"),
        (lambda path, content: path.write_bytes(bz2.compress(content)), "a bzip2-compressed file"),
        (lambda path, content: path.write_bytes(pickle.dumps(content)), "a pickle"),
        (lambda path, content: path.write_text("<html>not found</html>"), "a web page"),
        (lambda path, content: path.write_bytes(content), r"no kind known here .*bytes 0. .. "),
    ],
    ids=["zip", "xz", "bz2", "pickle", "page", "train.bin"],
)
def test_file_that_is_no_archive_of_this_kind(
    tmp_path: Path, folder: Path, write: Callable[[Path, bytes], object], kind: str
):
    write(tmp_path / "a.tar.gz", (folder / "train.bin").read_bytes())
    with pytest.raises(DataError, match=f"not a gzip-compressed tar archive: it .*{kind}.*: give "):
        archive.extract(tmp_path / "a.tar.gz", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_file_twice(tmp_path: Path, folder: Path):
    path = make_tar(tmp_path / "a.tar.gz", folder, member("other/test.bin", size=3074))
    with pytest.raises(DataError, match=r"two files 'test\.bin'"):
        archive.extract(path, tmp_path / "out")
