"""What training with JAX computes otherwise than Keras does, against how Keras computes it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import patience

ROOT = Path(__file__).resolve().parents[2]

# Runs in its own process, because a process has one backend. Prints one JSON line.
SCRIPT = """
import dataclasses, functools, json
import jax, jax.numpy as jnp, keras
import numpy as np
from trainer import schedule
from trainer.network import compact_layers, fast_layers
from trainer.network.model import build_model
from trainer.optimizer import build_optimizer
from trainer.on_jax.packing import Packing, batches
from trainer.on_jax.training import Split, Training
from trainer.preset import replace
from trainer.presets import get_preset

draw = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
apart = lambda a, b: max(float(jnp.abs(x - y).max()) for x, y in zip(a, b, strict=True))
out = {}

def optimizers(preset, **options):
    # Twenty steps by the plain optimizer and by the packed one, of the same gradients.
    network = build_model(preset, (32, 32, 3), 10, seed=0)
    plain = build_optimizer(preset.training, steps_per_epoch=5, **options)
    plain.build(network.trainable_variables)
    build = functools.partial(build_optimizer, preset.training, steps_per_epoch=None, **options)
    packing = Packing(network, plain, build)
    values = [jnp.array(v.value) for v in network.trainable_variables]
    start, packed = values, packing.pack(values)
    state = [jnp.array(v.value) for v in plain.variables]
    packing.load()
    packed_state = [jnp.array(v.value) for v in packing.optimizer.variables]
    rate = [v is packing.optimizer._learning_rate for v in packing.optimizer.variables].index(True)
    step = jax.jit(plain.stateless_apply)
    packed_step = jax.jit(
        lambda state, gradients, packed: packing.optimizer.stateless_apply(
            state, packing.pack(gradients), packed
        )
    )
    for k in range(20):
        gradients = [normal(*v.shape) for v in values]
        values, state = step(state, gradients, values)
        packed_state[rate] = jnp.float32(schedule.learning_rates(preset.training, 5, k // 5)[k % 5])
        packed, packed_state = packed_step(packed_state, gradients, packed)
    for variable, value in zip(packing.optimizer.variables, packed_state, strict=True):
        variable.assign(value)
    for variable in plain.variables:
        if variable is not plain.iterations and len(variable.shape):
            variable.assign(jnp.full(variable.shape, 7.0))
    packing.store()
    return {
        "moved": apart(start, values),
        "weights": apart(values, packing.unpack(packed)),
        "optimizer": apart(state, [v.value for v in plain.variables]),
        "arrays": [len(values), len(packed)],
        "variables": [len(packing.optimizer.variables), len(packed)],
    }

small = replace(
    get_preset("compact"), projection_dim=32, num_heads=2, key_dim=16, transformer_layers=2,
    transformer_units=(64, 32), tokenizer_filters=(8, 16, 32), epochs=4, warmup=0.13,
    ema_momentum=0.9, gradient_clip_norm=1.0, train_minutes=0.0,
)
out["muon"] = optimizers(small)
out["two rates"] = optimizers(small, other_classes=True)
out["adamw"] = optimizers(replace(
    get_preset("tiny"), epochs=4, decay_matrices_only=True, ema_momentum=0.9))

images = draw.integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
training = Training(
    replace(small, batch_size=8), Split(images, draw.integers(0, 10, 24)), 10, 0,
    mean=[128.0] * 3, variance=[4096.0] * 3,
)
state = training.begin(training.state(), 0)
before = [np.array(v) for v in training.network.get_weights()]
rates = schedule.learning_rates(training.preset.training, training.steps, 0) + 0.01
state, losses = training.run(state, training.draws(0), rates, 0, training.steps)
trained = [np.array(v) for v in training._packing.unpack(state.trainable)]
training.assign(state)
assigned = [np.array(v.value) for v in training.network.trainable_variables]
restored = training.state()
out["assign"] = {
    "trained": min(float(np.abs(a - b).max()) for a, b in zip(trained, [
        np.array(x) for x, v in zip(before, training.network.weights) if v.trainable])),
    "weights": apart(trained, assigned),
    "state": apart(jax.tree.leaves(state), jax.tree.leaves(restored)),
}

def reference(x, gamma, beta, axis):
    wide = x.astype(jnp.float32)
    mean, variance = wide.mean(axis, keepdims=True), wide.var(axis, keepdims=True)
    return (wide - mean) / jnp.sqrt(variance + 1e-3) * gamma + beta

for name, axis, ours in (
    ("batch", 0, lambda x, g, b: compact_layers._normalized(x, g, b, 1e-3)[0]),
    ("layer", 1, lambda x, g, b: fast_layers._normalize_rows(x, g, b, 1e-3)),
):
    arguments, upstream = (1 + 2 * normal(40, 16), normal(16), normal(16)), normal(40, 16)
    value, gradients = jax.vjp(ours, *arguments)
    expected, of_expected = jax.vjp(functools.partial(reference, axis=axis), *arguments)
    out[name] = [apart([value], [expected]), apart(gradients(upstream), of_expected(upstream))]

blocks = [
    fast_layers.FusedTransformerBlock(2, 16, (32, 16), 0.0, 1e-6, name=f"b{i}") for i in range(3)
]
for block in blocks:
    block.build((None, 13, 16))
    for weight in block.weights:
        if len(weight.shape):
            weight.assign(0.3 * draw.normal(size=weight.shape))
tokens = normal(4, 13, 16)
padded, mask = fast_layers.FullTokens()(tokens)
merged = fast_layers.MergedProjections(blocks)(tokens)
alone, together = tokens, padded
for block, projections in zip(blocks, merged):
    alone = block(alone)
    together = block(together, merged=projections, mask=mask)
out["blocks"] = {
    "padded": list(padded.shape),
    "apart": apart([alone], [fast_layers.FewerTokens(13)(together)]),
}
hidden, kernel = normal(3 * 16, 5), normal(3, 3, 5, 1)
mixed = compact_layers.mix_neighbours(hidden, kernel, 16)
grid = hidden.reshape(3, 4, 4, 5)
convolved = grid + keras.ops.depthwise_conv(grid, kernel, padding="same")
out["depthwise"] = apart([mixed.reshape(3, 4, 4, 5)], [convolved])
shapes = [(1, 27, 32), (1, 64, 288), (3, 128, 128), (1, 128, 256), (1, 500, 9000)]
out["batches"] = batches(shapes)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def result() -> dict:
    process = patience.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        cpu_seconds=400,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "two rates"])
def test_packed_variables_are_updated_as_plain_ones_are(result: dict, optimizer: str) -> None:
    differences = result[optimizer]
    assert differences["moved"] > 1e-3
    assert differences["weights"] < 1e-5 and differences["optimizer"] < 1e-5
    plain, packed = differences["arrays"]
    assert plain > 20 and packed <= 5


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "two rates"])
def test_packed_optimizer_has_no_variables_of_the_network(result: dict, optimizer: str) -> None:
    # Iterations, learning rate, and for each array momentum, velocity and average.
    variables, packed = result[optimizer]["variables"]
    assert variables <= 2 + 3 * packed


def test_assigned_weights_are_the_trained_ones(result: dict) -> None:
    assert result["assign"]["trained"] > 1e-7  # every one has moved
    assert result["assign"]["weights"] == 0.0
    assert result["assign"]["state"] == 0.0


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_normalizations_in_one_pass_are_the_same_function(result: dict, kind: str) -> None:
    value, gradients = result[kind]
    assert value < 1e-5 and gradients < 1e-4


def test_blocks_with_merged_projections_and_full_tokens_are_the_same_function(result: dict) -> None:
    assert result["blocks"]["padded"] == [4, 16, 16]
    assert result["blocks"]["apart"] < 1e-5


def test_depthwise_convolution_by_shifts_is_the_convolution(result: dict) -> None:
    assert result["depthwise"] < 1e-5


def test_matrices_share_a_batch_where_zeros_cost_less_than_kernels(result: dict) -> None:
    assert sorted(map(sorted, result["batches"])) == [[0, 1, 2, 3], [4]]
