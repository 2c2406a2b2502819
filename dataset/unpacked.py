"""The copies of the data kept in a work folder: unpacked or converted once, named by contents.

A copy is `cifar-100-` or `cifar-10-` and the beginning of its fingerprint, so that the same data
are in the same place whichever form they came in: TFX's cache goes by that path. `unpacked.json`
beside the copies tells which archive, by its MD5, is in which, so that finding that out takes no
unpacking.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dataset import archive, pickled
from dataset import format as binary
from dataset.files import replace_text, scratch_folder
from dataset.format import DataError, Layout

_INDEX_FILE = "unpacked.json"


def find(store: Path, md5: str) -> Path | None:
    """Returns the copy made earlier of the source with this MD5, unchecked; None without one."""
    name = _read_index(store).get(md5)
    return store / name if name and (store / name).is_dir() else None


def add(store: Path, md5: str, source: Path) -> Path:
    """Unpacks or converts the data set and remembers that.

    Args:
      store: An existing folder for all copies; the caller holds its lock.
      md5: What to remember the source by.
      source: An archive in either form, or a folder in the python form.

    Returns:
      The copy, in the binary layout and checked. It may have been there already, made of another
      source with the same contents.

    Raises:
      DataError: If the source is damaged, unsafe or not CIFAR; nothing of it is kept.
      StorageError: If writing fails.
    """
    with scratch_folder(store / "cifar") as folder:
        try:
            _fill(folder, source)
        except DataError as error:  # the paths in its message are about to vanish
            message = str(error)
            for path in (folder / "raw", folder):
                message = message.replace(str(path), str(source))
            raise DataError(message) from None
        target = store / name_of(binary.layout_of(folder), binary.fingerprint(folder))
        if not target.is_dir():
            folder.rename(target)
    # After the folder: a run killed in between unpacks once more, and finds the folder there.
    index = _read_index(store) | {md5: target.name}
    replace_text(store / _INDEX_FILE, json.dumps(index, indent=1) + "\n")
    return target


def name_of(layout: Layout, fingerprint: str) -> str:
    """Returns the name of the copy whose contents have this fingerprint."""
    return f"{layout.name}-{fingerprint[:12]}"


def _fill(folder: Path, source: Path) -> None:
    if source.is_dir():
        pickled.convert(source, folder)
    else:
        raw = folder / "raw"
        if archive.extract(source, raw) == "python":
            pickled.convert(raw, folder)
        else:
            for file in raw.iterdir():
                file.rename(folder / file.name)
        shutil.rmtree(raw, ignore_errors=True)
    binary.check_folder(folder)
    # The archives' files may end in blank lines where a converted one does not.
    for _, count, name in binary.layout_of(folder).labels:
        binary.write_names(folder / name, binary.read_names(folder / name, count))


def _read_index(store: Path) -> dict[str, str]:
    """Returns the index, empty if there is none or it is damaged: all is then unpacked again."""
    try:
        index = json.loads((store / _INDEX_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    sound = isinstance(index, dict) and all(isinstance(name, str) for name in index.values())
    return index if sound else {}
