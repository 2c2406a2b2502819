"""Image files to classify, and the answers about them: what every way of asking a model shares."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")

# Outputs of every signature -> their names in an answer.
_COLUMNS = {
    "top_5_names": "name",
    "top_5_superclasses": "superclass",
    "top_5_ids": "id",
    "top_5_probabilities": "probability",
}


class ServingError(ValueError):
    """A model, a server or an image cannot be used; the message says what to do."""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Lists image files.

    Args:
      paths: PNG and JPEG files, and folders that are searched for such files.

    Raises:
      ServingError: A path does not exist, or a folder has no images.
    """
    images = []
    for path in paths:
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.is_file())
            found = sorted(p for p in files if p.suffix.lower() in SUFFIXES)
            if not found:
                raise ServingError(f"{path} has no {', '.join(SUFFIXES)} files.")
            images += found
        elif path.is_file():
            images.append(path)
        else:
            raise ServingError(f"{path} does not exist.")
    return images


def read(path: Path) -> bytes:
    """Reads a file.

    Raises:
      ServingError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServingError(f"{path} cannot be read: {error.strerror}.") from error


def decode(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decodes a PNG or JPEG and resizes it, if it is of another size, as the model would.

    Args:
      content: The encoded image.
      size: Rows and columns of the result.

    Returns:
      uint8 [rows, columns, 3].

    Raises:
      ValueError: It is not a PNG or JPEG image, or too large for one.
    """
    # Not needed to send files as they are.
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("not a PNG or JPEG image") from error
    rows, columns = size
    if rgb.size != (columns, rows):
        rgb = rgb.resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def not_images(files: Sequence[tuple[Path, bytes]]) -> list[Path]:
    """Finds out from which files, given with their contents, no image can be decoded."""
    broken = []
    for path, content in files:
        try:
            decode(content, (1, 1))
        except ValueError:
            broken.append(path)
    return broken


def answers(images: Sequence[Path], outputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Turns a signature's outputs into answers.

    Args:
      images: The files, in the order of the rows.
      outputs: The signature's outputs, [N, 5] each; strings as bytes.

    Yields:
      For each image its `image` (path) and `classes`: five objects of `name`, `superclass`, `id`
      and `probability`, the most probable first.

    Raises:
      ServingError: The outputs are not those of a model of this pipeline.
    """
    missing = [name for name in _COLUMNS if name not in outputs]
    if missing:
        raise ServingError(
            f"the model does not return {', '.join(missing)}: it is not one of this pipeline."
        )
    columns = {
        key: values.astype(str) if values.dtype == object else values
        for name, key in _COLUMNS.items()
        for values in [outputs[name]]
    }
    for row, path in enumerate(images):
        top = zip(*(values[row].tolist() for values in columns.values()))
        yield {"image": str(path), "classes": [dict(zip(columns, values)) for values in top]}


def as_text(answer: Mapping[str, Any]) -> str:
    """Shows an answer as a small table."""
    rows = [
        f"  {item['probability']:7.2%}  {item['name']} ({item['superclass']})"
        for item in answer["classes"]
    ]
    return "\n".join([answer["image"], *rows])
