"""Presets: the reference values, the checks on each field, and lookup by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trainer.presets import PRESETS, get_preset


def test_notebook_is_the_reference_configuration() -> None:
    preset = dataclasses.asdict(get_preset("notebook"))
    del preset["description"]
    assert preset == {
        "name": "notebook",
        "image_size": 224,
        "patch_size": 32,
        "projection_dim": 64,
        "num_heads": 4,
        "key_dim": 64,
        "transformer_layers": 12,
        "transformer_units": (128, 64),
        "mlp_head_units": (2048, 1024),
        "dropout_rate": 0.1,
        "head_dropout_rate": 0.5,
        "layer_norm_epsilon": 1e-6,
        "random_flip": True,
        "random_rotation": 0.02,
        "random_zoom": 0.2,
        "epochs": 20,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "learning_rate_schedule": "constant",
        "weight_decay": 1e-3,
        "floors": {"top_1_accuracy": 0.05, "top_5_accuracy": 0.20},
        "tokenizer_filters": (),
        "sequence_pooling": False,
        "linear_mlp_output": False,
        "random_shift": 0,
        "label_smoothing": 0.0,
        "warmup": 0.0,
        "decay_matrices_only": False,
        "tokenizer_residual_pairs": (),
        "batch_normalization": False,
        "optimizer": "adamw",
        "ema_momentum": 0.0,
        "mixed_precision": False,
        "train_minutes": 0.0,
        "gradient_clip_norm": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "depthwise_convolution": False,
    }


def test_number_of_patches() -> None:
    assert get_preset("notebook").num_patches == 49
    assert get_preset("tiny").num_patches == 16
    assert get_preset("compact").num_patches == 64
    assert get_preset("compact_wide").num_patches == 64


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_key_is_the_name_and_description_is_one_line(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.description and "\n" not in preset.description


def test_replace_makes_a_checked_variant_and_leaves_the_preset_alone() -> None:
    preset = get_preset("notebook")
    assert dataclasses.replace(preset, epochs=3).epochs == 3
    assert preset.epochs == 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.epochs = 3  # type: ignore[misc]


def test_unknown_name_lists_the_presets_and_the_closest() -> None:
    with pytest.raises(ValueError) as error:
        get_preset("notbook")
    assert str(error.value) == (
        "Unknown preset 'notbook': choose one of compact, compact_long, compact_wide, notebook, "
        "tiny. Did you mean 'notebook'?"
    )
    with pytest.raises(
        ValueError, match=r"choose one of compact, compact_long, compact_wide, notebook, tiny\.$"
    ):
        get_preset("resnet50")


def test_indivisible_patch_size_names_both_values_and_a_fix() -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(get_preset("notebook"), patch_size=30)
    assert str(error.value) == (
        "image_size 224 cannot be cut into whole patches of patch_size 30: choose a patch_size "
        "that divides it (the nearest is 32)."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name is ''"),
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number of at least 1"),
        ({"epochs": -1}, "epochs is -1"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"num_heads": True}, "num_heads is True"),
        ({"image_size": 0}, "image_size is 0"),
        ({"transformer_units": [128, 64]}, r"transformer_units is \[128, 64\]"),
        ({"transformer_units": ()}, "end transformer_units with 64"),
        ({"transformer_units": (128, 32)}, "end transformer_units with 64"),
        ({"projection_dim": 32}, "end transformer_units with 32"),
        ({"mlp_head_units": (2048, 0)}, r"mlp_head_units is \(2048, 0\)"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0: it must be at least 0 and below 1"),
        ({"head_dropout_rate": -0.1}, "head_dropout_rate is -0.1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0: it must be a number above 0"),
        ({"random_rotation": 0.6}, "random_rotation is 0.6: it must be a fraction of a full turn"),
        ({"random_zoom": 1.0}, "random_zoom is 1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be a number above 0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"random_flip": 1}, "random_flip is 1: it must be True or False"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate_schedule": "step"}, "'step': choose one of constant, cosine"),
        ({"weight_decay": -1e-3}, "weight_decay is -0.001: it must be a number of at least 0"),
        ({"random_shift": 1.5}, "random_shift is 1.5: it must be a whole number of pixels"),
        ({"random_shift": 224}, "random_shift is 224"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"warmup": 0.1}, "learning_rate_schedule is 'constant': use 'cosine', or a warmup of 0"),
        ({"sequence_pooling": None}, "sequence_pooling is None: it must be True or False"),
        ({"tokenizer_filters": (8,)}, "end it with projection_dim = 64"),
        ({"tokenizer_filters": (8, 64)}, "set patch_size, which is 32, to 2"),
        ({"gradient_clip_norm": -1.0}, "gradient_clip_norm is -1.0: it must be a number of at"),
        ({"mixup": -0.2}, "mixup is -0.2"),
        ({"cutmix": float("inf")}, "cutmix is inf"),
        (
            {
                "batch_normalization": True,
                "linear_mlp_output": True,
                "dropout_rate": 0.1,
            },
            "blocks without dropout, .* but dropout_rate is 0.1",
        ),
        ({"depthwise_convolution": True}, "blocks with batch_normalization, which is False"),
        ({"ema_momentum": 1.0}, "ema_momentum is 1.0: it must be at least 0 and below 1"),
        ({"mixed_precision": 1}, "mixed_precision is 1: it must be True or False"),
        ({"floors": {"top_1_accuracy": 5}}, "the floor of top_1_accuracy is 5: it must be a fra"),
    ],
)
def test_bad_value_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(get_preset("notebook"), **changes)
