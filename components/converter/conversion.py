"""Makes the files of a format, and measures how well each agrees with the SavedModel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from components.converter import formats, tflite
from components.converter.formats import ExportedFile
from components.converter.saved_model import PixelsToProbabilities, Predict

# The last batch of a split is another size: the batch dimension must be a dynamic one.
_BATCH_SIZE = 96
_TIMED_IMAGES = 100


@dataclass(frozen=True)
class Reference:
    """What the files are compared on.

    Attributes:
      pixels: uint8 [N, H, W, 3].
      labels: int64 [N].
      expected: float32 [N, classes], the SavedModel's probabilities.
    """

    pixels: np.ndarray
    labels: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True)
class Result:
    """What was found out about a file.

    Attributes:
      name: The file's.
      size: In bytes.
      agreement: For how many of the test images its most probable class is the SavedModel's, as a
        fraction.
      min_agreement: The least with which it is kept.
      top_1_accuracy: On the same images, a fraction.
      largest_difference: From the SavedModel's probabilities.
      ms_per_image: Median time of a call with one image, on one thread, in milliseconds.
      problem: Why the file is refused; empty if it is kept.
    """

    name: str
    size: int
    agreement: float
    min_agreement: float
    top_1_accuracy: float
    largest_difference: float
    ms_per_image: float
    problem: str

    def to_json(self) -> dict[str, float | str]:
        """As it is written to the report."""
        return asdict(self)


def convert(
    model: PixelsToProbabilities,
    names: Sequence[str],
    representative: np.ndarray,
    labels: Sequence[str],
) -> Iterator[tuple[ExportedFile, bytes, Predict]]:
    """Makes the files of formats, one after the other.

    Args:
      model: What to convert.
      names: Of `formats.FORMATS`, whose packages are installed.
      representative: uint8 [N, H, W, 3] of the training split, to quantize with.
      labels: The classes' names.

    Yields:
      A file, its contents, and the contents ready to be called.

    Raises:
      ConversionError: A format cannot express the model.
    """
    if formats.TFLITE in names:
        content = tflite.convert_float16(model)
        yield formats.FLOAT16, content, tflite.load(content)
        content = tflite.convert_int8(model, representative)
        yield formats.INT8, content, tflite.load(content)
    if formats.ONNX in names:
        # Only here: its packages are an extra.
        from components.converter import onnx_model

        content = onnx_model.convert(model, labels)
        yield formats.ONNX_MODEL, content, onnx_model.load(content)


def answers(predict: Predict, pixels: np.ndarray) -> np.ndarray:
    """Calls a model with images, in batches.

    Args:
      predict: The model.
      pixels: uint8 [N, H, W, 3].

    Returns:
      float32 [N, classes].
    """
    parts = range(0, len(pixels), _BATCH_SIZE)
    return np.concatenate([predict(pixels[begin : begin + _BATCH_SIZE]) for begin in parts])


def measure(file: ExportedFile, content: bytes, predict: Predict, reference: Reference) -> Result:
    """Compares a file with the SavedModel.

    Args:
      file: Which it is.
      content: Its contents.
      predict: The contents ready to be called.
      reference: What to compare with.
    """
    # What is no number, as after an overflow in float16, is no answer.
    returned = np.nan_to_num(answers(predict, reference.pixels), posinf=0.0, neginf=0.0)
    agreement = top_1_accuracy(returned, reference.expected.argmax(axis=-1))
    problem = ""
    if agreement < file.min_agreement:
        problem = (
            f"agrees with the SavedModel on {agreement:.1%} of {len(returned):,} test images, "
            f"below the {file.min_agreement:.1%} that it must"
        )
    return Result(
        name=file.name,
        size=len(content),
        agreement=agreement,
        min_agreement=file.min_agreement,
        top_1_accuracy=top_1_accuracy(returned, reference.labels),
        largest_difference=float(np.abs(returned - reference.expected).max()),
        ms_per_image=_milliseconds(predict, reference.pixels),
        problem=problem,
    )


def top_1_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """For how many images the most probable class is the given one, as a fraction."""
    return float((probabilities.argmax(axis=-1) == labels).mean())


def _milliseconds(predict: Predict, pixels: np.ndarray) -> float:
    times = []
    for index in range(min(len(pixels), _TIMED_IMAGES)):
        start = time.perf_counter()
        predict(pixels[index : index + 1])
        times.append(1e3 * (time.perf_counter() - start))
    return round(float(np.median(times)), 3)
