"""Finding the data: where the user says, where CIFAR-100 usually is, on the web, or a stand-in."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dataset import format as binary
from dataset import pickled, source, synthetic, unpacked
from dataset.card import SPLITS, TRAIN, DataCard
from dataset.cifar import open_cifar
from dataset.download import (
    OFFICIAL_BINARY,
    OFFICIAL_MD5S,
    RemoteArchive,
    UnreachableError,
    fetch,
)
from dataset.files import StorageError, exclusive, make_folder
from dataset.format import DataError, RecordCounts
from dataset.hashing import md5_of
from dataset.interface import Options, Source
from dataset.storage import is_uri
from dataset.synthetic_names import NAME as SYNTHETIC

_OFFICIAL_COUNTS = RecordCounts(*binary.OFFICIAL_RECORDS)
_SYNTHETIC_SEED = 0
# Looked for inside a folder, in this order, for each data set. The last ones are Keras 3's names
# for the python form.
_FOLDERS = {
    "cifar-100": (
        "",
        "cifar-100-binary",
        "cifar-100-python",
        "cifar-100-python-target/cifar-100-python",
    ),
    "cifar-10": (
        "",
        "cifar-10-batches-bin",
        "cifar-10-batches-py",
        "cifar-10-batches-py-target/cifar-10-batches-py",
    ),
}
_ARCHIVES = {
    "cifar-100": (
        "cifar-100-binary.tar.gz",
        "cifar-100-python.tar.gz",
        "cifar-100-python-target_archive",
    ),
    "cifar-10": (
        "cifar-10-binary.tar.gz",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py-target_archive",
    ),
}
_BANNER_WIDTH = 96


@dataclass(frozen=True)
class Dataset:
    """A checked data set.

    Attributes:
      location: What `dataset.source.open_source` opens; CIFAR is unpacked there.
      card: What is known of it before its images are decoded.
      source: Where it came from, for people.
    """

    location: str
    card: DataCard
    source: str

    @property
    def folder(self) -> Path:
        """The location, where it is a path."""
        return Path(self.location)

    @property
    def name(self) -> str:
        """Goes into everything made from the data."""
        return self.card.name

    @property
    def fingerprint(self) -> str:
        """Of the contents, 64 hexadecimal digits."""
        return self.card.source.fingerprint

    @property
    def subset(self) -> bool:
        """See `DataCard.subset`."""
        return self.card.subset


# A source and where it came from, for people.
_Opened = tuple[Source, str]


class _Found(NamedTuple):
    form: Literal["binary", "python", "archive", "other"]
    path: Path


def locate(
    data: str | None,
    work_dir: Path,
    options: Options | None = None,
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
      data: CIFAR's folder (in either form, or one that holds such a folder or an archive) or
        archive, any other source that `dataset.source` opens, or the word 'synthetic' (a folder of
        that name is './synthetic'); None to search.
      work_dir: Made if needed, and not touched where the data can be used in place.
      options: The user's.
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
    options = options or Options()
    store = work_dir / "data"
    cache = keras_cache or Path(
        os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"), "datasets"
    )
    try:
        found, came_from = _locate(
            data,
            store,
            search_dir,
            cache,
            remote if download else None,
            synthetic_records,
            options,
            report,
        )
    except OSError as error:  # what cannot be written is told apart further down
        raise DataError(
            f"cannot read {error.filename or 'the data'}: {error.strerror or error}: "
            "check the permissions and the disk"
        ) from error
    for line in [*_describe(found), *found.notes]:
        report(f"data: {line}")
    return Dataset(found.card.source.location, found.card, came_from)


def _locate(
    data: str | None,
    store: Path,
    search_dir: Path,
    cache: Path,
    remote: RemoteArchive | None,
    synthetic_records: tuple[int, int],
    options: Options,
    report: Callable[[str], None],
) -> _Opened:
    if data == SYNTHETIC:
        return _synthesize(store, synthetic_records, options, report)
    if data is not None:
        found = None if is_uri(data) else _find_explicit(data)
        if found:
            return _prepare(found, store, options, report)
        location = data if is_uri(data) else os.path.abspath(os.path.expanduser(data))
        report(f"data: {source.KINDS[source.kind_of(location)]}, from {location}")
        return source.open_source(location, options), location

    if found := _find(search_dir):
        return _prepare(found, store, options, report)
    if found := _find(cache):
        try:
            return _prepare(found, store, options, report)
        except StorageError:
            raise
        except DataError as error:  # Keras leaves broken downloads there; nobody named this one
            report(f"data: passing over what is in Keras's cache: {error}")
    if remote:
        try:
            return _download(remote, store, options, report)
        except UnreachableError as error:
            failure = str(error)
    else:
        failure = "downloading is switched off"
    report(_banner(search_dir, cache, failure))
    return _synthesize(store, synthetic_records, options, report)


def _find(folder: Path, names: Sequence[str] = (binary.CIFAR_100.name,)) -> _Found | None:
    """Looks for data sets in a folder, preferring what needs no unpacking."""
    for name in names:
        layout = next(layout for layout in binary.LAYOUTS if layout.name == name)
        for path in (folder / inner for inner in _FOLDERS[name]):
            if any((path / file).is_file() for file in (*layout.train, layout.test)):
                return _Found("binary", path)
            form = pickled.form_of(path)
            if form and form.layout == layout:
                return _Found("python", path)
        for archive in _ARCHIVES[name]:
            if (folder / archive).is_file():
                return _Found("archive", folder / archive)
    return None


def _find_explicit(data: str) -> _Found | None:
    """CIFAR or an archive at a path; None for what is of another kind."""
    path = Path(os.path.expanduser(data))
    if not data or not path.exists():
        raise DataError(
            f"data {data!r} does not exist: give a folder of images, a manifest, Parquet files, a "
            f"folder or archive of CIFAR, or '{SYNTHETIC}' for the built-in stand-in"
        )
    if path.is_file():
        return None if source.is_known_file(data) else _Found("archive", path)
    if not path.is_dir():
        raise DataError(f"data {data!r} is neither a folder nor a file")
    return _find(path, tuple(_FOLDERS))


def _prepare(
    found: _Found, store: Path, options: Options, report: Callable[[str], None]
) -> _Opened:
    """Brings what was found into the binary layout, once, and checks it."""
    origin = str(found.path.absolute())
    if found.form == "binary":
        return _checked(found.path.absolute(), origin, options, report)
    parts = [found.path]
    if found.form == "python":
        form = pickled.form_of(found.path) or pickled.CIFAR_100
        parts = [found.path / name for name in form.files]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise DataError(
                f"{found.path} lacks {', '.join(missing)}: unpack the whole of "
                f"{form.layout.name}-python.tar.gz"
            )
    md5 = md5_of(*parts)
    make_folder(store)
    with exclusive(store, report=report):
        folder = unpacked.find(store, md5)
        if folder is None:
            report(f"data: unpacking {origin} to {store}")
            folder = unpacked.add(store, md5, found.path)
    if found.form == "archive" and md5 not in OFFICIAL_MD5S:
        report(
            f"data: {found.path.name} is not byte-identical to an official archive (md5 {md5}): "
            "its contents are checked instead"
        )
    return _checked_unpacked(folder, origin, options, report)


def _download(
    remote: RemoteArchive, store: Path, options: Options, report: Callable[[str], None]
) -> _Opened:
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
    return _checked_unpacked(folder, remote.url, options, report)


def _synthesize(
    store: Path, records: tuple[int, int], options: Options, report: Callable[[str], None]
) -> _Opened:
    train, test = records
    version = f"v{synthetic.GENERATOR_VERSION}"
    folder = store / f"{SYNTHETIC}-{version}-seed{_SYNTHETIC_SEED}-{train}-{test}"
    make_folder(store)
    with exclusive(store, report=report):
        if not folder.is_dir():
            report(f"data: generating the synthetic set in {folder}")
            synthetic.generate(folder, seed=_SYNTHETIC_SEED, train=train, test=test)
    origin = f"the built-in generator, seed {_SYNTHETIC_SEED}"
    return _checked_copy(folder, origin, options, report)


def _checked_copy(
    folder: Path, origin: str, options: Options, report: Callable[[str], None]
) -> _Opened:
    """Checks what this program has made, now or in an earlier run."""
    try:
        return _checked(folder.absolute(), origin, options, report)
    except DataError as error:
        raise StorageError(f"{error}; or remove {folder}, to have it made again") from None


def _checked_unpacked(
    folder: Path, origin: str, options: Options, report: Callable[[str], None]
) -> _Opened:
    """Checks a folder that was named after its contents."""
    opened, _ = _checked_copy(folder, origin, options, report)
    fingerprint = opened.card.source.fingerprint
    if folder.name != unpacked.name_of(binary.layout_of(folder), fingerprint):
        raise StorageError(
            f"{folder} has changed since it was unpacked (its fingerprint is now {fingerprint}): "
            "remove it, to have it made again"
        )
    return opened, origin


def _checked(folder: Path, origin: str, options: Options, report: Callable[[str], None]) -> _Opened:
    """Checks a folder in the binary layout and describes it in a line."""
    counts = binary.check_folder(folder)
    opened = open_cifar(str(folder), options)
    name = opened.card.name
    title = "the synthetic set" if name == SYNTHETIC else name.upper()
    size = f"{counts.train:,} train and {counts.test:,} test records"
    if name != SYNTHETIC and counts != _OFFICIAL_COUNTS:
        size = f"a subset: {size}"
    report(f"data: {title}, {size}, from {origin}")
    return opened, origin


def _describe(opened: Source) -> list[str]:
    """The splits, the classes and their balance, a line each."""
    card, counts = opened.card, opened.counts[TRAIN]
    splits = ", ".join(
        f"{name} {card.splits[name].examples:,}"
        + (" (set apart here)" if card.splits[name].derived else "")
        for name in SPLITS
    )
    (least, smallest), *_, (most, largest) = sorted(
        (count, label) for label, count in enumerate(counts) if count
    )
    names = card.classes
    balance = f"{card.num_classes:,} classes of {least:,} to {most:,} images in {TRAIN}"
    if most > least:
        balance += f" ({names[smallest]} to {names[largest]}), imbalance ratio {most / least:.3g}"
    sizes = card.source
    stored = f"{card.image_size[0]} x {card.image_size[1]} pixels"
    if (sizes.smallest, sizes.largest) != (card.image_size, card.image_size):
        (a, b), (c, d) = sizes.smallest, sizes.largest
        stored = f"{a} x {b} to {c} x {d} pixels (height x width)"
    return [f"{splits} images of {stored}", balance]


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
