"""CIFAR's python form: pickles, read without executing anything they contain.

`train` and `test` are dictionaries with `data` (uint8 [N, 3072], each row three colour planes as in
the binary form), `fine_labels` and `coarse_labels`; `meta` has the class names. CIFAR-10 has one
file of class names, one of test and five of training images with `labels`. The official files were
pickled by Python 2, so that keys and names are bytes. Unpickling calls whatever the file
names, hence the allow-list below. Even NumPy's own functions are not called: inert stand-ins take
their place, and the array is made from its bytes afterwards.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset import format as binary
from dataset.format import DataError, Layout


@dataclass(frozen=True)
class Form:
    """What tells the data sets apart.

    Attributes:
      layout: The binary layout with the same contents.
      meta: File of the class names.
      batches: Files of images, in the order of the binary files they become.
      fields: For each byte before the pixels of a record: the labels' key, and their names' in
        `meta`.
    """

    layout: Layout
    meta: str
    batches: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]

    @property
    def files(self) -> tuple[str, ...]:
        """All files of a folder."""
        return (*self.batches, self.meta)


CIFAR_100 = Form(
    binary.CIFAR_100,
    "meta",
    ("train", "test"),
    (("coarse_labels", "coarse_label_names"), ("fine_labels", "fine_label_names")),
)
CIFAR_10 = Form(
    binary.CIFAR_10,
    "batches.meta",
    (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    (("labels", "label_names"),),
)
FORMS = (CIFAR_100, CIFAR_10)
FILES = CIFAR_100.files


class _Array:
    """Stands in for numpy.ndarray: keeps the pickled state and does nothing with it."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: object, align: object = False, copy: object = False):
        del align, copy
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, without meaning for the one-byte integers accepted here."""


def _reconstruct(kind: object, shape: object, typecode: object) -> _Array:
    """Stands in for numpy's function of that name, which makes the empty array to be filled."""
    del kind, shape, typecode
    return _Array()


def _encode(text: object, encoding: object = "utf-8") -> bytes:
    """Stands in for _codecs.encode, as which Python 3 pickles bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"unexpected encoding {encoding!r} of bytes")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(
                f"it asks for {module}.{name}, which CIFAR-100's files have no use for: unsafe, "
                "nothing of it was executed; get the archive from its author "
                "(https://www.cs.toronto.edu/~kriz/cifar.html)"
            ) from None


def load(path: Path) -> dict[str, Any]:
    """Unpickles one file without executing anything from it.

    Args:
      path: A file of the python form.

    Returns:
      The dictionary in it; keys as text, arrays as uint8 arrays, all else as pickled.

    Raises:
      DataError: If the file is missing, damaged, or asks for anything beyond uint8 arrays.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: unpack the whole archive again")
    try:
        with open(path, "rb") as file:
            content = _RestrictedUnpickler(file, encoding="bytes").load()
        if not isinstance(content, Mapping):
            raise DataError(f"it holds a {type(content).__name__} instead of a dictionary")
        return {_text(key): _plain(value) for key, value in content.items()}
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: "
            f"{type(error).__name__}: {error}: copy or download it again"
        ) from error


def convert(source: Path, target: Path) -> None:
    """Writes the python form as the binary form, byte for byte what the author's own has.

    Args:
      source: A folder in the python form.
      target: An existing folder, for the binary form's files.

    Raises:
      DataError: If a file is missing, damaged or unsafe, or lacks a field.
    """
    form = form_of(source) or CIFAR_100
    path = source / form.meta
    meta = load(path)
    for (_, field), (_, _, file) in zip(form.fields, form.layout.labels):
        names = _field(path, meta, field)
        if not isinstance(names, list) or not all(isinstance(x, (bytes, str)) for x in names):
            raise DataError(f"{path}: {field} is not a list of names")
        try:
            binary.write_names(target / file, [_text(name) for name in names])
        except UnicodeError as error:
            raise DataError(f"{path}: {field} is not UTF-8 text ({error})") from None
    for name, file in zip(form.batches, (*form.layout.train, form.layout.test)):
        path = source / name
        batch = load(path)
        planes = _field(path, batch, "data")
        if not isinstance(planes, np.ndarray):
            raise DataError(f"{path}: data is a {type(planes).__name__} instead of an array")
        labels = {
            label: _labels(path, batch, key)
            for (key, _), (label, _, _) in zip(form.fields, form.layout.labels)
        }
        try:
            binary.write_planes(target / file, planes, labels)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None


def form_of(folder: str | os.PathLike[str]) -> Form | None:
    """Tells which form a folder looks like, whole or not; None for neither."""
    for form in FORMS:
        if sum(Path(folder, name).is_file() for name in form.files) >= 2:
            return form
    return None


def _field(path: Path, content: Mapping[str, Any], name: str) -> Any:
    if name not in content:
        have = ", ".join(sorted(content)) or "nothing"
        raise DataError(f"{path} lacks {name!r} (it has {have}): not a CIFAR file")
    return content[name]


def _labels(path: Path, content: Mapping[str, Any], name: str) -> npt.NDArray[np.int64]:
    labels = _field(path, content, name)
    if not isinstance(labels, list) or not all(type(x) is int for x in labels):
        raise DataError(f"{path}: {name} is not a list of integers")
    try:
        return np.array(labels, np.int64)
    except OverflowError:
        raise DataError(f"{path}: {name} has a label beyond 64 bits") from None


def _text(value: object) -> str:
    text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    text.encode("utf-8")  # refuses lone surrogates, which could not be written
    return text


def _plain(value: object) -> object:
    """Makes a real array of a stand-in, with the checks NumPy would leave to chance."""
    if not isinstance(value, _Array):
        return value
    if not (isinstance(value.state, tuple) and len(value.state) == 5):
        raise DataError("it holds an array without contents")
    _, shape, dtype, fortran, data = value.state
    code = _text(dtype.code) if isinstance(dtype, _Dtype) else repr(dtype)
    if code not in ("u1", "|u1", "B") or not isinstance(data, (bytes, bytearray)):
        raise DataError(f"it holds an array of type {code!r}, where the images are uint8")
    flat = np.frombuffer(data, np.uint8)
    return flat.reshape(shape, order="F" if fortran else "C")
