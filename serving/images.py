"""Image files to classify, and the answers about them: what every way of asking a model shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dataset.images import RESIZE, RESIZES, SUFFIXES, Resize, UnreadableImage, decode, resize

_CARD = Path("assets.extra") / "dataset.json"

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
      paths: Files, and folders that are searched for files with an image's suffix, but for hidden
        ones and what is in hidden folders.

    Raises:
      ServingError: A path does not exist, or a folder has no images.
    """
    images = []
    for path in paths:
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found = sorted(p for p in files if not _is_hidden(p.relative_to(path)))
            if not found:
                raise ServingError(f"{path} has no files of {', '.join(SUFFIXES)}.")
            images += found
        elif path.is_file():
            images.append(path)
        else:
            raise ServingError(f"{path} does not exist.")
    return images


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def read(path: Path) -> bytes:
    """Reads a file.

    Raises:
      ServingError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServingError(f"{path} cannot be read: {error.strerror}.") from error


def resize_of(version: Path) -> Resize:
    """Reads how a model resizes images out of its card.

    Args:
      version: Folder of a SavedModel.

    Returns:
      What the card says; the default where there is no card, or none that says it.
    """
    try:
        card = json.loads((version / _CARD).read_bytes())
    except (OSError, ValueError):
        return RESIZE
    how = card.get("resize") if isinstance(card, dict) else None
    return how if how in RESIZES else RESIZE


def load(path: Path, size: tuple[int, int], how: Resize = RESIZE) -> np.ndarray | str:
    """Reads an image file as the model would (see `dataset.images`).

    Args:
      path: The file.
      size: Height and width of the result.
      how: See `dataset.images.resize`.

    Returns:
      uint8 [*size, 3]; or the reason why the file is none, to be put after its name.
    """
    try:
        return resize(decode(path.read_bytes()), size, how)
    except UnreadableImage as error:
        return f"is {error.reason}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


Loaded = tuple[Path, "np.ndarray | str"]


def load_batches(
    paths: Iterable[Path], size: tuple[int, int], batch_size: int, how: Resize = RESIZE
) -> Iterator[list[Loaded]]:
    """Loads files, several at a time and only as many as are asked for.

    Yields:
      For so many files their paths and what `load` returns.
    """
    rest = iter(paths)
    with futures.ThreadPoolExecutor() as pool:
        while batch := list(islice(rest, batch_size)):
            yield list(zip(batch, pool.map(lambda path: load(path, size, how), batch)))


def classify_batch(
    batch: Sequence[Loaded], predict: Callable[[list[np.ndarray]], Mapping[str, np.ndarray]]
) -> Iterator[dict[str, Any]]:
    """Classifies what could be loaded of a batch.

    Args:
      batch: See `load_batches`.
      predict: Images -> the outputs of one of the model's signatures.

    Yields:
      In the order of the batch, see `answers`; for files that are no images their `image` (path)
      and `error`, the reason.
    """
    good = [(path, image) for path, image in batch if not isinstance(image, str)]
    answered: Iterator[dict[str, Any]] = iter(())
    if good:
        outputs = predict([image for _, image in good])
        answered = answers([path for path, _ in good], outputs)
    for path, image in batch:
        yield {"image": str(path), "error": image} if isinstance(image, str) else next(answered)


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
