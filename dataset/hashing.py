"""Digests of files, read block by block."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

_BLOCK = 1 << 20


class Digest(Protocol):
    """What hashlib's objects have in common."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Adds bytes."""


def add_file(digest: Digest, path: Path) -> None:
    """Adds a file's contents to a digest."""
    buffer = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])


def md5_of(*paths: Path) -> str:
    """Returns the MD5, 32 hexadecimal digits, of the files' contents put together.

    MD5 tells which archive this is (the data set's author publishes that), it protects nothing.
    """
    digest = hashlib.md5(usedforsecurity=False)
    for path in paths:
        add_file(digest, path)
    return digest.hexdigest()
