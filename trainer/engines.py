"""What computes a training: TensorFlow, or JAX in a process of its own (see `trainer/on_jax`)."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from typing import NamedTuple

AUTO = "auto"
TENSORFLOW = "tensorflow"
JAX = "jax"
ENGINES = (AUTO, TENSORFLOW, JAX)

_PROGRAM = """
import jax, json
devices = jax.local_devices()
print(json.dumps([devices[0].platform, devices[0].device_kind, len(devices)]))
"""
_CPU = "cpu"


class EngineError(RuntimeError):
    """An engine cannot be used here; the message says what to do."""


class Devices(NamedTuple):
    """What JAX computes on.

    Attributes:
      platform: "gpu", "tpu" or "cpu".
      kind: The device's name.
      number: How many there are.
    """

    platform: str
    kind: str
    number: int


def choose(name: str) -> str:
    """Resolves `auto`: JAX where it is installed and sees an accelerator, else TensorFlow.

    Args:
      name: Of `ENGINES`.

    Returns:
      `TENSORFLOW` or `JAX`.

    Raises:
      EngineError: JAX is asked for and not installed.
      ValueError: There is no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}: it must be one of {', '.join(ENGINES)}.")
    if name == JAX and not _installed("jax"):
        raise EngineError(
            "engine jax needs the package jax, which is not installed: `make setup GPU=1` installs "
            "it with CUDA. Or train with TensorFlow (--engine tensorflow)."
        )
    if name == AUTO:
        return JAX if accelerators() else TENSORFLOW
    return name


def accelerators() -> int:
    """How many GPUs or TPUs JAX sees; 0 where it is not installed."""
    devices = _jax_devices() if _installed("jax") and _has_plugin() else None
    return devices.number if devices and devices.platform != _CPU else 0


def share_gpus() -> None:
    """Lets JAX's process have what it needs of GPUs that TensorFlow sees in this one, too.

    TensorFlow takes all of a GPU's memory with its first operation, unless this is called before.
    """
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has_plugin() -> bool:
    """Whether JAX might see more than the CPU, without the seconds of asking it."""
    return (
        bool(metadata.entry_points(group="jax_plugins"))
        or _installed("jax_plugins")
        or _installed("libtpu")
    )


@functools.cache
def _jax_devices() -> Devices | None:
    """Asks JAX, in a process that ends: in this one it would hold the GPU's memory."""
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  JAX cannot be used: {last}", file=sys.stderr, flush=True)
        return None
    return Devices(*json.loads(process.stdout.splitlines()[-1]))
