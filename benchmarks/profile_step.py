"""What a training step spends its time on, by kind of operation.

    .venv/bin/python benchmarks/profile_step.py --preset notebook --plain   # as the notebook has it
    .venv/bin/python benchmarks/profile_step.py --preset notebook           # ours

Random images: what a step costs does not depend on them. Operations that run at the same time on
several cores all count, so the sum may be more than the step takes.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
from pathlib import Path

from serving.quiet import quiet_tensorflow

with quiet_tensorflow():
    import numpy as np
    import tensorflow as tf

    try:
        from tensorflow.tsl.profiler.protobuf import xplane_pb2
    except ImportError:  # moved between TensorFlow's versions
        from tensorflow.core.profiler.protobuf import xplane_pb2

    from dataset.format import IMAGE_SHAPE, NUM_FINE_CLASSES
    from trainer import precision, presets
    from trainer.network import model
    from trainer.optimizer import compile_network

_STEPS = 3


def operations(folder: Path) -> tuple[collections.Counter, collections.Counter]:
    """Reads a trace.

    Args:
      folder: Of `tf.profiler.experimental.start`.

    Returns:
      (seconds, number of calls) by kind of operation, on the host; of what an operation calls, the
      time counts for that alone.
    """
    (path,) = folder.rglob("*.xplane.pb")
    space = xplane_pb2.XSpace()
    space.ParseFromString(path.read_bytes())
    seconds: collections.Counter = collections.Counter()
    calls: collections.Counter = collections.Counter()
    for plane in space.planes:
        if not plane.name.startswith("/host"):
            continue
        names = {key: value.name for key, value in plane.event_metadata.items()}
        for line in plane.lines:
            open_events: list[tuple[int, str]] = []  # (end in ps, kind), the innermost last
            for event in sorted(line.events, key=lambda e: (e.offset_ps, -e.duration_ps)):
                while open_events and open_events[-1][0] <= event.offset_ps:
                    open_events.pop()
                _, is_operation, kind = names[event.metadata_id].partition(":")
                if not is_operation or kind.startswith((":", " ")):  # what runs them
                    continue
                seconds[kind] += event.duration_ps / 1e12
                calls[kind] += 1
                if open_events:
                    seconds[open_events[-1][1]] -= event.duration_ps / 1e12
                open_events.append((event.offset_ps + event.duration_ps, kind))
    return seconds, calls


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default=presets.ON_CPU, help="default: %(default)s")
    parser.add_argument("--plain", action="store_true", help="the layers of the reference")
    parser.add_argument("--lines", type=int, default=16, help="default: %(default)s")
    options = parser.parse_args()
    preset = presets.get_preset(options.preset)
    policy = precision.policy_name(preset, on_gpu=False)
    with precision.dtype_policy(policy):
        network = model.build_model(
            preset, IMAGE_SHAPE, NUM_FINE_CLASSES, seed=0, plain=options.plain
        )
        compile_network(network, preset, steps_per_epoch=1)
    images = tf.random.normal([preset.training.batch_size, *IMAGE_SHAPE])
    labels = tf.constant(np.arange(preset.training.batch_size) % NUM_FINE_CLASSES)
    for _ in range(2):
        network.train_on_batch(images, labels)
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(_STEPS):
            network.train_on_batch(images, labels)
        tf.profiler.experimental.stop()
        seconds, calls = operations(Path(folder))
    print(f"{preset.name}, {policy}, a step of {preset.training.batch_size} images:")
    for kind, _ in seconds.most_common(options.lines):
        name = kind.removeprefix("_Mkl").removeprefix("Native")
        print(f"{1e3 * seconds[kind] / _STEPS:9.1f} ms {calls[kind] / _STEPS:7.0f} x  {name}")
    print(f"{1e3 * sum(seconds.values()) / _STEPS:9.1f} ms          all operations")


if __name__ == "__main__":
    main()
