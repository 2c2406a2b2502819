"""Unpacking CIFAR's tar archives, which may come from anywhere, without trusting them."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

from dataset import format as binary
from dataset import pickled
from dataset.format import DataError

Form = Literal["binary", "python"]

# The official archives unpack to 185 to 187 MB.
MAX_UNPACKED_BYTES = 512 << 20
_BLOCK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_EXPECTED = (
    "give cifar-100-binary.tar.gz, cifar-100-python.tar.gz, one of CIFAR-10's, or the folder that "
    "it unpacks to"
)
# How files begin that are given by mistake, and what they are.
_OTHER_MAGIC = (
    (b"PK", "a zip archive"),
    (b"\xfd7zXZ\0", "an xz-compressed file"),
    (b"BZh", "a bzip2-compressed file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard-compressed file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"<", "a web page"),
    (b"\x80", "a pickle"),
)


class _BoundedReader(io.RawIOBase):
    """Reads a stream and stops it when it goes on for longer than any real archive could."""

    def __init__(self, stream: IO[bytes], limit: int):
        self._stream = stream
        self._left = limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(block)
        if self._left < 0:
            raise _TooLongError
        return block


class _TooLongError(Exception):
    pass


def extract(archive: Path, folder: Path, *, max_bytes: int = MAX_UNPACKED_BYTES) -> Form:
    """Extracts the data set's files, and only them, from a tar archive (gzipped or plain).

    The archive is read once as a stream. Names are checked before anything is written; files that
    are no part of the data set (the official python archive holds an editor's backup) are skipped.

    Args:
      archive: The archive.
      folder: The folder to make and to fill with the files, without the archive's own folders.
      max_bytes: More than this after decompression is refused.

    Returns:
      Which form the archive holds: 'binary' (`train.bin`, ...) or 'python' (`train`, ...).

    Raises:
      DataError: For an archive that is damaged, unsafe, or holds no CIFAR. `folder` is then
        not left behind.
    """
    folder.mkdir()
    try:
        found = _extract_members(archive, folder, max_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    for form, files in _FILES:
        if found and found <= set(files):
            return form
    shutil.rmtree(folder, ignore_errors=True)
    what = "files of several forms of CIFAR" if found else "none of CIFAR-100's or CIFAR-10's files"
    raise DataError(f"{archive} holds {what}: {_EXPECTED}")


_FILES: tuple[tuple[Form, tuple[str, ...]], ...] = (
    *(("binary", layout.files) for layout in binary.LAYOUTS),
    *(("python", form.files) for form in pickled.FORMS),
)


def _extract_members(archive: Path, folder: Path, max_bytes: int) -> set[str]:
    """Extracts what is wanted and returns the names found."""
    wanted = {name for _, files in _FILES for name in files}
    found: set[str] = set()
    last = "its first member"
    try:
        with open(archive, "rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not zipped:
                _check_is_tar(archive, raw.read(tarfile.BLOCKSIZE))
                raw.seek(0)
            # gzip's own reader, not tarfile's: only it verifies the checksum at the stream's end.
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else raw
            bounded = _BoundedReader(stream, max_bytes)
            with tarfile.open(fileobj=bounded, mode="r|", bufsize=_BLOCK) as tar:
                for member in tar:
                    last = f"member {member.name!r}"
                    name = _checked_name(archive, member, max_bytes)
                    if not member.isreg() or name not in wanted:
                        continue
                    if name in found:
                        raise DataError(f"{archive} holds two files {name!r}: not CIFAR's")
                    found.add(name)
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file has content
                    with open(folder / name, "wb") as target:
                        shutil.copyfileobj(content, target, _BLOCK)
            while bounded.read(_BLOCK):  # to the end, where the checksum is
                pass
    except DataError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DataError(
            f"{archive} ({archive.stat().st_size:,} bytes) is truncated or damaged at {last}: "
            f"{error}: copy or download it again"
        ) from error
    except _TooLongError:
        raise DataError(
            f"{archive} unpacks to more than {max_bytes:,} bytes (at {last}), CIFAR has 185 "
            "million: this is not the data set, and unpacking stopped"
        ) from None
    return found


def _check_is_tar(archive: Path, head: bytes) -> None:
    """Refuses a file that is not even the beginning of a plain tar archive.

    Args:
      archive: The file, which is not gzipped.
      head: Its first block; 512 bytes, less if the file is shorter.

    Raises:
      DataError: If it is something else; an empty file is left to the caller.
    """
    try:
        if head:
            tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        known = [what for magic, what in _OTHER_MAGIC if head.startswith(magic)]
        guess = f"looks like {known[0]}" if known else "is of no kind known here"
        raise DataError(
            f"{archive} is not a gzip-compressed tar archive: it {guess} (it begins with the bytes "
            f"{head[:6].hex(' ')}): {_EXPECTED}"
        ) from None


def _checked_name(archive: Path, member: tarfile.TarInfo, max_bytes: int) -> str:
    """Refuses a dangerous member, else returns its name without folders."""
    path = PurePosixPath(member.name)
    problem = None
    if path.is_absolute() or ".." in path.parts:
        problem = "would be written outside the folder"
    elif member.issym() or member.islnk():
        problem = f"is a link (to {member.linkname!r})"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        problem = "is not a plain file"
    elif member.size > max_bytes:
        problem = f"has {member.size:,} bytes, where all of CIFAR has 185 million"
    if problem:
        raise DataError(
            f"{archive}: member {member.name!r} {problem}: unsafe, nothing was unpacked; "
            "get the archive from its author (https://www.cs.toronto.edu/~kriz/cifar.html)"
        )
    return path.name
