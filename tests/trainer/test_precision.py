"""Mixed precision in training, float32 in what comes of it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from tests.support.networks import build_model
from trainer import precision
from trainer.preset import replace
from trainer.presets import get_preset


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", True),
        ("flags\t\t: avx512_bf16 avx512f", False),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd", False),
        ("", False),
    ],
)
def test_asks_the_processor(flags: str, fast: bool) -> None:
    cpuinfo = f"processor\t: 0\n{flags}\nbugs\t\t: amx_bf16_is_not_a_bug\n"
    assert precision.cpu_multiplies_bfloat16(cpuinfo) == fast


def test_only_presets_that_allow_it_are_mixed() -> None:
    compact = get_preset("compact")
    expected = "mixed_bfloat16" if precision.cpu_multiplies_bfloat16() else "float32"
    assert precision.policy_name(compact, on_gpu=False) == expected
    assert precision.policy_name(get_preset("notebook"), on_gpu=False) == "float32"
    whole = replace(compact, mixed_precision=False)
    assert precision.policy_name(whole, on_gpu=False) == "float32"


def test_float32_copy_of_a_mixed_model() -> None:
    preset = replace(get_preset("compact"), transformer_layers=1)
    before = keras.config.dtype_policy().name
    with precision.dtype_policy("mixed_bfloat16"):
        mixed = build_model(preset, num_classes=7, seed=0)
    assert keras.config.dtype_policy().name == before == "float32"
    assert {str(w.dtype) for w in mixed.trainable_weights} == {"float32"}
    assert mixed.get_layer("block_0").compute_dtype == "bfloat16"
    whole = precision.in_float32(mixed, preset)
    assert {layer.compute_dtype for layer in whole.layers} == {"float32"}
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    exact, rounded = (
        ops.convert_to_numpy(network(images, training=False)) for network in (whole, mixed)
    )
    error = np.abs(exact - rounded).max()
    assert 0 < error < 0.05 * np.abs(exact).max()
    assert precision.in_float32(whole, preset) is whole
