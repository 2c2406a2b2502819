"""ML Metadata's database of a local pipeline, looked at before TFX opens it; cheap to import."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path


class MetadataError(RuntimeError):
    """The database cannot be used; the message says which, why, and what to do."""


def metadata_error(path: str, reason: object) -> MetadataError:
    """Makes the error for a database that cannot be used."""
    return MetadataError(
        f"{path} cannot be used as the pipeline's metadata: {reason}. Put an older copy back, or "
        "move it away: the pipeline then starts anew, and sets the old artifacts aside. Pushed "
        "models stay."
    )


def check(path: str) -> None:
    """Looks whether ML Metadata can open its database, and changes nothing about it.

    Args:
      path: The sqlite file; it need not exist, and is made by ML Metadata if it is empty.

    Raises:
      MetadataError: It is no file, damaged, or another program's.
    """
    if not os.path.lexists(path):
        return
    if not os.path.isfile(path):
        raise metadata_error(path, "it is not a file")
    try:
        # Not mode=ro: after a kill, sqlite first has to undo what was half-written.
        uri = f"{Path(path).absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            (result,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if result != "ok":
                raise metadata_error(path, f"it is damaged ({result})")
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise metadata_error(path, error) from None
    if tables and "MLMDEnv" not in tables:
        raise metadata_error(path, "it is a database of another program")
