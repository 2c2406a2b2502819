"""The notebook's model as the notebook has it against ours, in images per second.

    .venv/bin/python benchmarks/train_step.py --data cifar-100-binary.tar.gz

Both take turns in one process, so that what else happens on the machine happens to both. Training
is a whole step of `fit`: augmentation, forward, backward, AdamW. Inference is what a model server
runs, from uint8 pixels to probabilities. Targets on two CPU cores: twice the notebook's rate in
each row; the input pipeline 20 times the rate of our training step.

For each row the best of all rounds is printed, and the seconds of CPU that the process has spent in
a call, median over the rounds, which say the same where other processes share the cores.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from serving.quiet import quiet_tensorflow

with quiet_tensorflow():
    import apache_beam as beam
    import keras
    import numpy as np
    import tensorflow as tf
    import tensorflow_transform as tft
    import tensorflow_transform.beam as tft_beam

    from dataset.format import NUM_FINE_CLASSES, TRAIN_FILE, read_records
    from dataset.locate import locate
    from trainer import preprocessing, presets
    from trainer.input import FEATURES, raw_bytes, training_batches
    from trainer.network import inference, model
    from trainer.optimizer import compile_network

_BATCH = 256


class Call(NamedTuple):
    """Something to time.

    Attributes:
      run: Returns when it is done.
      images: That it handles.
      repeats: Calls in one round.
    """

    run: Callable[[], object]
    images: int
    repeats: int


class Timing(NamedTuple):
    """Of one call.

    Attributes:
      seconds: Wall time, the least of all rounds.
      cpu_seconds: Of this process, the median of all rounds.
    """

    seconds: float
    cpu_seconds: float


def alternate(calls: dict[str, Call], rounds: int) -> dict[str, Timing]:
    """Times calls in turn.

    Args:
      calls: By name.
      rounds: How often each has its turn, after one that does not count.
    """
    walls: dict[str, list[float]] = {name: [] for name in calls}
    cpus: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call.run()
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(call.repeats):
                call.run()
            walls[name].append((time.perf_counter() - wall) / call.repeats)
            cpus[name].append((time.process_time() - cpu) / call.repeats)
    return {name: Timing(min(walls[name]), float(np.median(cpus[name]))) for name in calls}


def build_calls(images: np.ndarray, labels: np.ndarray) -> dict[str, Call]:
    """Training and inference of both models.

    Args:
      images: uint8 [256, H, W, 3].
      labels: int64 [256].

    Returns:
      "WHO WHAT" -> call; WHO is `notebook` or `ours`.
    """
    preset = presets.get_preset("notebook")
    mean, variance = images.mean(axis=(0, 1, 2)), images.var(axis=(0, 1, 2))
    mean, variance = mean.astype(np.float32), variance.astype(np.float32)
    normalized = preprocessing.normalize(tf.constant(images), mean, variance)
    targets = tf.constant(labels)
    calls = {}
    for who, plain in (("notebook", True), ("ours", False)):
        # A test holds the plain model to a literal restatement of the notebook's code.
        network = model.build_model(preset, images.shape[1:], NUM_FINE_CLASSES, seed=0, plain=plain)
        compile_network(network, preset, steps_per_epoch=176)
        served = network if plain else inference.for_inference(network)

        def train(network: keras.Model = network) -> None:
            network.train_on_batch(normalized, targets)

        @tf.function(input_signature=[tf.TensorSpec([None, *images.shape[1:]], tf.uint8)])
        def predict(pixels: tf.Tensor, served: keras.Model = served) -> tf.Tensor:
            logits = served(preprocessing.normalize(pixels, mean, variance), training=False)
            return tf.nn.softmax(logits)

        calls[f"{who} training, batch {_BATCH}"] = Call(train, _BATCH, 1)
        for size, repeats in ((_BATCH, 1), (1, 50)):
            batch = tf.constant(images[:size])

            def infer(predict: Callable = predict, batch: tf.Tensor = batch) -> None:
                predict(batch).numpy()

            calls[f"{who} inference, batch {size}"] = Call(infer, size, repeats)
    return calls


def transform_graph(images: np.ndarray, labels: np.ndarray, folder: Path) -> tft.TFTransformOutput:
    """Runs Transform's analysis.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int64 [N].
      folder: To write the transform graph to.
    """
    metadata = tft.DatasetMetadata.from_feature_spec(FEATURES)
    rows = [
        {preprocessing.IMAGE_KEY: image.tobytes(), preprocessing.LABEL_KEY: int(label)}
        for image, label in zip(images, labels)
    ]
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(folder / "tmp")):
        graph = (pipeline | beam.Create(rows), metadata) | tft_beam.AnalyzeDataset(
            preprocessing.preprocessing_fn
        )
        _ = graph | tft_beam.WriteTransformFn(str(folder / "transform"))
    return tft.TFTransformOutput(str(folder / "transform"))


def input_rate(images: np.ndarray, labels: np.ndarray, folder: Path) -> float:
    """Images per second of the Trainer's input when nothing else is computed.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int64 [N].
      folder: To write a transform graph to.
    """
    dataset = training_batches(
        raw_bytes(images),
        labels,
        transform_graph(images[:1000], labels[:1000], folder),  # enough to have its constants
        images.shape[1:],
        batch_size=_BATCH,
        seed=0,
    ).take(math.ceil(len(images) / _BATCH))
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in dataset:
            pass
        rates.append(len(images) / (time.perf_counter() - began))
    return max(rates)


def matmul_gflops() -> float:
    """What float32 matrix products reach on this machine, in 10⁹ operations per second."""
    a = tf.random.normal([2048, 2048])
    product = tf.function(lambda: tf.reduce_sum(a @ a))
    timing = alternate({"matmul": Call(lambda: product().numpy(), 1, 3)}, rounds=3)["matmul"]
    return 2 * 2048**3 / timing.seconds / 1e9


def report(timings: dict[str, Timing], calls: dict[str, Call], input_per_second: float) -> str:
    """Lays out what was measured."""
    lines = [f"{'images/s':<24}{'notebook':>10}{'ours':>10}{'ratio':>8}{'CPU time':>10}  (target)"]
    for name in calls:
        who, _, what = name.partition(" ")
        if who == "ours":
            plain, ours = timings[f"notebook {what}"], timings[name]
            images = calls[name].images
            lines.append(
                f"{what:<24}{images / plain.seconds:10.1f}{images / ours.seconds:10.1f}"
                f"{plain.seconds / ours.seconds:8.2f}{plain.cpu_seconds / ours.cpu_seconds:10.2f}"
                "  (2)"
            )
    step = _BATCH / timings[f"ours training, batch {_BATCH}"].seconds
    lines.append(
        f"{'input pipeline alone':<24}{'':10}{input_per_second:10.0f}"
        f"{input_per_second / step:8.1f}{'':10}  (20, to our training)"
    )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="as for the pipeline")
    parser.add_argument("--rounds", type=int, default=8, help="default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = locate(options.data, Path(folder))
        images, labels, _ = read_records(dataset.folder / TRAIN_FILE)
        calls = build_calls(images[:_BATCH], labels[:_BATCH])
        timings = alternate(calls, options.rounds)
        per_second = input_rate(images, labels, Path(folder))
        print(f"\n{os.cpu_count()} cores, {matmul_gflops():.0f} GFLOPS in float32 matrix products")
        print(report(timings, calls, per_second))


if __name__ == "__main__":
    main()
