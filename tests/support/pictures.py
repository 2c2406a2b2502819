"""Small image files for tests of sources."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.interface import Item, Source


def pixels(seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """A picture that no other seed gives: uint8 [*size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def encoded(seed: int, size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    """The same as a file's contents."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, size)).save(buffer, form)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    """Writes a file, and the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def class_folders(root: Path, counts: Mapping[str, int], first: int = 0) -> Path:
    """Writes `<name>/<n>.png`, so many each, of the seeds from `first` on."""
    seed = first
    for name, count in counts.items():
        for number in range(count):
            write(root / name / f"{number}.png", encoded(seed))
            seed += 1
    return root


def read(source: Source, split: str) -> list[Item]:
    """All items of a split."""
    items = [item for shard in source.shards(split) for item in shard.read()]
    assert all(isinstance(item, Item) for item in items)
    return items


def names(source: Source, split: str) -> set[str]:
    """Names of all items of a split."""
    return {item.name for item in read(source, split)}


def labels(source: Source, split: str) -> set[tuple[str, str]]:
    """Name and class of all items of a split."""
    return {(item.name, source.card.classes[item.label]) for item in read(source, split)}
