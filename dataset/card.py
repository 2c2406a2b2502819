"""The data card: what is known of a data set, written once by ExampleGen and read by everybody.

It lies beside the splits of the examples, and in the assets of every model trained on them.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dataset.format import DataError
from dataset.images import Resize

CARD_FILE = "dataset.json"
TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
CHANNELS = 3  # RGB

# What a card does not know, and what it lacks, are errors: a reader of another version would
# otherwise take a default for a fact.
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Split:
    """One split.

    Attributes:
      examples: How many there are.
      derived: Whether they were set apart here, as the source has no such split.
    """

    examples: int
    derived: bool


@dataclass(frozen=True, config=_STRICT)
class Superclasses:
    """A coarser division of the classes.

    Attributes:
      names: By the superclass's index.
      of_class: For each class, its superclass; None where no example tells.
    """

    names: tuple[str, ...]
    of_class: tuple[int | None, ...]


@dataclass(frozen=True, config=_STRICT)
class SourceInfo:
    """Where the examples are from.

    Attributes:
      kind: Of `dataset.source.KINDS`.
      location: What the user named.
      fingerprint: SHA-256 of the contents, hexadecimal; other contents, other fingerprint.
      smallest: Height and width of the image with the fewest pixels.
      largest: Of that with the most.
      unreadable: Images that were left out because they could not be read.
      duplicates: Images that were left out of train because another split has them.
    """

    kind: str
    location: str
    fingerprint: str
    smallest: tuple[int, int]
    largest: tuple[int, int]
    unreadable: int
    duplicates: int


@dataclass(frozen=True, config=_STRICT)
class DataCard:
    """A data set.

    Attributes:
      name: `cifar-100`, `cifar-10`, `synthetic`, or the folder's or file's name.
      classes: Names of the classes; a position is a label.
      image_size: Height and width of the stored images, in pixels.
      resize: How images of other sizes become ones of that.
      splits: By name, of `SPLITS`.
      source: Where they are from.
      superclasses: None where there are none.
      limit: At most so many examples of each split were kept; None: all.
      subset: Whether these are fewer than the set that has this name is known to have.

    Raises:
      DataError: The parts contradict each other.
    """

    name: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    resize: Resize
    splits: Mapping[str, Split]
    source: SourceInfo
    superclasses: Superclasses | None
    limit: int | None
    subset: bool

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise DataError(f"the classes of {self.name!r} are none, or one name is there twice")
        if min(self.image_size) < 1:
            raise DataError(f"the images of {self.name!r} have {self.image_size} pixels")
        if self.superclasses and len(self.superclasses.of_class) != self.num_classes:
            raise DataError(
                f"{self.name!r} has {self.num_classes} classes and superclasses for "
                f"{len(self.superclasses.of_class)}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (*self.image_size, CHANNELS)

    @property
    def image_bytes(self) -> int:
        """Bytes of a stored image: uint8, row-major, RGB interleaved."""
        height, width = self.image_size
        return height * width * CHANNELS

    @property
    def top(self) -> int:
        """How many classes an answer names: five, or all if there are fewer."""
        return min(5, self.num_classes)

    @property
    def superclass_of(self) -> tuple[str, ...]:
        """For each class, the name of its superclass; empty where there is none."""
        if self.superclasses is None:
            return ("",) * self.num_classes
        names = self.superclasses.names
        return tuple("" if at is None else names[at] for at in self.superclasses.of_class)

    def to_json(self) -> str:
        """Writes the card, to be read by `from_json`."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"


_ADAPTER: TypeAdapter[DataCard] = TypeAdapter(DataCard)


def from_json(text: str | bytes, where: str) -> DataCard:
    """Reads a card.

    Args:
      text: What `DataCard.to_json` has written.
      where: It is from, for the message.

    Returns:
      The card.

    Raises:
      DataError: It is not JSON, a key is missing or unknown, or a value does not fit.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        reasons = [
            f"{'.'.join(map(str, item['loc'])) or 'it'}: {item['msg']}" for item in error.errors()
        ]
        raise DataError(
            f"{where} is not the data card that this version reads ({'; '.join(reasons[:3])}): "
            "let ExampleGen write it anew, or use the version that wrote it"
        ) from None
