"""What killed and interrupted runs leave behind: in the pipeline's folder and in TMPDIR."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

# TFX's, in the folder of each component.
_SYSTEM = ".system"
_ASIDE = "set_aside"


def set_aside_unknown(pipeline_root: str, known: Collection[int]) -> Path | None:
    """Moves artifacts away that belong to no execution in the metadata.

    Executions are numbered, and so are their folders: where the metadata are new or an older copy,
    a later execution would write into the folder of an earlier one, and read what lies there.

    Args:
      pipeline_root: Folder of the pipeline's artifacts, held by the caller.
      known: The numbers of the executions that the metadata have.

    Returns:
      The folder to which they were moved; None if there were none.
    """
    root = Path(pipeline_root)
    unknown = [
        folder
        for system in root.glob(f"*/{_SYSTEM}")
        for folder in system.parent.glob("*/*")
        if folder.name.isdecimal() and int(folder.name) not in known
    ]
    if not unknown:
        return None
    aside = root / _ASIDE / f"{datetime.datetime.now():%Y%m%d-%H%M%S.%f}"
    for folder in unknown:
        target = aside / folder.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    return aside


def remove_working_folders(pipeline_root: str) -> None:
    """Removes TFX's working folders of executions, which are of no use after them.

    Args:
      pipeline_root: Folder of the pipeline's artifacts, held by the caller.
    """
    for folder in Path(pipeline_root).glob(f"*/{_SYSTEM}/*/*"):
        shutil.rmtree(folder)


@contextlib.contextmanager
def temporary_folder(pipeline_root: str) -> Iterator[None]:
    """Lets this process and those that it starts write temporary files into a folder of the run.

    It is removed at the end, and if the process is killed, by the pipeline's next run. Components,
    Beam and TensorFlow's autograph leave folders and files in TMPDIR otherwise.

    Args:
      pipeline_root: Folder of the pipeline's artifacts, held by the caller.
    """
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    prefix = f"vit-{hashlib.sha256(os.path.abspath(pipeline_root).encode()).hexdigest()[:12]}-"
    try:
        for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            if leftover.lstat().st_uid == os.geteuid():
                shutil.rmtree(leftover, ignore_errors=True)
        folder = tempfile.mkdtemp(prefix=prefix)
    except OSError:  # no place for temporary files: whoever needs one will say so
        yield
        return
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        yield
    finally:
        if before[0] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]
        shutil.rmtree(folder, ignore_errors=True)
