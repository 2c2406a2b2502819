"""Every hyperparameter of a model and of its training, in one typed, checked value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# What a run may set otherwise than its preset, without it being another model.
OVERRIDES = ("epochs", "train_minutes", "batch_size", "learning_rate", "weight_decay")

# What makes weights fit: a model can be trained on from one that differs in nothing of this.
ARCHITECTURE = (
    "image_size",
    "patch_size",
    "projection_dim",
    "num_heads",
    "key_dim",
    "transformer_layers",
    "transformer_units",
    "mlp_head_units",
    "layer_norm_epsilon",
    "tokenizer_filters",
    "tokenizer_residual_pairs",
    "batch_normalization",
    "sequence_pooling",
    "linear_mlp_output",
    "depthwise_convolution",
)

LEARNING_RATE_SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Preset:
    """The hyperparameters of one Vision Transformer and of its training.

    Immutable; make a variant with `dataclasses.replace(preset, epochs=3)`, which checks again.

    Args:
        name: The name it is chosen by.
        description: One sentence for `--help`.
        image_size: Side in pixels that images are resized to (bilinear) before they are cut.
        patch_size: Side of a patch in pixels; must divide `image_size`.
        projection_dim: Width D of a token.
        num_heads: Attention heads per block.
        key_dim: Width of the query, key and value of one head (not D / num_heads).
        transformer_layers: Number of pre-norm blocks.
        transformer_units: Widths of a block's MLP; the last one is added to the residual stream
            and so must be `projection_dim`.
        mlp_head_units: Widths of the classifier's hidden layers; empty for a linear classifier.
        dropout_rate: Dropout of the attention weights and after each layer of a block's MLP.
        head_dropout_rate: Dropout of the flattened tokens and after each hidden layer of the head.
        layer_norm_epsilon: Added to the variance in every layer normalization.
        random_flip: Whether training images are mirrored left to right with probability 1/2.
        random_rotation: Largest rotation of a training image, as a fraction of a full turn,
            either way; 0 turns it off.
        random_zoom: Largest change of scale of a training image, as a fraction, in or out, drawn
            separately for height and width; 0 turns it off.
        epochs: Passes over the training split.
        batch_size: Images per step, over all devices together.
        learning_rate: Peak learning rate; with Muon that of matrices (see `trainer.muon`).
        learning_rate_schedule: "constant", or "cosine" (from the peak to 0 over all epochs).
        weight_decay: Decoupled weight decay, multiplied by the learning rate, applied to every
            trainable variable (but see `decay_matrices_only`).
        floors: By the name of a metric of the gate, the lowest value on the test split with which
            a model may be pushed, as a fraction; those of `pipeline.gate` where it has none.
        tokenizer_filters: Widths of the stages of convolutions that make the tokens, each stage
            but the first halving the resolution; the last is `projection_dim`. Empty for patches.
        tokenizer_residual_pairs: Residual pairs of convolutions in each stage; empty for none.
        batch_normalization: Whether blocks normalize over the batch and use ReLU (see
            `trainer.network.compact_layers.BatchNormBlock`) rather than over a token, and GELU.
        sequence_pooling: Whether the classifier gets the tokens' mean, weighted by a learned
            attention, in place of all of them side by side.
        linear_mlp_output: Whether the last layer of a block's MLP goes without GELU (as in the
            paper, and unlike the keras.io example).
        random_shift: Largest shift of a training image, in pixels, drawn for each axis; what comes
            in is reflected. As a random crop of the padded image.
        label_smoothing: Share of a label's probability that all classes divide among them.
        warmup: Fraction of the steps over which the learning rate rises from 0; "cosine" only.
        decay_matrices_only: Whether biases, scales and shifts of normalizations and positions are
            left out of the weight decay.
        optimizer: "adamw", or "muon" (for matrices; AdamW for all else, see `trainer.muon`).
        ema_momentum: Of the moving average of the weights that is evaluated and exported in place
            of the last ones; 0 for the last ones. Batch normalizations' statistics are then
            averaged as long.
        mixed_precision: Whether to compute in bfloat16 where the processor is fast at it; the
            variables, and the exported model, stay float32.
        train_minutes: Train for so long, as many epochs as that may be, with the learning rate's
            schedule over that time; 0 for `epochs`. Validation is not counted.
        gradient_clip_norm: Norm of all gradients together above which they are scaled down to it;
            0 turns it off.
        mixup: α of the Beta distribution from which MixUp draws how much each of two images
            counts; 0 turns it off.
        cutmix: The same for CutMix. Where both are on, each image gets one of them.
        depthwise_convolution: Whether the MLP of a block with batch normalization mixes
            neighbouring tokens (see `trainer.network.compact_layers.BatchNormBlock`).

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    name: str
    description: str
    # Architecture
    image_size: int
    patch_size: int
    projection_dim: int
    num_heads: int
    key_dim: int
    transformer_layers: int
    transformer_units: tuple[int, ...]
    mlp_head_units: tuple[int, ...]
    dropout_rate: float
    head_dropout_rate: float
    layer_norm_epsilon: float
    # Augmentation
    random_flip: bool
    random_rotation: float
    random_zoom: float
    # Training
    epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_schedule: str
    weight_decay: float
    # Evaluation
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # What departs from the reference
    tokenizer_filters: tuple[int, ...] = ()
    sequence_pooling: bool = False
    linear_mlp_output: bool = False
    random_shift: int = 0
    label_smoothing: float = 0.0
    warmup: float = 0.0
    decay_matrices_only: bool = False
    tokenizer_residual_pairs: tuple[int, ...] = ()
    batch_normalization: bool = False
    optimizer: str = "adamw"
    ema_momentum: float = 0.0
    mixed_precision: bool = False
    train_minutes: float = 0.0
    gradient_clip_norm: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    depthwise_convolution: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name is {self.name!r}: give the preset a non-empty name.")
        for field in (
            "image_size",
            "patch_size",
            "projection_dim",
            "num_heads",
            "key_dim",
            "transformer_layers",
            "epochs",
            "batch_size",
        ):
            if not _is_positive_int(getattr(self, field)):
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}: it must be a whole number of at least 1."
                )
        if self.image_size % self.patch_size and not self.tokenizer_filters:
            raise ValueError(
                f"image_size {self.image_size} cannot be cut into whole patches of patch_size "
                f"{self.patch_size}: choose a patch_size that divides it "
                f"(the nearest is {_nearest_divisor(self.image_size, self.patch_size)})."
            )
        for field in ("transformer_units", "mlp_head_units", "tokenizer_filters"):
            units = getattr(self, field)
            if not isinstance(units, tuple) or not all(map(_is_positive_int, units)):
                raise ValueError(
                    f"{field} is {units!r}: it must be a tuple of whole numbers of at least 1."
                )
        if not self.transformer_units or self.transformer_units[-1] != self.projection_dim:
            raise ValueError(
                f"transformer_units is {self.transformer_units!r}, but a block adds its MLP's "
                f"output to its input, which is projection_dim = {self.projection_dim} wide: "
                f"end transformer_units with {self.projection_dim}."
            )
        self._check_tokenizer()
        self._check_block()
        for field in (
            "random_flip",
            "sequence_pooling",
            "linear_mlp_output",
            "decay_matrices_only",
            "batch_normalization",
            "mixed_precision",
            "depthwise_convolution",
        ):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} is {getattr(self, field)!r}: it must be True or False.")
        if not isinstance(self.random_shift, int) or not 0 <= self.random_shift < self.image_size:
            raise ValueError(
                f"random_shift is {self.random_shift!r}: it must be a whole number of pixels from "
                f"0 to below image_size, which is {self.image_size}."
            )
        for field in (
            "dropout_rate",
            "head_dropout_rate",
            "random_zoom",
            "label_smoothing",
            "warmup",
            "ema_momentum",
        ):
            self._check_number(field, lambda x: 0 <= x < 1, "at least 0 and below 1")
        self._check_number(
            "random_rotation", lambda x: 0 <= x <= 0.5, "a fraction of a full turn from 0 to 0.5"
        )
        for field in ("layer_norm_epsilon", "learning_rate"):
            self._check_number(field, lambda x: 0 < x < math.inf, "a number above 0")
        for field in ("weight_decay", "gradient_clip_norm", "mixup", "cutmix", "train_minutes"):
            self._check_number(field, lambda x: 0 <= x < math.inf, "a number of at least 0")
        for field, choices in (
            ("learning_rate_schedule", LEARNING_RATE_SCHEDULES),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}: choose one of {', '.join(choices)}."
                )
        if self.warmup and self.learning_rate_schedule != "cosine":
            raise ValueError(
                f"warmup is {self.warmup}, but learning_rate_schedule is "
                f"{self.learning_rate_schedule!r}: use 'cosine', or a warmup of 0."
            )
        for name, floor in self.floors.items():
            if not 0 <= floor <= 1:
                raise ValueError(
                    f"the floor of {name} is {floor!r}: it must be a fraction from 0 to 1."
                )

    @property
    def num_patches(self) -> int:
        """Tokens per image."""
        if self.tokenizer_filters:
            return (self.image_size >> (len(self.tokenizer_filters) - 1)) ** 2
        return (self.image_size // self.patch_size) ** 2

    @property
    def mixes_labels(self) -> bool:
        """Whether a training image has a probability for each class rather than one label."""
        return bool(self.mixup or self.cutmix)

    def _check_block(self) -> None:
        plain = len(self.transformer_units) == 2 and self.linear_mlp_output
        if self.batch_normalization and (self.dropout_rate or not plain):
            raise ValueError(
                f"batch_normalization is for blocks without dropout, whose MLP has one hidden "
                f"layer and a linear output, but dropout_rate is {self.dropout_rate}, "
                f"transformer_units {self.transformer_units} and linear_mlp_output "
                f"{self.linear_mlp_output}."
            )
        if self.depthwise_convolution and not self.batch_normalization:
            raise ValueError(
                "depthwise_convolution is for blocks with batch_normalization, which is False."
            )

    def _check_tokenizer(self) -> None:
        pairs = self.tokenizer_residual_pairs
        if not isinstance(pairs, tuple) or not all(
            isinstance(number, int) and number >= 0 for number in pairs
        ):
            raise ValueError(
                f"tokenizer_residual_pairs is {pairs!r}: it must be a tuple of whole numbers of at "
                "least 0."
            )
        if pairs and len(pairs) != len(self.tokenizer_filters):
            raise ValueError(
                f"tokenizer_residual_pairs is {pairs!r}: it must be empty or have a number for "
                f"each of tokenizer_filters, which is {self.tokenizer_filters!r}."
            )
        if not self.tokenizer_filters:
            return
        if self.tokenizer_filters[-1] != self.projection_dim:
            raise ValueError(
                f"tokenizer_filters is {self.tokenizer_filters!r}, but its last width is that of "
                f"the tokens: end it with projection_dim = {self.projection_dim}."
            )
        step = 2 ** (len(self.tokenizer_filters) - 1)
        if self.image_size % step or self.patch_size != step:
            raise ValueError(
                f"{len(self.tokenizer_filters)} tokenizer_filters make a token of {step} x {step} "
                f"pixels: set patch_size, which is {self.patch_size}, to {step}, and image_size, "
                f"which is {self.image_size}, to a multiple of it."
            )

    def _check_number(self, field: str, is_allowed: Callable[[float], bool], allowed: str) -> None:
        value = getattr(self, field)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not is_allowed(value):
            raise ValueError(f"{field} is {value!r}: it must be {allowed}.")


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _nearest_divisor(number: int, target: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - target), -d))
