"""Classifies image files with a pushed model, in this process and without a server.

`python -m serving.predict --model output/serving_models/cifar100_vit cat.jpg photos/`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from serving.images import ServingError, answers, as_text, find_images, read
from serving.quiet import quiet_tensorflow

SIGNATURE_NAME = "serving_bytes"
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
      images: PNG or JPEG files of any size.

    Yields:
      For each image its `image` (path) and `classes`: five objects of `name`, `superclass`, `id`
      and `probability`, the most probable first.

    Raises:
      ServingError: There is no model, or a file is not an image.
    """
    version = find_version(model_dir)
    with quiet_tensorflow():
        import tensorflow as tf

    try:
        signature = tf.saved_model.load(str(version)).signatures[SIGNATURE_NAME]
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ServingError(f"{version} is damaged, push it again: {reason}") from error
    except KeyError:
        raise ServingError(
            f"{version} has no signature {SIGNATURE_NAME!r}: it is not a model of this pipeline."
        ) from None
    for begin in range(0, len(images), _BATCH_SIZE):
        batch = images[begin : begin + _BATCH_SIZE]
        contents = [read(path) for path in batch]
        try:
            outputs = signature(image_bytes=tf.constant(contents))
        except tf.errors.InvalidArgumentError:
            broken = [p for p, c in zip(batch, contents) if not _is_image(c)]
            names = ", ".join(map(str, broken or batch))
            raise ServingError(f"not a PNG or JPEG image: {names}.") from None
        yield from answers(batch, {name: value.numpy() for name, value in outputs.items()})


def _is_image(content: bytes) -> bool:
    import tensorflow as tf

    try:
        tf.io.decode_image(content, channels=3, expand_animations=False)
    except tf.errors.InvalidArgumentError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Classifies the files of a command line and prints a table or JSON lines.

    Raises:
      SystemExit: With code 1 and a message when the model or an image cannot be used.
    """
    parser = argparse.ArgumentParser(prog="vit-predict", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="file or folder")
    parser.add_argument(
        "--model", required=True, type=Path, help="folder that the pipeline pushed to"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image")
    options = parser.parse_args(arguments)
    try:
        for result in classify(options.model, find_images(options.images)):
            print(json.dumps(result) if options.json else as_text(result), flush=True)
    except ServingError as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
