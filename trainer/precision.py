"""Training in bfloat16 where it is fast, and the float32 model that comes of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import keras

from trainer.network import model
from trainer.preset import Preset


def cpu_multiplies_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether the processor is faster at matrix products in bfloat16 than in float32.

    That is so with Intel's AMX: 1.8 times the images per second of CPU time in the training of
    `compact`. With AVX-512's instructions for bfloat16 alone it is 0.76 times, without them 0.35.

    Args:
        cpuinfo: What Linux says of the processor; by default this machine's.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.is_file() else ""
    return bool(re.search(r"^flags\b.*\bamx_bf16\b", cpuinfo, re.MULTILINE))


def gpus_multiply_bfloat16() -> bool:
    """Whether all GPUs that TensorFlow sees do: NVIDIA's since compute capability 8."""
    import tensorflow as tf  # only where it is the backend

    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return bool(gpus) and all(d.get("compute_capability", (0,))[0] >= 8 for d in details)


def policy_name(preset: Preset, *, on_gpu: bool) -> str:
    """Names the Keras dtype policy to train a preset with on this machine.

    Args:
        preset: Says whether it may be a mixed one.
        on_gpu: Whether a GPU trains rather than the processor.
    """
    fast = gpus_multiply_bfloat16() if on_gpu else cpu_multiplies_bfloat16()
    return "mixed_bfloat16" if preset.training.mixed_precision and fast else "float32"


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Makes layers that are built meanwhile compute by a policy.

    Args:
        name: Of a Keras dtype policy.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def in_float32(network: keras.Model, preset: Preset) -> keras.Model:
    """The same network, computing in float32: what is exported and served anywhere.

    Args:
        network: Of `trainer.network.model.build_model`, under any policy; it is not changed.
        preset: That it was built from.

    Returns:
        The network itself if it computes in float32 already.
    """
    if all(layer.compute_dtype == "float32" for layer in network.layers):
        return network
    with dtype_policy("float32"):
        copy = model.build_model(preset, network.input_shape[1:], network.output_shape[-1])
    copy.set_weights(network.get_weights())
    return copy
