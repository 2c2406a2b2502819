"""Finding CIFAR-100: where the user says, where it usually is, on the web, or a stand-in."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dataset import format as binary
from dataset import pickled, synthetic, unpacked
from dataset.download import (
    OFFICIAL_BINARY,
    OFFICIAL_PYTHON_MD5,
    RemoteArchive,
    UnreachableError,
    fetch,
)
from dataset.files import StorageError, exclusive, make_folder
from dataset.format import DataError, RecordCounts
from dataset.hashing import md5_of
from dataset.unpacked import CIFAR_100

SYNTHETIC = "synthetic"

_OFFICIAL_COUNTS = RecordCounts(binary.OFFICIAL_TRAIN_RECORDS, binary.OFFICIAL_TEST_RECORDS)
_SYNTHETIC_SEED = 0
_BINARY_FOLDER = "cifar-100-binary"
_PYTHON_FOLDER = "cifar-100-python"
# Looked for inside a folder, in this order. The last two are Keras 3's names for the python form.
_FOLDERS = ("", _BINARY_FOLDER, _PYTHON_FOLDER, f"{_PYTHON_FOLDER}-target/{_PYTHON_FOLDER}")
_ARCHIVES = (
    f"{_BINARY_FOLDER}.tar.gz",
    f"{_PYTHON_FOLDER}.tar.gz",
    f"{_PYTHON_FOLDER}-target_archive",
)
_BANNER_WIDTH = 96


@dataclass(frozen=True)
class Dataset:
    """A checked data set in the binary layout.

    Attributes:
      folder: Where `train.bin`, `test.bin` and the names are.
      name: 'cifar-100' or 'synthetic'; goes into everything made from the data.
      source: Where it came from, for people.
      fingerprint: SHA-256 of the contents, 64 hexadecimal digits.
      subset: Whether it is CIFAR-100 with fewer records than the official ones.
    """

    folder: Path
    name: str
    source: str
    fingerprint: str
    subset: bool


class _Found(NamedTuple):
    form: Literal["binary", "python", "archive"]
    path: Path


def locate(
    data: str | None,
    work_dir: Path,
    *,
    search_dir: Path = Path("data"),
    keras_cache: Path | None = None,
    download: bool = True,
    remote: RemoteArchive = OFFICIAL_BINARY,
    synthetic_records: tuple[int, int] = _OFFICIAL_COUNTS,
    report: Callable[[str], None] = print,
) -> Dataset:
    """Finds the data set, unpacks or converts it if need be, and checks it.

    Looks at `data`, or without it in `search_dir`, in Keras's cache and at the author's address;
    if nothing is there and that address cannot be reached, makes the synthetic set and says so in a
    banner. What is unpacked, downloaded or generated is kept in `work_dir/data` and found there by
    the next run. The folder is named after the contents: the same data are in the same place,
    whichever form they came in.

    Args:
      data: A folder (in either form, or one that holds such a folder or an archive), an archive, or
        the word 'synthetic' (a folder of that name is './synthetic'); None to search.
      work_dir: Made if needed, and not touched where the data can be used in place.
      search_dir: The first place searched.
      keras_cache: The second; None for Keras's own, which follows KERAS_HOME.
      download: Whether the web may be asked.
      remote: The archive to download.
      synthetic_records: How many training and test records the synthetic set gets.
      report: Called with each line meant for the user.

    Returns:
      The data set.

    Raises:
      DataError: If `data`, or what is in `search_dir`, is wrong in any way, or a download breaks
        off or gives something else. There is no fallback to other data in these cases.
      StorageError: Likewise, if `work_dir` cannot be written to or its copy of the data is damaged.
    """
    store = work_dir / "data"
    cache = keras_cache or Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras", "datasets")
    try:
        return _locate(
            data, store, search_dir, cache, remote if download else None, synthetic_records, report
        )
    except OSError as error:  # what cannot be written is told apart further down
        raise DataError(
            f"cannot read {error.filename or 'the data'}: {error.strerror or error}: "
            "check the permissions and the disk"
        ) from error


def _locate(
    data: str | None,
    store: Path,
    search_dir: Path,
    cache: Path,
    remote: RemoteArchive | None,
    synthetic_records: tuple[int, int],
    report: Callable[[str], None],
) -> Dataset:
    if data == SYNTHETIC:
        return _synthesize(store, synthetic_records, report)
    if data is not None:
        return _prepare(_find_explicit(data), store, report)

    if found := _find(search_dir):
        return _prepare(found, store, report)
    if found := _find(cache):
        try:
            return _prepare(found, store, report)
        except StorageError:
            raise
        except DataError as error:  # Keras leaves broken downloads there; nobody named this one
            report(f"data: passing over what is in Keras's cache: {error}")
    if remote:
        try:
            return _download(remote, store, report)
        except UnreachableError as error:
            failure = str(error)
    else:
        failure = "downloading is switched off"
    report(_banner(search_dir, cache, failure))
    return _synthesize(store, synthetic_records, report)


def _find(folder: Path) -> _Found | None:
    """Looks for the data set in a folder, preferring what needs no unpacking."""
    for name in _FOLDERS:
        path = folder / name
        if (path / binary.TRAIN_FILE).is_file() or (path / binary.TEST_FILE).is_file():
            return _Found("binary", path)
        if pickled.is_python_folder(path):
            return _Found("python", path)
    for name in _ARCHIVES:
        if (folder / name).is_file():
            return _Found("archive", folder / name)
    return None


def _find_explicit(data: str) -> _Found:
    path = Path(data).expanduser()
    if not data or not path.exists():
        raise DataError(
            f"data {data!r} does not exist: give a folder or archive of CIFAR-100, "
            f"or '{SYNTHETIC}' for the built-in stand-in"
        )
    if path.is_file():
        return _Found("archive", path)
    if not path.is_dir():
        raise DataError(f"data {data!r} is neither a folder nor a file")
    found = _find(path)
    if found is None:
        have = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise DataError(
            f"data folder {path} holds no CIFAR-100 (it has {have}): expected {binary.TRAIN_FILE} "
            f"and {binary.TEST_FILE}, {_BINARY_FOLDER}/, {_PYTHON_FOLDER}/ or an archive "
            f"({', '.join(_ARCHIVES[:2])})"
        )
    return found


def _prepare(found: _Found, store: Path, report: Callable[[str], None]) -> Dataset:
    """Brings what was found into the binary layout, once, and checks it."""
    source = str(found.path.absolute())
    if found.form == "binary":
        return _checked(found.path, source, report)
    parts = [found.path]
    if found.form == "python":
        parts = [found.path / name for name in pickled.FILES]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise DataError(
                f"{found.path} lacks {', '.join(missing)}: unpack the whole of "
                f"{_PYTHON_FOLDER}.tar.gz"
            )
    md5 = md5_of(*parts)
    make_folder(store)
    with exclusive(store, report=report):
        folder = unpacked.find(store, md5)
        if folder is None:
            report(f"data: unpacking {source} to {store}")
            folder = unpacked.add(store, md5, found.path)
    if found.form == "archive" and md5 not in (OFFICIAL_BINARY.md5, OFFICIAL_PYTHON_MD5):
        report(
            f"data: {found.path.name} is not byte-identical to an official archive (md5 {md5}): "
            "its contents are checked instead"
        )
    return _checked_unpacked(folder, source, report)


def _download(remote: RemoteArchive, store: Path, report: Callable[[str], None]) -> Dataset:
    make_folder(store)
    with exclusive(store, report=report):
        folder = unpacked.find(store, remote.md5)
        if folder is None:
            report(f"data: no CIFAR-100 on this machine, downloading {remote.url} to {store}")
            archive = store / remote.url.rpartition("/")[2]
            fetch(remote.url, archive, remote.md5)
            report(f"data: unpacking {archive} to {store}")
            folder = unpacked.add(store, remote.md5, archive)
            archive.unlink()  # what it unpacked to is all that later runs need
    return _checked_unpacked(folder, remote.url, report)


def _synthesize(store: Path, records: tuple[int, int], report: Callable[[str], None]) -> Dataset:
    train, test = records
    version = f"v{synthetic.GENERATOR_VERSION}"
    folder = store / f"{SYNTHETIC}-{version}-seed{_SYNTHETIC_SEED}-{train}-{test}"
    make_folder(store)
    with exclusive(store, report=report):
        if not folder.is_dir():
            report(f"data: generating the synthetic set in {folder}")
            synthetic.generate(folder, seed=_SYNTHETIC_SEED, train=train, test=test)
    return _checked_copy(folder, f"the built-in generator, seed {_SYNTHETIC_SEED}", report)


def _checked_copy(folder: Path, source: str, report: Callable[[str], None]) -> Dataset:
    """Checks what this program has made, now or in an earlier run."""
    try:
        return _checked(folder, source, report)
    except DataError as error:
        raise StorageError(f"{error}; or remove {folder}, to have it made again") from None


def _checked_unpacked(folder: Path, source: str, report: Callable[[str], None]) -> Dataset:
    """Checks a folder that was named after its contents."""
    dataset = _checked_copy(folder, source, report)
    if folder.name != unpacked.name_of(dataset.fingerprint):
        raise StorageError(
            f"{folder} has changed since it was unpacked (its fingerprint is now "
            f"{dataset.fingerprint}): remove it, to have it made again"
        )
    return dataset


def _checked(folder: Path, source: str, report: Callable[[str], None]) -> Dataset:
    """Checks a folder in the binary layout and describes it in a line."""
    counts = binary.check_folder(folder)
    names = binary.read_label_names(folder)
    # By its class names, so that a generated folder is never taken for CIFAR-100, wherever it lies.
    name = SYNTHETIC if set(names.fine) & set(synthetic.LABEL_NAMES.fine) else CIFAR_100
    title = "the synthetic set" if name == SYNTHETIC else "CIFAR-100"
    size = f"{counts.train:,} train and {counts.test:,} test records"
    subset = name == CIFAR_100 and counts != _OFFICIAL_COUNTS
    if subset:
        size = f"a subset: {size}"
    report(f"data: {title}, {size}, from {source}")
    return Dataset(folder, name, source, binary.fingerprint(folder), subset)


def _banner(search_dir: Path, cache: Path, failure: str) -> str:
    here = search_dir.absolute()
    paragraphs = (
        "NO CIFAR-100: GOING ON WITH THE SYNTHETIC DATA SET",
        "",
        f"The real data are neither in {here} nor in {cache}, and could not be downloaded:",
        f"  {failure}",
        "",
        "Figures from this run are NOT results on CIFAR-100. To use the real data, name them:",
        "  make run DATA=/path/to/cifar-100-binary.tar.gz",
        f"or put the archive, or the folder it unpacks to, into {here}",
    )
    wrap = textwrap.TextWrapper(
        _BANNER_WIDTH - 2,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = [f"* {line}" for text in paragraphs for line in wrap.wrap(text) or [""]]
    rule = "*" * _BANNER_WIDTH
    return "\n".join(["", rule, *(line.rstrip() for line in lines), rule, ""])
