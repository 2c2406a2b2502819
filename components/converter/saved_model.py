"""What is converted: the exported SavedModel, from pixels to probabilities and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

INPUT = "images"
OUTPUT = "probabilities"
SIGNATURE = "serving_default"

# uint8 [N, H, W, 3] -> float32 [N, classes]
Predict = Callable[[np.ndarray], np.ndarray]


class ConversionError(RuntimeError):
    """The model could not be converted, or the result cannot be run."""


class PixelsToProbabilities(tf.Module):
    """A SavedModel's `serving_default` with its probabilities as the only output.

    The names and the best five, which other runtimes have no operations or no use for, are left
    out. Whatever layers the model was made of does not matter: its graph is what is converted.

    Args:
      model_dir: Folder of the SavedModel.

    Raises:
      ConversionError: It does not have that signature.
    """

    def __init__(self, model_dir: str) -> None:
        super().__init__()
        self._model = tf.saved_model.load(model_dir)
        signature = self._model.signatures.get(SIGNATURE)
        outputs = [] if signature is None else list(signature.structured_outputs)
        if OUTPUT not in outputs:
            raise ConversionError(
                f"the model in {model_dir} has no signature {SIGNATURE} with the output {OUTPUT}"
            )

        @tf.function(input_signature=[signature.structured_input_signature[1][INPUT]])
        def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
            return {OUTPUT: signature(**{INPUT: images})[OUTPUT]}

        self.predict = predict

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, H, W, 3] to probabilities float32 [N, classes]."""
        return self.predict(tf.constant(images))[OUTPUT].numpy()
