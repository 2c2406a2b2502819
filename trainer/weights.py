"""A network's weights as one file that every backend reads."""

from __future__ import annotations

import io

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
