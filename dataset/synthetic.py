"""A built-in data set in CIFAR-100's binary layout, for machines with neither network nor data.

100 fine classes are shape x colour x texture ("striped_red_circle"), 20 superclasses shape x
texture ("striped_circles"), each with its five colours. Objects vary in place, size, rotation, hue
and texture phase, over shaded backgrounds with coloured clutter and noise: learnable, not trivial,
and no more than a stand-in. Figures measured on it say nothing about CIFAR-100.

The same seed gives the same bytes on any machine and NumPy version: all arithmetic is on integers,
and only `random_raw` is drawn, whose stream NumPy keeps fixed (its distributions may change).

    python -m dataset.synthetic FOLDER --train 50000 --test 10000 --seed 0
    python -m dataset.synthetic FOLDER --as folders
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataset import format as binary
from dataset.export import FORMS, export
from dataset.files import new_folder, scratch_folder
from dataset.format import DataError
from dataset.source import open_source
from dataset.synthetic_names import CLASSES, COARSE, COLOURS, LABEL_NAMES, PLURALS, SHAPES, TEXTURES

_Mask = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int32]], npt.NDArray[np.bool_]]

_COARSE_OF = np.array(
    [COARSE.index(f"{texture}_{PLURALS[shape]}") for _, shape, _, texture in CLASSES], np.int64
)
_SHAPE_OF = np.array([SHAPES.index(shape) for _, shape, _, _ in CLASSES])
_TEXTURE_OF = np.array([TEXTURES.index(texture) for *_, texture in CLASSES])
_COLOUR_OF = np.array([COLOURS[colour] for _, _, colour, _ in CLASSES], np.int32)

# To be raised with every change to the bytes generated: copies of older ones are told by it.
GENERATOR_VERSION = 1

# Positions are in 1/16 pixel; an object's own coordinates in 1/64 of its radius.
_STEP = 16
_RADIUS = 64
_SHIFT = 12  # of fixed-point products
_TURN = [2 * math.pi * k / 256 for k in range(256)]
_COS = np.array([round(math.cos(angle) * (_RADIUS << _SHIFT)) for angle in _TURN])
_SIN = np.array([round(math.sin(angle) * (_RADIUS << _SHIFT)) for angle in _TURN])

_CHUNK = 500  # images rendered at a time: arrays stay in the cache
_CLUTTER = 3  # distracting patches per image
_DRAWS = 33  # random numbers per image
_GRID = np.arange(32, dtype=np.int32) * _STEP + _STEP // 2  # pixel centres


def generate(
    folder: str | os.PathLike[str], *, seed: int = 0, train: int = 50_000, test: int = 10_000
) -> Path:
    """Generates the data set; classes are balanced and shuffled.

    Args:
      folder: The folder to make.
      seed: Another seed gives other images; training and test images are independent samples.
      train: Number of training records.
      test: Number of test records.

    Returns:
      `folder`, whole, in the binary layout.

    Raises:
      DataError: If a number is unusable, `folder` is in use, or writing fails.
    """
    folder = Path(folder)
    for name, value, least in (("train", train, 1), ("test", test, 1), ("seed", seed, 0)):
        if value < least:
            raise DataError(f"synthetic data: {name} is {value:,}, must be at least {least}")
    with new_folder(folder) as partial:
        for split, (file, count) in enumerate(
            ((binary.TRAIN_FILE, train), (binary.TEST_FILE, test))
        ):
            _write_split(partial / file, count, np.random.SeedSequence([seed, split]))
        binary.write_label_names(partial, LABEL_NAMES)
    return folder


def _write_split(path: Path, count: int, seeds: np.random.SeedSequence) -> None:
    order, parameters, noise = (np.random.PCG64(child) for child in seeds.spawn(3))
    keys = order.random_raw(count)
    fine = (np.arange(count) % binary.NUM_FINE_CLASSES)[np.argsort(keys, kind="stable")]
    with open(path, "wb") as file:
        for start in range(0, count, _CHUNK):
            labels = fine[start : start + _CHUNK]
            records = np.empty((len(labels), binary.RECORD_BYTES), np.uint8)
            records[:, 0], records[:, 1] = _COARSE_OF[labels], labels
            records[:, 2:] = _render(labels, parameters, noise).reshape(len(labels), -1)
            file.write(records.data)


class _Draws:
    """Uniform integers, one per image at a time, out of raw 64-bit numbers."""

    def __init__(self, source: np.random.PCG64, count: int):
        raw = source.random_raw(count * _DRAWS).reshape(count, _DRAWS)
        self._columns = iter((raw >> np.uint64(32)).astype(np.int64).T)

    def __call__(self, low: int, high: int) -> npt.NDArray[np.int32]:
        """Returns int32 [N] in [low, high)."""
        return (low + (next(self._columns) * (high - low) >> 32)).astype(np.int32)


def _render(
    fine: npt.NDArray[np.int64], parameters: np.random.PCG64, noise: np.random.PCG64
) -> npt.NDArray[np.uint8]:
    """Draws one image per label: uint8 [N, 3, 32, 32]."""
    count = len(fine)
    draw = _Draws(parameters, count)
    image = _background(draw, count)  # (N, 3, 32, 32)

    angle = draw(0, 256)
    radius = draw(7 * _STEP, 13 * _STEP)
    dx = _GRID[None, None, :] - _column(draw(10 * _STEP, 22 * _STEP))  # (N, 1, 32)
    dy = _GRID[None, :, None] - _column(draw(10 * _STEP, 22 * _STEP))  # (N, 32, 1)
    cos, sin = _column(_COS[angle] // radius), _column(_SIN[angle] // radius)
    u = (dx * cos + dy * sin) >> _SHIFT  # (N, 32, 32)
    v = (dy * cos - dx * sin) >> _SHIFT
    inside = _by_kind(_SHAPE_OF[fine], _SHAPE_MASKS, u, v)
    second = _by_kind(
        _TEXTURE_OF[fine], _TEXTURE_MASKS, u + _column(draw(0, 256)), v + _column(draw(0, 256))
    )

    jitter = np.stack([draw(-32, 33) for _ in range(3)], axis=1)
    colour = np.clip(_COLOUR_OF[fine] + jitter, 0, 255)  # (N, 3)
    towards = draw(0, 2)[:, None] * 255  # black or white
    contrast = draw(110, 190)[:, None]
    other = colour + ((towards - colour) * contrast >> 8)
    paint = np.where(second[:, None], other[..., None, None], colour[..., None, None])
    image = np.where(inside[:, None], paint, image)

    light = draw(170, 290)[:, None, None, None]
    image = image * light >> 8
    raw = noise.random_raw(count * binary.IMAGE_BYTES // 8).astype("<u8").view(np.uint8)
    grain = (raw & 15).astype(np.int16) + (raw >> 4) - 15  # triangular, -15 to 15
    image += grain.reshape(image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _background(draw: _Draws, count: int) -> npt.NDArray[np.int32]:
    """A shaded, tinted ground with patches in the classes' colours: int32 [N, 3, 32, 32]."""
    grey = draw(60, 190)
    tint = np.stack([draw(-25, 26) for _ in range(3)], axis=1)  # (N, 3)
    slope_x, slope_y = _column(draw(-32, 33)), _column(draw(-32, 33))
    shade = ((_GRID[None, None, :] - 256) * slope_x + (_GRID[None, :, None] - 256) * slope_y) >> 8
    image = (grey[:, None] + tint)[..., None, None] + shade[:, None]
    palette = np.array(list(COLOURS.values()), np.int32)
    for _ in range(_CLUTTER):
        colour = palette[draw(0, len(palette))]
        half_width, half_height = _column(draw(16, 80)), _column(draw(16, 80))
        across = abs(_GRID[None, None, :] - _column(draw(0, 512))) < half_width
        down = abs(_GRID[None, :, None] - _column(draw(0, 512))) < half_height
        image = np.where((across & down)[:, None], colour[..., None, None], image)
    return image


def _column(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """[N] as int32 [N, 1, 1]."""
    return values.astype(np.int32)[:, None, None]


def _by_kind(
    kinds: npt.NDArray[np.int64],
    masks: Sequence[_Mask],
    u: npt.NDArray[np.int32],
    v: npt.NDArray[np.int32],
) -> npt.NDArray[np.bool_]:
    """Each image's mask by its own kind's function: bool [N, 32, 32]."""
    result = np.empty(u.shape, np.bool_)
    for kind, mask in enumerate(masks):
        chosen = np.flatnonzero(kinds == kind)
        result[chosen] = mask(u[chosen], v[chosen])
    return result


_SHAPE_MASKS: tuple[_Mask, ...] = (
    lambda u, v: u * u + v * v < 58 * 58,
    lambda u, v: np.maximum(abs(u), abs(v)) < 50,
    lambda u, v: (v < 40) & (4 * (v + 60) > 7 * abs(u)),
    lambda u, v: (np.minimum(abs(u), abs(v)) < 18) & (np.maximum(abs(u), abs(v)) < 60),
    lambda u, v: abs(u * u + v * v - 48 * 48) < 26 * 48,
)
_TEXTURE_MASKS: tuple[_Mask, ...] = (
    lambda u, v: np.zeros(u.shape, np.bool_),
    lambda u, v: (u * 11 >> 8) & 1 == 1,
    lambda u, v: ((u & 31) - 16) ** 2 + ((v & 31) - 16) ** 2 < 100,
    lambda u, v: ((u * 11 >> 8) ^ (v * 11 >> 8)) & 1 == 1,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.synthetic",
        description="Generate the synthetic stand-in for CIFAR-100, in its binary layout.",
    )
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--train", type=int, default=50_000, help="training records (%(default)s)")
    parser.add_argument("--test", type=int, default=10_000, help="test records (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("binary", *FORMS),
        default="binary",
        help="the form to write (%(default)s); the others are of PNG images",
    )
    options = parser.parse_args(argv)
    numbers = {"seed": options.seed, "train": options.train, "test": options.test}
    try:
        if options.form == "binary":
            generate(options.folder, **numbers)
        else:
            scratch_path = options.folder.with_name(f"{options.folder.name}.binary")
            with scratch_folder(scratch_path) as scratch:
                source = open_source(str(generate(scratch / "binary", **numbers)))
                export(source, options.folder, options.form)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.train:,} train and {options.test:,} test records in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
