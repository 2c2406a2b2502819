"""What every source of images has in common: options in, a card and shards of items out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from dataset.card import TEST, TRAIN, VALIDATION, DataCard
from dataset.format import DataError
from dataset.images import RESIZE, Resize

# Names of folders, of files and in columns, in any case -> the split.
SPLIT_NAMES = {
    "train": TRAIN,
    **dict.fromkeys(("validation", "val", "valid", "dev", "eval"), VALIDATION),
    "test": TEST,
}
# Smaller images are enlarged: presets shift them by 4 pixels and halve their resolution twice.
_MIN_SIDE = 16
# Of what is stored in one file; large enough for few files, small enough for many workers.
_SHARD_BYTES = 64 << 20


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Options:
    """What the user may say about a source.

    Attributes:
      image_size: Height and width to store images at; None: see `stored_size`.
      preset_size: The preset's side in pixels, for that.
      resize: How images of other sizes become ones of that.
      limit: At most so many images of each split, class-balanced; None: all.
      group: A column's name, or a regular expression that is searched for in paths: what has the
        same value (of the first group, if it has one) stays in one split.
      columns: Of a manifest or of Parquet files: `path`, `image`, `label`, `superclass`, `split` ->
        the column's name, where it is not found by itself.
      max_unreadable: Up to this share of the images may be unreadable.
      keep_duplicates: Whether images of train may be in another split, too.
    """

    image_size: tuple[int, int] | None = None
    preset_size: int | None = None
    resize: Resize = RESIZE
    limit: int | None = None
    group: str | None = None
    columns: Mapping[str, str] = Field(default_factory=dict)
    max_unreadable: float = 0.01
    keep_duplicates: bool = False

    def to_json(self) -> str:
        """Writes the options, to be read by `options_from_json`."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER: TypeAdapter[Options] = TypeAdapter(Options)


def options_from_json(text: str) -> Options:
    """Reads what `Options.to_json` has written."""
    return _ADAPTER.validate_json(text)


class Item(NamedTuple):
    """One image.

    Attributes:
      name: For people: a path, or where in which file.
      image: Its pixels, uint8 [H, W, 3], or the bytes of an image file.
      label: Its class's.
      superclass: Its superclass's index; None where there is none.
    """

    name: str
    image: npt.NDArray[np.uint8] | bytes
    label: int
    superclass: int | None


class Unreadable(NamedTuple):
    """An image that could not be read.

    Attributes:
      name: As `Item.name`.
      reason: `empty`, `a truncated JPEG`.
      label: Its class's; None where that is not known yet.
    """

    name: str
    reason: str
    label: int | None = None


class Shard(Protocol):
    """A part of a split, in an order that only the data decide. Can be pickled.

    The items of a shard go into one file.
    """

    def read(self) -> Iterator[Item | Unreadable]:
        """Reads the items, one at a time."""


class Source(Protocol):
    """A data set, known from its names, headers and contents' digests: no pixel is decoded yet."""

    @property
    def card(self) -> DataCard:
        """What is known of it; the counts are those before unreadable images are met."""

    @property
    def counts(self) -> Mapping[str, Sequence[int]]:
        """For each split, how many images each class has."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of it, a line each."""

    @property
    def unreadable(self) -> Sequence[Unreadable]:
        """What was left out already."""

    def shards(self, split: str) -> Sequence[Shard]:
        """The parts of a split, the same ones in the same order for the same data."""


def stored_size(
    smallest: tuple[int, int], largest: tuple[int, int], options: Options
) -> tuple[int, int]:
    """The size to store images at: their own if all have the same and it is neither larger than the
    preset's nor too small for it, else the preset's; `options.image_size` overrides.

    Args:
      smallest: Height and width of an image, as `SourceInfo.smallest`.
      largest: Of another; both are the same only where all images have one size.
      options: With the sizes that are asked for.

    Returns:
      Height and width.
    """
    if options.image_size:
        return options.image_size
    preset = options.preset_size or max(smallest)
    if smallest == largest and _MIN_SIDE <= min(largest) and max(largest) <= preset:
        return smallest
    return preset, preset


def shard_length(image_size: tuple[int, int]) -> int:
    """How many images of this size go into one shard."""
    height, width = image_size
    return max(1, _SHARD_BYTES // (height * width * 3))


def quotas(limit: int, classes: int) -> list[int]:
    """Divides a limit among classes, so that the first ones get one more if need be.

    Raises:
      DataError: It is less than an image of each class.
    """
    if limit < classes:
        raise DataError(
            f"the limit is {limit} images of each split, and there are {classes} classes: give "
            f"{classes} or more, an image of each class (--limit)"
        )
    each, rest = divmod(limit, classes)
    return [each + (label < rest) for label in range(classes)]


def check_unreadable(unreadable: Sequence[Unreadable], total: int, options: Options) -> None:
    """Stops where more images are unreadable than is allowed.

    Raises:
      DataError: With the first of them and the reasons.
    """
    if len(unreadable) <= options.max_unreadable * total:
        return
    shown = [f"  {item.name}: {item.reason}" for item in unreadable[:20]]
    if len(unreadable) > len(shown):
        shown.append(f"  and {len(unreadable) - len(shown):,} more")
    share = len(unreadable) / total
    raise DataError(
        f"{len(unreadable):,} of {total:,} images ({share:.1%}) cannot be read, more than "
        f"--max_unreadable {options.max_unreadable:g} allows:\n" + "\n".join(shown) + "\n"
        f"Replace or remove them, or leave them out with --max_unreadable {_round_up(share):g}"
    )


def _round_up(share: float) -> float:
    return min(1.0, (int(share * 100) + 1) / 100)


def group_of(pattern: re.Pattern[str], path: str) -> str | None:
    """The part of a path that a regular expression finds; None if it finds nothing."""
    match = pattern.search(path)
    if match is None:
        return None
    return match.group(1 if pattern.groups else 0)
