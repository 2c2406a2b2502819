"""Presets: the reference values, the checks on each field, and lookup by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trainer.preset import (
    ADAPTER,
    FIELDS,
    PresetError,
    differences,
    override,
    parse_assignments,
    replace,
)
from trainer.presets import PRESETS, get_preset


def test_notebook_is_the_reference_configuration() -> None:
    preset = dataclasses.asdict(get_preset("notebook"))
    del preset["description"]
    assert preset == {
        "name": "notebook",
        "image_size": 224,
        "architecture": {
            "embedding": "patches",
            "block": "layer_norm",
            "resize": 224,
            "patch_size": 32,
            "projection_dim": 64,
            "num_heads": 4,
            "key_dim": 64,
            "transformer_layers": 12,
            "transformer_units": (128, 64),
            "mlp_head_units": (2048, 1024),
            "layer_norm_epsilon": 1e-6,
            "tokenizer_filters": (),
            "tokenizer_residual_pairs": (),
            "sequence_pooling": False,
            "linear_mlp_output": False,
            "depthwise_convolution": False,
        },
        "augmentation": {
            "random_flip": True,
            "random_rotation": 0.02,
            "random_zoom": 0.2,
            "random_shift": 0,
            "random_erasing": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
        },
        "training": {
            "epochs": 20,
            "train_minutes": 0.0,
            "batch_size": 256,
            "learning_rate": 1e-3,
            "base_rate_ratio": 0.3,
            "learning_rate_schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 1e-3,
            "decay_matrices_only": False,
            "optimizer": "adamw",
            "adam_beta_1": 0.9,
            "adam_beta_2": 0.999,
            "adam_epsilon": 1e-7,
            "adam_rate_ratio": 0.15,
            "muon_momentum": 0.95,
            "muon_steps": 5,
            "gradient_clip_norm": 0.0,
            "ema_momentum": 0.0,
            "label_smoothing": 0.0,
            "dropout_rate": 0.1,
            "head_dropout_rate": 0.5,
            "balance": False,
            "mixed_precision": False,
        },
        "floors": {"top_1_accuracy": 0.05, "top_5_accuracy": 0.20},
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_key_is_the_name_and_description_is_one_line(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.description and "\n" not in preset.description


def test_replace_makes_a_checked_variant_and_leaves_the_preset_alone() -> None:
    preset = get_preset("notebook")
    changed = replace(preset, epochs=3, name="short", random_zoom=0.0)
    assert (changed.training.epochs, changed.name) == (3, "short")
    assert changed.augmentation.random_zoom == 0.0 and changed.architecture == preset.architecture
    assert preset.training.epochs == 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.training.epochs = 3  # type: ignore[misc]


def test_every_field_says_what_it_is_and_has_a_name_of_its_own() -> None:
    assert all(field.description for field in FIELDS.values())
    names = [name.partition(".")[2] for name in FIELDS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_gives_the_same_preset(name: str) -> None:
    preset = PRESETS[name]
    assert ADAPTER.validate_json(ADAPTER.dump_json(preset)) == preset


def test_fields_are_set_by_text_and_found_again() -> None:
    preset = get_preset("compact")
    texts = (
        "augmentation.random_erasing=0.2",
        "architecture.transformer_units = [64, 128]",
        "training.learning_rate_schedule=cosine",
        "training.decay_matrices_only=false",
        "training.warmup=0.2",
        "training.warmup=0.3",
    )
    changed = override(preset, parse_assignments(texts))
    assert changed.augmentation.random_erasing == 0.2
    assert changed.architecture.transformer_units == (64, 128)
    assert changed.training.warmup == 0.3  # the last one counts
    found = differences(changed, preset)
    assert found == {
        "augmentation.random_erasing": 0.2,
        "architecture.transformer_units": [64, 128],
        "training.decay_matrices_only": False,
        "training.warmup": 0.3,
    }
    assert override(preset, found) == changed
    assert differences(preset, preset) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.label_smoothing", "is not NAME=VALUE"),
        ("augmentation.random_erazing=0.2", r"did you mean augmentation\.random_erasing"),
        ("random_erasing=0.2", r"did you mean augmentation\.random_erasing\?"),
        ("qqq=1", r"there are architecture\.embedding, .*training\.mixed_precision\."),
        (
            "augmentation.random_erasing=2",
            r"^augmentation\.random_erasing is 2: input should be less than or equal to 1\. "
            r"\(Probability with which a rectangle is erased\.\)",
        ),
        ("augmentation.random_erasing=much", "random_erasing is 'much': input should be a valid"),
    ],
)
def test_what_cannot_be_set(text: str, message: str) -> None:
    with pytest.raises(PresetError, match=message):
        override(get_preset("compact"), parse_assignments([text]))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name: String should have at least 1"),
        ({"batch_size": 0}, "training.batch_size is 0: input should be greater than or equal to 1"),
        ({"batch_size": 2**31}, "training.batch_size is 2147483648: input should be less than"),
        ({"epochs": 1.5}, "training.epochs is 1.5: .* fractional"),
        ({"patch_size": 30}, "224 pixels .* cannot be cut into whole patches of patch_size 30"),
        ({"resize": 0}, "architecture.resize is 0"),
        ({"transformer_units": ()}, r"architecture.transformer_units is \(\)"),
        ({"transformer_units": (128, 32)}, "end it with 64"),
        ({"projection_dim": 32}, "end it with 32"),
        ({"mlp_head_units": (2048, 0)}, r"architecture.mlp_head_units is \(2048, 0\)"),
        ({"dropout_rate": 1.0}, "training.dropout_rate is 1.0: input should be less than 1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0: input should be greater than 0"),
        ({"random_rotation": 0.6}, "random_rotation is 0.6: .*in full turns"),
        ({"random_flip": 2}, "random_flip is 2: input should be a valid boolean"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: input should be a finite"),
        ({"learning_rate": float("inf")}, "learning_rate is inf: input should be a finite"),
        ({"learning_rate_schedule": "step"}, "'step': input should be 'constant' or 'cosine'"),
        ({"random_shift": 1.5}, "random_shift is 1.5"),
        ({"warmup": 0.1}, "learning_rate_schedule is 'constant': use 'cosine', or a warmup of 0"),
        ({"tokenizer_filters": (8,)}, "must be empty with 'patches'"),
        ({"embedding": "convolutions"}, "end with projection_dim = 64 with 'convolutions'"),
        ({"tokenizer_residual_pairs": (1,)}, "it must be empty or have a number for each"),
        (
            {"block": "batch_norm", "linear_mlp_output": True},
            "training.dropout_rate is 0.1, .*'batch_norm' has no dropout",
        ),
        ({"block": "batch_norm"}, "give two transformer_units, .*linear_mlp_output true"),
        ({"depthwise_convolution": True}, "is for block 'batch_norm' alone"),
        ({"floors": {"top_1_accuracy": 5}}, "floors.top_1_accuracy: Input should be less than"),
        ({"no_such_field": 1}, "no_such_field: Unexpected keyword argument"),
    ],
)
def test_bad_value_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        replace(get_preset("notebook"), **changes)
