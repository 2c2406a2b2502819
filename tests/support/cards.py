"""Data cards for tests that need no examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataset.card import DataCard, SourceInfo, Superclasses
from dataset.synthetic import LABEL_NAMES


def make_card(classes: Sequence[str], **fields: Any) -> DataCard:
    """A card of images of 32 x 32 without superclasses, unless `fields` say otherwise."""
    source = SourceInfo("synthetic", "nowhere", "0" * 64, (32, 32), (32, 32), 0, 0)
    defaults: dict[str, Any] = {
        "name": "synthetic",
        "classes": tuple(classes),
        "image_size": (32, 32),
        "resize": "crop",
        "splits": {},
        "source": source,
        "superclasses": None,
        "limit": None,
        "subset": False,
    }
    return DataCard(**{**defaults, **fields})


# Of the synthetic set.
SYNTHETIC_CARD = make_card(
    LABEL_NAMES.fine,
    superclasses=Superclasses(LABEL_NAMES.coarse, tuple(label // 5 for label in range(100))),
)
