"""Classifies image files with a pushed model, in this process and without a server.

`python -m serving.predict --model output/serving_models/cifar100_vit cat.jpg photos/`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.encoding import IMAGES, INPUTS
from serving.images import ServingError, classify_batch, find_images, load_batches, resize_of
from serving.printing import lines, run
from serving.quiet import quiet_tensorflow

_BATCH_SIZE = 64


def find_version(model_dir: Path) -> Path:
    """Finds the newest version, as TF Serving would.

    Args:
      model_dir: A TF Serving model base path, or one version in it.

    Returns:
      The folder of a SavedModel.

    Raises:
      ServingError: There is none.
    """
    if (model_dir / "saved_model.pb").is_file():
        return model_dir
    versions = [path.parent for path in model_dir.glob("*/saved_model.pb")]
    numbered = [path for path in versions if path.name.isdecimal()]
    if not numbered:
        raise ServingError(
            f"{model_dir} holds no model: give the folder that the pipeline pushed to "
            "(its summary names it)."
        )
    return max(numbered, key=lambda path: int(path.name))


def classify(model_dir: Path, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Classifies images.

    Args:
      model_dir: See `find_version`.
      images: Files of any size and of a format that `dataset.images` reads.

    Yields:
      For each image its `image` (path) and `classes`: five objects of `name`, `superclass`, `id`
      and `probability`, the most probable first. For a file that is none its `image` and `error`,
      the reason.

    Raises:
      ServingError: There is no model.
    """
    version = find_version(model_dir)
    with quiet_tensorflow():
        import tensorflow as tf

    try:
        signature = tf.saved_model.load(str(version)).signatures[IMAGES]
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ServingError(f"{version} is damaged, push it again: {reason}") from error
    except KeyError:
        raise ServingError(
            f"{version} has no signature {IMAGES!r}: it is not a model of this pipeline."
        ) from None
    takes = signature.structured_input_signature[1].get(INPUTS[IMAGES])
    if takes is None or takes.shape.rank != 4:
        raise ServingError(f"{version} takes no images: it is not a model of this pipeline.")

    def predict(batch: list[np.ndarray]) -> dict[str, np.ndarray]:
        outputs = signature(**{INPUTS[IMAGES]: tf.constant(np.stack(batch))})
        return {name: value.numpy() for name, value in outputs.items()}

    for batch in load_batches(images, tuple(takes.shape[1:3]), _BATCH_SIZE, resize_of(version)):
        yield from classify_batch(batch, predict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Classifies the files of a command line and prints a table or JSON lines.

    Raises:
      SystemExit: See `serving.printing.run`.
    """
    parser = argparse.ArgumentParser(prog="vit-predict", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="file or folder")
    parser.add_argument(
        "--model", required=True, type=Path, help="folder that the pipeline pushed to"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image")
    options = parser.parse_args(arguments)
    run(_lines(options))


def _lines(options: argparse.Namespace) -> Iterator[str]:
    results = classify(options.model, find_images(options.images))
    yield from lines(results, options.json)


if __name__ == "__main__":
    main()
