"""The named presets: what each is for, what it costs, and what to expect of it."""

from __future__ import annotations

import difflib

from trainer.preset import Architecture, Augmentation, Preset, Training, replace

# `notebook`: the keras.io example "Image classification with Vision Transformer" (K. Salama) at
# the settings of the reference notebook. 49 tokens; the resize is not counted in the MACs.
#   parameters   9,823,588 trainable, of which 8.6 M are the classifier on the flattened tokens
#   compute      81 M multiply-accumulates per image forward (patches 9.6 M, blocks 12 x 5.2 M,
#                head 8.6 M), about three times that for a training step
#   command      make run ARGS="--preset notebook --epochs 20"
#   expected     validation top-1 / top-5 .137 / .371 after 1 epoch, .325 / .640 after 20 epochs:
#                the notebook's own figures, on its author's GPU
#   cost         185 ms per step of 256 images there, 11 minutes in all; on two CPU cores 1.5 s
#                per step, 4 to 5 minutes per epoch of 45,000, and 3.6 GB of memory
# The floors are five and four times chance (.01 / .05): one epoch passes them with room to spare,
# an untrained model does not.
_NOTEBOOK = Preset(
    name="notebook",
    description=(
        "The reference Vision Transformer (9.8 M parameters, 224 x 224 pixels, patches of 32): "
        "20 epochs to about 33 % top-1 and 64 % top-5, meant for a GPU."
    ),
    image_size=224,
    architecture=Architecture(
        embedding="patches",
        block="layer_norm",
        resize=224,
        patch_size=32,
        projection_dim=64,
        num_heads=4,
        key_dim=64,
        transformer_layers=12,
        transformer_units=(128, 64),
        mlp_head_units=(2048, 1024),
    ),
    augmentation=Augmentation(random_flip=True, random_rotation=0.02, random_zoom=0.2),
    training=Training(
        epochs=20,
        batch_size=256,
        learning_rate=1e-3,
        weight_decay=1e-3,
        dropout_rate=0.1,
        head_dropout_rate=0.5,
    ),
    floors={"top_1_accuracy": 0.05, "top_5_accuracy": 0.20},
)

# `tiny`: a smoke test of the whole path, not a model to keep.
#   parameters   63,172 trainable
#   compute      0.4 M multiply-accumulates per image forward (16 tokens)
#   command      make run ARGS="--preset tiny"
#   cost         9 ms per step of 64 images (6,800 images/s) on one CPU core
#   expected     nothing: a few steps are not enough to promise better than chance, so the floors
#                are 0 and every evaluated model passes them
_TINY = Preset(
    name="tiny",
    description=(
        "A smoke test (63 k parameters at 32 x 32 pixels, patches of 8): trains in seconds to show "
        "that everything runs; no accuracy is promised."
    ),
    image_size=32,
    architecture=Architecture(
        embedding="patches",
        block="layer_norm",
        patch_size=8,
        projection_dim=32,
        num_heads=2,
        key_dim=16,
        transformer_layers=2,
        transformer_units=(64, 32),
        mlp_head_units=(64,),
    ),
    augmentation=Augmentation(random_flip=True, random_rotation=0.02, random_zoom=0.2),
    training=Training(
        epochs=1,
        batch_size=64,
        learning_rate=1e-3,
        learning_rate_schedule="cosine",
        weight_decay=1e-3,
        dropout_rate=0.1,
        head_dropout_rate=0.1,
    ),
)

# `compact`: learns fast on a CPU. A Compact Convolutional Transformer (Hassani et al.,
# https://arxiv.org/abs/2104.05704) for the least time rather than the fewest operations (see
# trainer/network/compact_layers.py), trained by Muon.
#   parameters   584,453 trainable
#   compute      57 M multiply-accumulates per image forward (convolutions 29 M, blocks 3 x 9.4 M)
#   command      benchmarks/accuracy_per_budget.py --data ... --fraction 0.04
#   expected     test top-1 / top-5 .596 / .865 after 5 epochs (1,885 steps), .657 / .895 after 11,
#                .698 / .893 after 46
#   cost         880 images/s in training on two CPU cores with AMX, where `notebook` takes 131 in
#                the reference's own way: under 5 minutes for 5 epochs; 0.6 times as fast without
#                AMX, in float32
# The floors are those of `notebook`.
_COMPACT = Preset(
    name="compact",
    description=(
        "A small transformer on convolutional tokens (0.58 M parameters at 32 x 32 pixels) that "
        "learns fast on a CPU."
    ),
    image_size=32,
    architecture=Architecture(
        embedding="convolutions",
        block="batch_norm",
        tokenizer_filters=(32, 64, 128),
        tokenizer_residual_pairs=(0, 1, 0),
        projection_dim=128,
        num_heads=4,
        key_dim=32,
        transformer_layers=3,
        transformer_units=(256, 128),
        linear_mlp_output=True,
        sequence_pooling=True,
    ),
    augmentation=Augmentation(random_flip=True, random_shift=2),
    training=Training(
        epochs=11,
        batch_size=128,
        learning_rate=0.012,
        learning_rate_schedule="cosine",
        warmup=0.1,
        weight_decay=0.03,
        decay_matrices_only=True,
        optimizer="muon",
        adam_beta_2=0.98,
        label_smoothing=0.1,
        mixed_precision=True,
    ),
    floors={"top_1_accuracy": 0.05, "top_5_accuracy": 0.20},
)

# `compact_long`: `compact` with more augmentation, for more epochs. After 21 of 46 epochs `compact`
# has .76 top-1 on what it trains on and .64 on the validation split, so that there is more to gain
# by other images than by more steps. On a GPU it is the default, as the best that was measured.
#   command      benchmarks/accuracy_per_budget.py --data ... --preset compact_long --fraction 1
#                python -m benchmarks.gpu train --data ... --out ..., on a GPU
#   expected     test top-1 / top-5 .739 / .923 after 125 epochs of 350 steps on a CPU; on one H200
#                .758 / .937 after 82 epochs of all 50,000 images (results/h200_compact_long.json)
#   cost         two hours on two CPU cores with AMX: 726 images/s; 66 s on one H200 from the start
#                of the process: 107,000 images/s, 1.2 ms a step
_COMPACT_LONG = replace(
    _COMPACT,
    name="compact_long",
    description=(
        "`compact` with more augmentation (MixUp, CutMix): two hours on two CPU cores, two minutes "
        "on a GPU."
    ),
    epochs=130,
    random_shift=4,
    mixup=0.2,
    cutmix=1.0,
)

# `compact_wide`: `compact_long`, wider (in the last stage above all), with more convolutions and a
# depthwise one in each block's MLP, for a GPU that `compact_long` leaves idle.
#   parameters   3,850,917 trainable
#   compute      449 M multiply-accumulates per image forward
#   command      python -m benchmarks.gpu train --data ... --out ...
#   expected     test top-5 .942 after 372 epochs of batches of 256 on one H200. Its top-1 was
#                counted by a program that missed a share of the hits (at least .711; see
#                results/h200_compact_wide.json), which is mended and not measured again
#   cost         55,000 images/s on one H200, 4.6 ms a step of 256: 366 s for these epochs
_COMPACT_WIDE = replace(
    _COMPACT_LONG,
    name="compact_wide",
    description="`compact_long`, wider (3.9 M parameters), for ten minutes on a GPU.",
    projection_dim=256,
    num_heads=8,
    transformer_units=(512, 256),
    tokenizer_filters=(64, 128, 256),
    tokenizer_residual_pairs=(1, 2, 1),
    depthwise_convolution=True,
    epochs=150,
)

# What a run without a preset takes; and for how many minutes those trained on a CPU that are meant
# for it.
ON_CPU = "compact"
ON_CPU_FEW = "compact_long"  # for few images
ON_GPU = "compact_long"
MINUTES_ON_CPU = {"compact": 10, "compact_long": 120}

PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (_NOTEBOOK, _TINY, _COMPACT, _COMPACT_LONG, _COMPACT_WIDE)
}


def get_preset(name: str) -> Preset:
    """Finds a preset by its name.

    Args:
        name: A key of `PRESETS`.

    Returns:
        The preset.

    Raises:
        ValueError: There is no preset of that name; the message lists those there are.
    """
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"Unknown preset {name!r}: choose one of {', '.join(sorted(PRESETS))}.{hint}")
