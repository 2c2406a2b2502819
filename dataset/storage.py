"""Files by path or by URI: local ones directly, others through fsspec (an extra, `remote`)."""

from __future__ import annotations

import re
from typing import IO, Any

from dataset.format import DataError

_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")


def is_uri(location: str) -> bool:
    """Tells whether a location is a URI, such as `s3://bucket/file`; `file:` counts, too."""
    return bool(_URI.match(location))


def open_file(location: str) -> IO[bytes]:
    """Opens a file to read its bytes.

    Args:
      location: A path or a URI.

    Raises:
      OSError: It cannot be read; FileNotFoundError where it does not exist.
      DataError: There is no library for such URIs.
    """
    if not is_uri(location):
        return open(location, "rb")
    system, path = _file_system(location)
    file: IO[bytes] = system.open(path, "rb")
    return file


def read(location: str) -> bytes:
    """Reads a whole file; see `open_file`."""
    with open_file(location) as file:
        return file.read()


def find(location: str) -> list[str]:
    """Lists all files below a folder, as URIs; of those that exist no order is promised.

    Args:
      location: A URI.

    Raises:
      DataError: It cannot be listed.
    """
    system, path = _file_system(location)
    try:
        return [system.unstrip_protocol(file) for file in system.find(path)]
    except Exception as error:  # every file system has its own
        raise DataError(
            f"cannot list {location}: {error}: name one file, or a list of them"
        ) from None


def is_file(location: str) -> bool:
    """Tells whether a URI is a file's."""
    system, path = _file_system(location)
    return bool(system.isfile(path))


def _file_system(location: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise DataError(_missing(location, error)) from None
    try:
        return fsspec.core.url_to_fs(location)
    except ImportError as error:  # of the library for this kind of URI
        raise DataError(_missing(location, error)) from None
    except ValueError as error:
        raise DataError(f"{location}: {error}: give a path, or a URI of another kind") from None


def _missing(location: str, error: ImportError) -> str:
    return (
        f"{location} cannot be read here ({error}): install the extra `remote` "
        "(pip install 'vit-pipeline[remote]'), or copy the data to a folder"
    )
