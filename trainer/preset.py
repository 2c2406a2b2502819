"""Every hyperparameter of a model and of its training, in one typed, checked value.

A field's range and meaning stand beside it. Any of them can be set from the command line
(`--set augmentation.random_erasing=0.2`): a new field needs its line here, and its use.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

# What a run may set otherwise than its preset by a flag of its own: fields of `Training`.
OVERRIDES = ("epochs", "train_minutes", "batch_size", "learning_rate", "weight_decay")

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Widths = tuple[Annotated[int, Field(ge=1, le=65_536)], ...]
Share = Annotated[float, Field(ge=0, lt=1)]


class PresetError(ValueError):
    """A field has no such value, or there is no such field; the message says what there is."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Architecture:
    """What makes weights fit: a model can be trained on from one that differs in nothing of this.

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    embedding: Literal["patches", "convolutions"] = Field(
        description="What makes tokens of images: a linear map of each patch, or the stages of "
        "`tokenizer_filters`."
    )
    block: Literal["layer_norm", "batch_norm"] = Field(
        description="What a block is: normalization of each token, and GELU; or over the batch, "
        "and ReLU (`trainer.network.compact_layers.BatchNormBlock`)."
    )
    projection_dim: int = Field(ge=1, le=65_536, description="Width D of a token.")
    num_heads: int = Field(ge=1, le=1024, description="Attention heads of a block.")
    key_dim: int = Field(
        ge=1, le=4096, description="Width of a head's query, key and value (not D / num_heads)."
    )
    transformer_layers: int = Field(ge=1, le=1000, description="Blocks.")
    transformer_units: Widths = Field(
        min_length=1, description="Widths of a block's MLP; the last is added to the tokens, so D."
    )
    mlp_head_units: Widths = Field(
        default=(), description="Widths of the classifier's hidden layers; none: linear."
    )
    resize: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Side in pixels that the network resizes images to (bilinear); None: it takes "
        "them as they are stored.",
    )
    patch_size: int = Field(
        default=8, ge=1, le=4096, description="Side of a patch in pixels; divides the image's."
    )
    tokenizer_filters: Widths = Field(
        default=(),
        description="Widths of the stages of convolutions, each but the first halving the "
        "resolution; the last is D.",
    )
    tokenizer_residual_pairs: tuple[Annotated[int, Field(ge=0, le=100)], ...] = Field(
        default=(), description="Residual pairs of convolutions in each stage; empty: none."
    )
    sequence_pooling: bool = Field(
        default=False,
        description="The classifier gets the tokens' mean, weighted by a learned attention, in "
        "place of all of them side by side.",
    )
    linear_mlp_output: bool = Field(
        default=False,
        description="The last layer of a block's MLP goes without GELU, as in the paper and unlike "
        "the keras.io example; always so with batch_norm.",
    )
    depthwise_convolution: bool = Field(
        default=False, description="The MLP of a batch_norm block mixes neighbouring tokens."
    )
    layer_norm_epsilon: float = Field(
        default=1e-6, gt=0, le=1, description="Added to the variance by layer normalizations."
    )

    def __post_init__(self) -> None:
        width = self.projection_dim
        if self.transformer_units[-1] != width:
            raise ValueError(
                f"transformer_units is {self.transformer_units}, but a block adds its MLP's output "
                f"to its input, which is projection_dim = {width} wide: end it with {width}."
            )
        filters, pairs = self.tokenizer_filters, self.tokenizer_residual_pairs
        convolutions = self.embedding == "convolutions"
        if convolutions != bool(filters) or (convolutions and filters[-1] != width):
            raise ValueError(
                f"tokenizer_filters is {filters} with embedding {self.embedding!r}: it must be "
                f"empty with 'patches', and end with projection_dim = {width} with 'convolutions'."
            )
        if pairs and len(pairs) != len(filters):
            raise ValueError(
                f"tokenizer_residual_pairs is {pairs}: it must be empty or have a number for each "
                f"of tokenizer_filters, which is {filters}."
            )
        if not convolutions and self.resize and self.resize % self.patch_size:
            raise ValueError(
                f"images of {self.resize} pixels (resize) cannot be cut into whole patches of "
                f"patch_size {self.patch_size}: choose one that divides it."
            )
        of_batch = self.block == "batch_norm"
        if of_batch and not (len(self.transformer_units) == 2 and self.linear_mlp_output):
            raise ValueError(
                "block 'batch_norm' has an MLP of one hidden layer and a linear output: give two "
                f"transformer_units, which is {self.transformer_units}, and linear_mlp_output true."
            )
        if self.depthwise_convolution and not of_batch:
            raise ValueError("depthwise_convolution is for block 'batch_norm' alone.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Augmentation:
    """How training images are changed at random; 0 turns each off."""

    random_flip: bool = Field(
        default=True, description="Mirrored left to right with probability 1/2."
    )
    random_rotation: float = Field(
        default=0.0, ge=0, le=0.5, description="Largest rotation either way, in full turns."
    )
    random_zoom: Share = Field(
        default=0.0,
        description="Largest change of scale, as a fraction, in or out, drawn separately for "
        "height and width.",
    )
    random_shift: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Largest shift, in pixels, drawn for each axis, below the image's size; what "
        "comes in is reflected.",
    )
    random_erasing: float = Field(
        default=0.0, ge=0, le=1, description="Probability with which a rectangle is erased."
    )
    mixup: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="α of the Beta distribution of how much each of two mixed images counts.",
    )
    cutmix: float = Field(
        default=0.0, ge=0, le=100, description="The same for CutMix; with both, each gets one."
    )

    @property
    def mixes_labels(self) -> bool:
        """Whether a training image has a probability for each class rather than one label."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Training:
    """How the weights are found.

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    epochs: int = Field(ge=1, le=1_000_000, description="Passes over the training split.")
    batch_size: int = Field(
        ge=1, le=2**31 - 1, description="Images a step, over all devices together."
    )
    learning_rate: float = Field(
        gt=0, description="Its peak; with Muon that of matrices (`trainer.muon`)."
    )
    base_rate_ratio: float = Field(
        default=0.3,
        ge=0,
        le=1000,
        description="With --warm_start from a model of other classes, the learning rate of what "
        "was taken from it, in units of that of the new classifier.",
    )
    weight_decay: float = Field(
        ge=0, description="Decoupled, times the learning rate (but see `decay_matrices_only`)."
    )
    train_minutes: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="Train for so long, validation not counted, with the learning rate's schedule "
        "over that time, in place of `epochs`; 0: for `epochs`.",
    )
    learning_rate_schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="Constant, or from the peak to 0 over the training."
    )
    warmup: Share = Field(
        default=0.0, description='Share of the training in which the rate rises from 0; "cosine".'
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="AdamW; or Muon for matrices and Adam for all else."
    )
    adam_beta_1: Share = Field(default=0.9, description="Adam's decay of the mean gradient.")
    adam_beta_2: Share = Field(default=0.999, description="Adam's decay of the mean square.")
    adam_epsilon: float = Field(default=1e-7, gt=0, le=1, description="Adam's ε.")
    adam_rate_ratio: float = Field(
        default=0.15, gt=0, le=1000, description="Adam's learning rate in units of Muon's."
    )
    muon_momentum: Share = Field(default=0.95, description="Muon's, in Nesterov's form.")
    muon_steps: int = Field(
        default=5,
        ge=1,
        le=100,
        description="Of Newton-Schulz, to make Muon's updates orthogonal.",
    )
    decay_matrices_only: bool = Field(
        default=False,
        description="Biases, scales and shifts of normalizations and positions do not decay.",
    )
    gradient_clip_norm: float = Field(
        default=0.0, ge=0, description="Norm of all gradients together, at most; 0: any."
    )
    ema_momentum: Share = Field(
        default=0.0,
        description="Of the moving average of the weights that is evaluated and exported in place "
        "of the last ones; 0: the last ones. Batch statistics are then averaged as long.",
    )
    label_smoothing: Share = Field(
        default=0.0, description="Share of a label's probability that all classes divide."
    )
    dropout_rate: Share = Field(
        default=0.0, description="Of attention weights, and after each layer of a block's MLP."
    )
    head_dropout_rate: Share = Field(
        default=0.0, description="Before the classifier, and after its hidden layers."
    )
    balance: bool = Field(
        default=False,
        description="An example counts the more in the loss, the fewer its class has in the train "
        "split; 1 on average.",
    )
    mixed_precision: bool = Field(
        default=False,
        description="Compute in bfloat16 where the processor is fast at it; variables and the "
        "exported model stay float32.",
    )

    def __post_init__(self) -> None:
        if self.warmup and self.learning_rate_schedule != "cosine":
            raise ValueError(
                f"warmup is {self.warmup}, but learning_rate_schedule is "
                f"{self.learning_rate_schedule!r}: use 'cosine', or a warmup of 0."
            )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Preset:
    """The hyperparameters of one Vision Transformer and of its training.

    Immutable; `replace` makes a variant, which is checked again.

    Raises:
        ValueError: Two parts contradict each other.
    """

    name: str = Field(min_length=1, description="What it is chosen by.")
    description: str = Field(description="One sentence for `--help`.")
    image_size: int = Field(
        ge=1, le=4096, description="Side in pixels up to which images are stored as they are."
    )
    architecture: Architecture
    augmentation: Augmentation
    training: Training
    floors: Mapping[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="By the name of a metric of the gate, the lowest value on the test split with "
        "which a model may be pushed; those of `pipeline.gate` where it has none.",
    )

    def __post_init__(self) -> None:
        if self.architecture.block == "batch_norm" and self.training.dropout_rate:
            raise ValueError(
                f"training.dropout_rate is {self.training.dropout_rate}, but architecture.block "
                "'batch_norm' has no dropout: set it to 0."
            )


_PARTS = {"architecture": Architecture, "augmentation": Augmentation, "training": Training}
# Every field of the parts, "training.epochs"; the last words are unique, too.
FIELDS = {
    f"{part}.{name}": field
    for part, kind in _PARTS.items()
    for name, field in kind.__pydantic_fields__.items()  # type: ignore[attr-defined]
}
_SHORT = {name.partition(".")[2]: name for name in FIELDS}
ADAPTER: TypeAdapter[Preset] = TypeAdapter(Preset)


def replace(preset: Preset, **fields: Any) -> Preset:
    """Makes a variant of a preset.

    Args:
        preset: It is not changed.
        **fields: New values of its own fields or of its parts'.

    Returns:
        The variant.

    Raises:
        PresetError: See there.
    """
    own = {name: fields.pop(name) for name in list(fields) if name not in _SHORT}
    try:
        preset = dataclasses.replace(preset, **own)
    except ValidationError as error:
        raise _error(error, own) from None
    return override(preset, {_SHORT[name]: value for name, value in fields.items()})


def override(preset: Preset, values: Mapping[str, Any]) -> Preset:
    """The same by whole names, of values that may be text.

    Args:
        preset: It is not changed.
        values: By the name, "training.epochs"; text is read as JSON where the field is no text.

    Raises:
        PresetError: See there.
    """
    document = ADAPTER.dump_python(preset)
    for name, value in values.items():
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.7)
            same = [field for field in FIELDS if field.endswith(f".{name}")]
            hint = f"did you mean {' or '.join(same or close)}?"
            if not same and not close:
                hint = f"there are {', '.join(FIELDS)}."
            raise PresetError(f"there is no field {name!r} in a preset: {hint}")
        part, _, field = name.partition(".")
        document[part][field] = _parsed(value)
    try:
        return ADAPTER.validate_python(document)
    except ValidationError as error:
        raise _error(error, values) from None


def differences(preset: Preset, other: Preset) -> dict[str, Any]:
    """The fields of a preset's parts, by whole names, whose values another one does not have."""
    ours, theirs = ADAPTER.dump_python(preset, mode="json"), ADAPTER.dump_python(other, mode="json")
    pairs = ((name, *name.split(".")) for name in FIELDS)
    return {
        name: ours[part][field]
        for name, part, field in pairs
        if ours[part][field] != theirs[part][field]
    }


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Reads `--set`'s values.

    Args:
        texts: Each "training.epochs=3"; of one field the last one counts.

    Returns:
        Value by name, for `override`.

    Raises:
        PresetError: There is no "=" in one.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise PresetError(f"--set {text!r} is not NAME=VALUE, as training.label_smoothing=0.1")
        values[name.strip()] = _parsed(value.strip())
    return values


def _parsed(value: Any) -> Any:
    """Numbers, lists, true, false and null of a text; else the value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _error(error: ValidationError, values: Mapping[str, Any]) -> PresetError:
    """One line for people: field, value, what is allowed, and what it means."""
    first = error.errors()[0]
    name = ".".join(str(step) for step in first["loc"][:2])
    reason = first["msg"].removeprefix("Value error, ")
    if name not in FIELDS:
        # Two fields that contradict each other: it names them.
        return PresetError(reason if first["type"] == "value_error" else f"{name}: {reason}")
    reason = reason[0].lower() + reason[1:]
    value = values.get(name, first["input"])
    return PresetError(f"{name} is {value!r}: {reason}. ({FIELDS[name].description})")
