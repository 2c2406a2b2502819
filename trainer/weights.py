"""A network's weights as one file that every backend reads."""

from __future__ import annotations

import io
from collections.abc import Sequence

import keras
import numpy as np


def pack(network: keras.Model) -> bytes:
    """The weights as NumPy's npz, in the order of `network.weights`, which is part of their names.

    Not as Keras writes them, by the layers' classes: those depend on more than the architecture
    (`trainer.network.model.build_model` computes the same in several ways), and the order does not.
    """
    buffer = io.BytesIO()
    names = (f"{index:04}/{weight.path}" for index, weight in enumerate(network.weights))
    np.savez(buffer, **dict(zip(names, network.get_weights())))
    return buffer.getvalue()


def unpack(packed: bytes) -> list[np.ndarray]:
    """Reads what `pack` has made: an array for each of `network.weights`."""
    with np.load(io.BytesIO(packed)) as arrays:
        return [arrays[name] for name in sorted(arrays)]


def load(network: keras.Model, arrays: Sequence[np.ndarray], *, classifier: bool = True) -> None:
    """Sets a network's weights.

    Args:
        network: Of `trainer.network.model.build_model`.
        arrays: Of `unpack`, of a network of the same architecture.
        classifier: Whether to set the last layer's, too, which has a column for each class.

    Raises:
        ValueError: They do not fit.
    """
    kept = [] if classifier else [id(weight) for weight in network.get_layer("logits").weights]
    pairs = list(zip(network.weights, arrays))
    pairs = [(weight, array) for weight, array in pairs if id(weight) not in kept]
    if len(arrays) != len(network.weights) or any(tuple(w.shape) != a.shape for w, a in pairs):
        raise ValueError(
            f"there are {len(arrays)} weights, the network has {len(network.weights)}, or of other "
            "shapes"
        )
    for weight, array in pairs:
        weight.assign(array)
