"""Trains a preset with JAX, all data on the device, and needs no TensorFlow.

    python -m benchmarks.gpu_train --preset vit_cifar --data cifar-100-binary.tar.gz --out trained

from the project's folder, with `jax`, `keras` and `numpy` installed (`pip install "jax[cuda12]"
"keras>=3.12"` on a machine with a GPU; on a CPU it runs, slowly, after minutes of compilation). It
trains on all of train.bin and measures on test.bin after each epoch; nothing is chosen by those
figures, the last epoch's are the result. An epoch is one compiled program: examples are gathered,
normalized, mixed and augmented on the device. Interrupted, the same command goes on after the last
checkpoint.

In --out it leaves `model.weights.h5` and `training.json` (see `trainer/trained.py`), which
`benchmarks/export_trained.py` evaluates and exports for serving with TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np

from components.dataset import format as binary
from components.dataset.locate import locate
from trainer import presets, trained
from trainer.on_jax.training import Split, Training
from trainer.preset import Preset

_PRECISIONS = {"bfloat16": "mixed_bfloat16", "float32": "float32"}


def train(
    preset: Preset,
    data: tuple[Split, Split],
    out: Path,
    *,
    seed: int = 0,
    num_classes: int = binary.NUM_FINE_CLASSES,
    checkpoint_every: int = 5,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, or trains on from a checkpoint in `out`, and leaves the model there.

    Args:
      preset: What to train.
      data: The training and the test split.
      out: Folder to write to; of this preset, data and seed alone.
      seed: Of everything random.
      num_classes: Classes of the labels.
      checkpoint_every: Epochs between checkpoints.
      report: Gets a line after each epoch.

    Returns:
      The contents of `training.json`.

    Raises:
      ValueError: `out` has another training, or a finished one; the split is too small; or the loss
        is no number any more.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}: it must be at least 1 epoch.")
    split, test = data
    training = Training(preset, split, num_classes, seed)
    what = {
        "preset": json.loads(json.dumps(dataclasses.asdict(preset))),
        "seed": seed,
        "precision": keras.config.dtype_policy().name,
        "data": hashlib.sha256(split.images.tobytes()).hexdigest(),
    }
    history = _restore(training, out, what)
    test = test.on_device()
    state = training.state()
    for epoch in range(len(history), preset.epochs):
        began = time.perf_counter()
        state, loss = training.epoch(state, epoch)
        seconds = time.perf_counter() - began
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss of epoch {epoch + 1} is {loss}: try --precision float32, or a preset "
                "with a lower learning_rate or with gradient_clip_norm."
            )
        shown = training.averaged(state)
        top_1, top_5 = training.evaluate(shown, test)
        rate = training.steps * preset.batch_size / seconds
        history.append(
            {
                "epoch": epoch + 1,
                "loss": round(loss, 5),
                "test_top_1_accuracy": top_1,
                "test_top_5_accuracy": top_5,
                "seconds": round(seconds, 2),
            }
        )
        if (epoch + 1) % checkpoint_every == 0:
            training.assign(state)
            _save(training, out, {**what, "history": history})
        report(
            f"epoch {epoch + 1}/{preset.epochs}  loss {loss:.4f}  test top-1 {top_1:.4f}  "
            f"top-5 {top_5:.4f}  {rate:,.0f} images/s"
        )
    training.assign(training.averaged(state))
    result = {
        **what,
        "num_classes": num_classes,
        "train_examples": len(split.labels),
        "normalization": {
            "mean": training.mean.tolist(),
            "variance": training.variance.tolist(),
        },
        "trainable_parameters": sum(v.value.size for v in training.network.trainable_variables),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "keras": keras.__version__},
        "history": history,
    }
    trained.save(training.network, result, out)
    for path in _checkpoints(out):
        _told(path).unlink()
        path.unlink()
    return result


def _checkpoints(out: Path) -> list[Path]:
    """Weights and optimizer of finished epochs; beside each a file that tells what they are."""
    return sorted(path for path in out.glob("epoch-*.weights.h5") if _told(path).is_file())


def _told(path: Path) -> Path:
    return path.with_name(path.name.replace(".weights.h5", ".json"))


def _save(training: Training, out: Path, told: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    earlier = _checkpoints(out)
    path = out / f"epoch-{len(told['history']):06}.weights.h5"
    trained.save_weights(training.network, path)
    trained.write_json(told, _told(path))  # last: without it the weights do not count
    for old in earlier:
        _told(old).unlink()
        old.unlink()


def _restore(training: Training, out: Path, what: dict[str, Any]) -> list[dict[str, Any]]:
    """Loads the last checkpoint, if there is one; returns the metrics of its epochs."""
    if (out / trained.REPORT_FILE).exists():
        raise ValueError(f"{out} has a finished training: give another --out, or remove it.")
    saved = _checkpoints(out)
    if not saved:
        return []
    told = json.loads(_told(saved[-1]).read_text())
    history = told.pop("history")
    if told != what:
        raise ValueError(
            f"{out} has a checkpoint of another training: give the same preset, epochs, batch size "
            "and seed, or another --out."
        )
    training.network.load_weights(saved[-1])
    return history


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; returns the exit status."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="vit_cifar", help="default: %(default)s")
    parser.add_argument("--data", required=True, help="archive or folder, as for the pipeline")
    parser.add_argument("--out", required=True, type=Path, help="folder for checkpoints and model")
    parser.add_argument("--epochs", type=int, help="default: the preset's")
    parser.add_argument("--batch_size", type=int, help="default: the preset's")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="float32" if on_cpu else "bfloat16",
        help="of what is computed; variables are float32 (default: bfloat16, on a CPU float32)",
    )
    parser.add_argument(
        "--checkpoint_every", type=int, default=5, help="epochs (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if keras.config.backend() != "jax":
        parser.error(f"KERAS_BACKEND is {keras.config.backend()}: set it to jax, or unset it")
    keras.config.set_dtype_policy(_PRECISIONS[options.precision])
    # Keras's MixUp numbers images in int64, which JAX is not set to have, and need not.
    warnings.filterwarnings("ignore", "Explicitly requested dtype int64")
    try:
        given: dict[str, Any] = {
            name: getattr(options, name)
            for name in ("epochs", "batch_size")
            if getattr(options, name) is not None
        }
        given["train_minutes"] = 0.0  # epochs, which do not depend on the machine
        preset = dataclasses.replace(presets.get_preset(options.preset), **given)
        options.out.mkdir(parents=True, exist_ok=True)
        folder = locate(options.data, options.out / "data").folder
        splits = [
            Split(*binary.read_records(folder / name)[:2])
            for name in (binary.TRAIN_FILE, binary.TEST_FILE)
        ]
        result = train(
            preset,
            (splits[0], splits[1]),
            options.out,
            seed=options.seed,
            checkpoint_every=options.checkpoint_every,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    last = result["history"][-1]
    # The first epoch's time has the compilation in it.
    seconds = [epoch["seconds"] for epoch in result["history"][1:]] or [last["seconds"]]
    images = len(splits[0].labels) // preset.batch_size * preset.batch_size
    print(
        f"{preset.name} on {result['device']} in {result['precision']}: test top-1 "
        f"{last['test_top_1_accuracy']:.4f}, top-5 {last['test_top_5_accuracy']:.4f} after "
        f"{preset.epochs} epochs; {images / float(np.median(seconds)):,.0f} images/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
