"""Counts the kernels of a training step as XLA compiles it for an H200. Needs no GPU.

    uv venv --python 3.12 /tmp/jax
    uv pip install --python /tmp/jax --no-deps -r requirements/kernels.txt
    /tmp/jax/bin/python -m benchmarks.kernels --out results/kernels.json

from the project's folder. At these sizes a step takes 2.4 to 3.9 µs a kernel on an H200, whatever
the network, so the count is what to bring down. XLA is told of the card and does not try kernels
out on it, which picks other matrix products, but not more of them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"
# Triton's products have no default configuration without a card to try them on.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    " --xla_gpu_enable_triton_gemm=false"
)

import jax
import keras
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dataset.format import IMAGE_SHAPE, NUM_FINE_CLASSES
from trainer import presets
from trainer.on_jax.training import Split, Training
from trainer.preset import replace

# What XLA asks a card, as `nvidia-smi` and its data sheet answer: xla/stream_executor/
# device_description.proto, GpuTargetConfigProto.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98
  device_memory_size: 150754820096  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 10 }  runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
# Instructions of an optimized program that are kernels, or a library's.
_KERNELS = {
    "conditional",
    "convolution",
    "copy",
    "custom-call",
    "dot",
    "dynamic-slice",
    "dynamic-update-slice",
    "fusion",
    "reduce",
    "rng-bit-generator",
    "scatter",
    "sort",
    "transpose",
}
_STEPS = 4
_POLICY = "mixed_bfloat16"
PROGRAMS = ("compact_long:128", "compact_wide:256", "notebook:256")


def program_of(name: str, batch_size: int) -> tuple[str, float]:
    """Compiles the training of a preset for an H200.

    Args:
      name: Of the preset.
      batch_size: Images per step.

    Returns:
      The optimized program as text, and the seconds that it took to compile.
    """
    keras.config.set_dtype_policy(_POLICY)
    preset = replace(presets.get_preset(name), batch_size=batch_size, train_minutes=0.0)
    draw, number = np.random.default_rng(0), batch_size * _STEPS
    split = Split(
        draw.integers(0, 256, (number, *IMAGE_SHAPE)).astype(np.uint8),
        draw.integers(0, NUM_FINE_CLASSES, number),
    )
    training = Training(preset, split, NUM_FINE_CLASSES, 0, mean=[128.0] * 3, variance=[4096.0] * 3)
    card = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=_H200
    )
    placed = NamedSharding(topologies.make_mesh(card, (1,), ("devices",)), PartitionSpec())
    arguments = training.arguments(training.state(), 0)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments
    )
    began = time.perf_counter()
    compiled = jax.jit(training.steps_of_an_epoch, donate_argnums=0).lower(*shapes).compile()
    return compiled.as_text(), time.perf_counter() - began


def step_of(program: str) -> list[str]:
    """The instructions of the largest loop's body, which is the step."""
    computations: dict[str, list[str]] = collections.defaultdict(list)
    current = ""
    for line in program.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if start:
            current = start[1]
        elif current and line.strip():
            computations[current].append(line.strip())
    bodies = re.findall(r"body=%?([\w.\-]+)", program)
    return max((computations[body] for body in bodies), key=len)


def count(program: str) -> dict[str, int]:
    """Counts a step's kernels by the part of the network and the direction that they belong to.

    Args:
      program: Of `program_of`.

    Returns:
      "forward block/attention_norm" and the like -> kernels.
    """
    parts: collections.Counter[str] = collections.Counter()
    for line in step_of(program):
        kind = re.search(r"= (?:\([^=]*?\)|\S+) ([\w\-]+)\(", line)
        if not kind or kind[1] not in _KERNELS:
            continue
        found = re.search(r'op_name="([^"]*)"', line)
        path = found[1] if found else "unnamed"
        when = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "beside"
        path = re.sub(r"jit\(\w*steps\w*\)/|while/body/|closed_call/|eval_jaxpr/", "", path)
        path = re.sub(r"transpose\(jvp\((.*?)\)\)|jvp\((.*?)\)", lambda m: m[1] or m[2], path)
        parts[f"{when} {'/'.join(re.sub(r'_[0-9]+', '', path).split('/')[:2])}"] += 1
    return dict(parts.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    """Counts as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "programs", nargs="*", default=PROGRAMS, help="PRESET:BATCH_SIZE; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    for wanted in options.programs:
        name, _, batch_size = wanted.partition(":")
        program, seconds = program_of(name, int(batch_size))
        parts = count(program)
        results.append(
            {
                "program": wanted,
                "policy": _POLICY,
                "kernels": sum(parts.values()),
                "parts": parts,
                "compile_seconds": round(seconds, 1),
                "versions": {"jax": jax.__version__, "keras": keras.__version__},
            }
        )
        print(f"{wanted}: {sum(parts.values())} kernels a step, compiled in {seconds:.0f} s")
        for part, number in list(parts.items())[:15]:
            print(f"  {number:5} {part}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
