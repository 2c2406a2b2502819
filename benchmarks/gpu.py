"""What a GPU does with these trainings, in a few minutes of its time, with JAX and no network.

    python -m benchmarks.gpu measure --data cifar-100-binary --out gpu --seconds 200
    python -m benchmarks.gpu train   --data cifar-100-binary --out gpu --seconds 340

from the project's folder, with `jax`, `keras`, `numpy`, `pydantic` and `scipy` installed. Each
command ends in time and goes on where the last one ended: what --out has is not done again.
Programs are compiled a few at a time, each in a process of its own, and timed one after the other
while none compiles: compiling tries out kernels on the GPU, and sixteen programs side by side took
three minutes on an H200 and spoiled all timings.

`measure` prints images per second of a training step with augmentation, data on the device, and the
floating-point operations per second that those are, and trains some candidates for a quarter of a
minute each on nine tenths of the training images, to be compared on the others. `train` trains on
all of them, as many epochs as fit, measures on the test images now and then, and writes a JSON file
and the weights of each; nothing is chosen by those figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STARTED = time.time()
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes on one GPU

_IMAGES = 25_600  # of a timed epoch
_SIDE_BY_SIDE = 5
_COMPILE_SECONDS = 100.0
_CANDIDATE_SECONDS = 12.0
_COMMAND_BUFFERS = (
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE,"
    "DYNAMIC_SLICE_FUSION"
)
# Dense products in bfloat16, TFLOP/s, by what the device calls itself (vendor's data sheets).
_PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L4": 121.0, "T4": 65.0}


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step to be timed.

    Attributes:
      preset: Of `trainer.presets`.
      fields: Of the preset, to be replaced.
      policy: Keras dtype policy.
      plain: As the reference computes it, see `trainer.network.model.build_model`.
      flags: Of XLA.
      cudnn_attention: Whether cuDNN's fused kernel is in the place of `compact_layers.attend`.
      candidate: Whether to train with it for `_CANDIDATE_SECONDS`.
    """

    preset: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: str = "mixed_bfloat16"
    plain: bool = False
    flags: str = ""
    cudnn_attention: bool = False
    candidate: bool = False


def _batch(size: int, **fields: Any) -> dict[str, Any]:
    return {"batch_size": size, **fields}


# The learning rate grows with the root of the batch size.
PROGRAMS = {
    "notebook's own code, 256": Program("notebook", policy="float32", plain=True),
    "notebook, 256": Program("notebook"),
    "notebook, 256, command buffers": Program("notebook", flags=_COMMAND_BUFFERS),
    "notebook, 1024": Program("notebook", _batch(1024)),
    "notebook, 4096": Program("notebook", _batch(4096)),
    "notebook, 256, float32": Program("notebook", policy="float32"),
    "compact_long, 128": Program("compact_long", candidate=True),
    "compact_long, 128, command buffers": Program("compact_long", flags=_COMMAND_BUFFERS),
    "compact_long, 512": Program("compact_long", _batch(512, learning_rate=0.024), candidate=True),
    "compact_wide, 128": Program("compact_wide", candidate=True),
    "compact_wide, 256": Program("compact_wide", _batch(256, learning_rate=0.017), candidate=True),
    "compact_wide, 256, command buffers": Program(
        "compact_wide", _batch(256), flags=_COMMAND_BUFFERS
    ),
    "compact_wide, 256, no depthwise convolution": Program(
        "compact_wide",
        _batch(256, learning_rate=0.017, depthwise_convolution=False),
        candidate=True,
    ),
    "compact_wide, 256, four blocks": Program(
        "compact_wide",
        _batch(
            256,
            learning_rate=0.017,
            transformer_layers=4,
            transformer_units=(448, 256),
            tokenizer_residual_pairs=(0, 1, 1),
        ),
        candidate=True,
    ),
    "compact_wide, 256, cuDNN's attention": Program(
        "compact_wide", _batch(256), cudnn_attention=True
    ),
    "compact_wide, 1024": Program("compact_wide", _batch(1024)),
}


def say(*words: Any) -> None:
    """Prints with the seconds since the command began."""
    began = float(os.environ.setdefault("GPU_BENCHMARK_BEGAN", str(STARTED)))
    print(f"[{time.time() - began:6.1f}]", *words, flush=True)


def measure(options: argparse.Namespace) -> None:
    """Times every program that --out has no figure of, and trains the candidates."""
    deadline = STARTED + options.seconds
    done = {result["program"] for result in _read(options.out / "rates.jsonl")}
    programs = [name for name in options.programs or PROGRAMS if name not in done]
    for first in range(0, len(programs), _SIDE_BY_SIDE):
        if time.time() + 60 < deadline or options.rehearse:
            _measure_some(programs[first : first + _SIDE_BY_SIDE], options, deadline)
    _print_rates(options.out)


def _measure_some(programs: Sequence[str], options: argparse.Namespace, deadline: float) -> None:
    for path in (*options.out.glob("ready-*"), options.out / "go"):
        path.unlink(missing_ok=True)
    workers = {
        name: _start("worker", options, "--program", name, flags=PROGRAMS[name].flags)
        for name in programs
    }
    compile_until = min(deadline - 20, time.time() + _COMPILE_SECONDS)

    def compiling() -> list[str]:
        ready = {int(path.name.partition("-")[2]) for path in options.out.glob("ready-*")}
        return [
            name
            for name, process in workers.items()
            if list(PROGRAMS).index(name) not in ready and process.poll() is None
        ]

    while compiling() and time.time() < compile_until:
        time.sleep(0.2)
    for name in compiling():
        say(name, "was not compiled in time")
        workers.pop(name).kill()
    (options.out / "go").write_text(str(deadline))
    for name, process in workers.items():
        try:
            code = process.wait(max(1.0, deadline + 2 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = "no time left"
        if code:
            say(name, "ended:", code)


def worker(options: argparse.Namespace) -> None:
    """Compiles one program, and times it when its turn comes."""
    program = PROGRAMS[options.program]
    images, labels = _images(options.data, "train")
    held = len(labels) // 10
    training, split = _training(program, (images[held:], labels[held:]))
    import jax

    from trainer.on_jax.training import Split

    validation = training.batches(Split(images[:held], labels[:held]))
    began = time.time()
    state = training.state()
    steps = max(1, min(options.images, len(split.labels)) // training.preset.training.batch_size)
    draws = training.draws(0)
    rates = _flat(training)
    state, losses = training.run(training.begin(state, 0), draws, rates, 0, 1)
    if program.candidate:
        training.evaluate(state, validation)
    compiled = time.time() - began
    say(f"{options.program}: compiled in {compiled:.0f} s, loss {losses[0]:.3f}")
    index = list(PROGRAMS).index(options.program)
    (options.out / f"ready-{index}").touch()
    while not (options.out / "go").exists():
        time.sleep(0.1)
    deadline = float((options.out / "go").read_text())
    with _turn(options.out, index):
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            state, losses = training.run(state, draws, rates, 0, steps)
            seconds.append(time.perf_counter() - began)
            if time.time() > deadline:
                break
        second = sorted(seconds)[(len(seconds) - 1) // 2]
        rate = steps * training.preset.training.batch_size / second
        memory = jax.local_devices()[0].memory_stats() or {}
        result = {
            "program": options.program,
            "images_per_second": round(rate),
            "step_ms": round(1000 * second / steps, 3),
            "compile_seconds": round(compiled, 1),
            "parameters": sum(v.value.size for v in training.network.trainable_variables),
            "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
            **_operations(training, rate),
            "device": jax.devices()[0].device_kind,
            "loss": float(losses[-1]),
        }
        _append(options.out / "rates.jsonl", result)
        say(json.dumps(result))
    if not program.candidate:
        return
    while len(_read(options.out / "rates.jsonl")) < len(list(options.out.glob("ready-*"))):
        if time.time() + 2 * options.candidate_seconds > deadline:
            break
        time.sleep(0.1)  # rates of all come first
    with _turn(options.out, index):
        if time.time() + options.candidate_seconds < deadline:
            outcome = _fit_for(training, options.candidate_seconds, validation)
            _append(options.out / "candidates.jsonl", {"program": options.program, **outcome})
            say("CANDIDATE", options.program, json.dumps(outcome))


def _fit_for(training: Any, seconds: float, validation: Any) -> dict[str, Any]:
    """Trains anew for so long; the learning rate follows the time."""
    import numpy as np

    from trainer import schedule

    state, epoch, began = training.state(), 0, time.perf_counter()
    progress = 0.0
    while progress < 1.0:
        state = training.begin(state, epoch)
        draws = training.draws(epoch)
        span = max(1, training.steps // 8)
        for start in range(0, training.steps, span):
            progress = min(1.0, (time.perf_counter() - began) / seconds)
            rate = schedule.learning_rate_at(training.preset.training, progress)
            rates = np.full(training.steps, rate)
            stop = min(training.steps, start + span)
            state, losses = training.run(state, draws, rates, start, stop)
        epoch += 1
    measured = training.evaluate(training.averaged(state), validation)
    return {
        "epochs": epoch,
        "seconds": round(time.perf_counter() - began, 1),
        "loss": float(losses.mean()),
        **{f"validation_{name}": round(value, 4) for name, value in measured.items()},
    }


def train(options: argparse.Namespace) -> None:
    """Trains to the end what fits: twice in about a minute, then with all the time that is left."""
    short = _best(options.out, _SHORT)
    end = STARTED + options.seconds
    for name, program, limit in (
        ("first start", short, 72.0),
        ("second start", short, 43.0),
        ("long", _best(options.out, _LONG), None),
    ):
        if (options.out / f"training-{name.replace(' ', '-')}.json").exists():
            continue
        limit = end - time.time() if limit is None else min(limit, end - time.time())
        if limit < 30:
            say("no time left for", name)
            continue
        say(name, "with", program, f"for {limit:.0f} s")
        process = _start(
            "one",
            options,
            "--program",
            program,
            "--name",
            name,
            "--limit",
            str(limit),
        )
        if code := process.wait():
            say(name, "ended:", code)


# Of the programs, what could be trained: in a minute, and in ten.
_SHORT = ("compact_long, 128", "compact_long, 512", "compact_wide, 256")
_LONG = (
    "compact_wide, 256",
    "compact_wide, 256, no depthwise convolution",
    "compact_wide, 256, four blocks",
    "compact_wide, 128",
)


def _best(out: Path, names: Sequence[str]) -> str:
    """The candidate of the highest validation accuracy, or the first where none was trained."""
    found = {
        result["program"]: result["validation_top_1_accuracy"]
        for result in _read(out / "candidates.jsonl")
        if result["program"] in names
    }
    return max(found, key=lambda name: found[name]) if found else names[0]


def one(options: argparse.Namespace) -> None:
    """Trains one program until its time is over, and evaluates it on the test images."""
    import jax
    import keras
    import numpy as np

    from trainer import schedule, weights
    from trainer.on_jax.training import Split
    from trainer.preset import replace

    jax.config.update("jax_compilation_cache_dir", str(options.out / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    program = PROGRAMS[options.program]
    training, _ = _training(program, _images(options.data, "train"))
    test = training.batches(Split(*_images(options.data, "test")))
    state = training.state()
    # Compiles; no step is taken.
    state, _ = training.run(training.begin(state, 0), training.draws(0), _flat(training), 0, 0)
    training.evaluate(state, test)
    began, tried = time.time(), min(100, training.steps)
    state, _ = training.run(state, training.draws(0), _flat(training), 0, tried)
    per_epoch = (time.time() - began) / tried * training.steps
    began = time.time()
    training.evaluate(state, test)
    evaluation = time.time() - began
    state = training.state()
    ready = time.time() - STARTED
    left = options.limit - ready - 1.5 - (options.evaluations + 1) * evaluation
    epochs = max(2, int(left / (1.02 * per_epoch + 0.02)))
    preset = replace(training.preset, epochs=epochs)
    say(f"{options.name}: ready after {ready:.1f} s; {epochs} epochs of {per_epoch:.2f} s")
    history: list[dict[str, Any]] = []
    every = max(1, epochs // options.evaluations)
    for epoch in range(epochs):
        began = time.time()
        state, losses = training.run(
            training.begin(state, epoch),
            training.draws(epoch),
            schedule.learning_rates(preset.training, training.steps, epoch),
            0,
            training.steps,
        )
        loss = float(losses.mean())
        if not np.isfinite(loss):
            raise SystemExit(f"error: the loss of epoch {epoch + 1} is {loss}")
        history.append({"epoch": epoch + 1, "loss": round(loss, 5)})
        history[-1]["seconds"] = round(time.time() - began, 3)
        if (epoch + 1) % every == 0 or epoch + 1 == epochs:
            measured = training.evaluate(training.averaged(state), test)
            history[-1] |= {f"test_{name}": round(value, 5) for name, value in measured.items()}
            history[-1]["since_start"] = round(time.time() - STARTED, 2)
            say(options.name, json.dumps(history[-1]))
    total = time.time() - STARTED
    file = f"training-{options.name.replace(' ', '-')}"
    result = {
        "name": options.name,
        "program": options.program,
        "preset": dataclasses.asdict(preset),
        "seconds_since_start": round(total, 1),
        "ready_after_seconds": round(ready, 1),
        "history": history,
        "parameters": sum(v.value.size for v in training.network.trainable_variables),
        "normalization": {
            "mean": training.mean.tolist(),
            "variance": training.variance.tolist(),
        },
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "keras": keras.__version__},
    }
    (options.out / f"{file}.json").write_text(json.dumps(result, indent=1) + "\n")
    training.assign(training.averaged(state))
    (options.out / f"{file}.npz").write_bytes(weights.pack(training.network))
    say(options.name, f"done after {total:.1f} s:", json.dumps(history[-1]))


def _training(program: Program, data: tuple[Any, Any]) -> tuple[Any, Any]:
    import jax
    import keras

    from dataset.format import NUM_FINE_CLASSES
    from trainer import presets
    from trainer.on_jax.training import Split, Training
    from trainer.preset import replace

    if os.environ.get("GPU_BENCHMARK_REHEARSAL"):
        program = Program("tiny")
    preset = replace(presets.get_preset(program.preset), **{"train_minutes": 0.0, **program.fields})
    on_gpu = jax.default_backend() != "cpu"
    keras.config.set_dtype_policy(program.policy if on_gpu else "float32")
    if program.cudnn_attention:
        _use_cudnn_attention()
    split = Split(*data)
    mean, variance = _statistics(split.images)
    training = Training(
        preset,
        split,
        NUM_FINE_CLASSES,
        0,
        mean=mean,
        variance=variance,
        plain=program.plain,
    )
    return training, split


def _statistics(images: Any) -> tuple[Any, Any]:
    """Mean and variance of each channel; in whole numbers, as floats would be half a gigabyte."""
    import numpy as np

    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    shares, levels = counts / counts.sum(axis=1, keepdims=True), np.arange(256)
    mean = shares @ levels
    return mean, shares @ levels**2 - mean**2


def _use_cudnn_attention() -> None:
    import jax

    from trainer.network import compact_layers

    def attend(projections: Any, tokens: int, num_heads: int, key_dim: int) -> Any:
        shape = (-1, tokens, 3, num_heads, key_dim)
        query, key, value = (projections.reshape(shape)[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return mixed.reshape(-1, num_heads * key_dim)

    compact_layers.attend = attend


def _flat(training: Any) -> Any:
    import numpy as np

    return np.full(training.steps, 1e-4, np.float32)


def _images(folder: Path, split: str) -> tuple[Any, Any]:
    from dataset import format as binary

    name = {"train": binary.TRAIN_FILE, "test": binary.TEST_FILE}[split]
    images, labels, _ = binary.read_records(folder / name)
    return images, labels


def _operations(training: Any, rate: float) -> dict[str, float]:
    """Operations of matrix products a second, and what share of the device's peak they are."""
    import jax

    macs = _MACS.get(training.preset.name)
    if not macs:
        return {}
    tflops = rate * 6 * macs / 1e12
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in _PEAKS.items() if name in kind), None)
    return {"tflops": round(tflops, 1)} | ({"mfu": round(tflops / peak, 4)} if peak else {})


_MACS = {"notebook": 81e6, "compact_long": 57e6, "compact_wide": 449e6}


@contextlib.contextmanager
def _turn(out: Path, number: int) -> Iterator[None]:
    """One process at a time."""
    with open(out / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(command: str, options: argparse.Namespace, *more: str, flags: str = "") -> Any:
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    arguments = ["--data", str(options.data), "--out", str(options.out)]
    arguments += ["--images", str(options.images), *more]
    arguments += ["--candidate_seconds", str(options.candidate_seconds)]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", command, *arguments], env=environment
    )


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def _print_rates(out: Path) -> None:
    results = _read(out / "rates.jsonl")
    for result in results:
        print(
            f"{result['program']:50} {result['images_per_second']:>9,} images/s "
            f"{result['step_ms']:8.2f} ms a step  {result['peak_gib']} GiB"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("measure", "train", "worker", "one"))
    parser.add_argument(
        "--data", required=True, type=Path, help="folder of CIFAR-100's binary form"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=240.0, help="to end in")
    parser.add_argument("--images", type=int, default=_IMAGES, help="of a timed epoch")
    parser.add_argument("--programs", nargs="*", help="to measure; default: all")
    parser.add_argument("--candidate_seconds", type=float, default=_CANDIDATE_SECONDS)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--rehearse", action="store_true", help="all with the preset tiny")
    parser.add_argument("--program")
    parser.add_argument("--name")
    parser.add_argument("--limit", type=float)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.rehearse:
        os.environ["GPU_BENCHMARK_REHEARSAL"] = "1"
    {"measure": measure, "train": train, "worker": worker, "one": one}[options.command](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
