"""Every knob of the pipeline: typed, checked before anything runs, and a flag each.

`pipeline/command_line.py` makes the flags from the fields, so a knob is declared in one place.
"""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from typing import TYPE_CHECKING, Any

from components.converter import formats
from components.evaluator.drop import AUTO
from dataset import images
from dataset.card import DataCard
from dataset.interface import Options, stored_size
from dataset.synthetic_names import NAME as SYNTHETIC
from pipeline.gate import METRICS, PRESET_CLASSES, Gate, resolve_floors
from trainer import engines, presets
from trainer.preset import OVERRIDES, Preset, override, parse_assignments, replace

_COLUMNS = ("path", "image", "label", "superclass", "split")
VERBOSITIES = ("quiet", "info", "debug")
_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}", re.IGNORECASE)

# Wider than anything of use, and within what TensorFlow, Beam and Python can take.
_WHOLE_NUMBERS = {
    "epochs": (1, 1_000_000),
    "batch_size": (1, 1_000_000),
    "tune": (1, 10_000),
    "limit": (2, 2**31 - 1),
    "seed": (0, 2**32 - 1),
    "beam_workers": (0, 1024),
}
_LARGEST_FLOAT = 3.4e38  # of 32 bits, in which training computes
_POSITIVE_NUMBERS = {
    "train_minutes": 1e6,
    "learning_rate": _LARGEST_FLOAT,
    "tune_fraction": 1.0,
}
# Beam and TensorFlow take a path with these for a pattern, and Beam cannot be told otherwise.
_PATTERN_CHARACTERS = "*?[\\"
# sqlite's limit is 512, of the path of a file that it writes beside the database.
_MAX_PATH_BYTES = 500


class ConfigError(ValueError):
    """A value is not usable, or two contradict each other; the message says what to do."""


def knob(default: Any, group: str, text: str, **options: Any) -> Any:
    """Declares a field with its flag's group and help; `options` go to argparse."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **options})


def _accuracy_drop(text: str) -> float:
    return AUTO if text == "auto" else float(text)


if TYPE_CHECKING:

    class _Floors:
        """A field for the floor of each metric of the gate; read by `resolve_gate`."""

else:
    _Floors = dataclasses.make_dataclass(
        "_Floors",
        [
            (
                metric.flag,
                float | None,
                knob(
                    None,
                    "gate",
                    f"push only if {metric.label} on the test split is at least this, 0..1; "
                    "default: the preset's",
                    metavar="X",
                ),
            )
            for metric in METRICS
        ],
        frozen=True,
    )


@dataclasses.dataclass(frozen=True)
class PipelineConfig(_Floors):
    """What a run of the pipeline is to do; each field's meaning is its flag's help.

    Raises:
      ConfigError: A value is out of range.
    """

    data: str | None = knob(
        None,
        "data",
        "images in class folders, a manifest (CSV, JSONL), Parquet files, a folder or archive of "
        "CIFAR, or 'synthetic'; without it: CIFAR-100 in ./data, then in Keras's cache, then a "
        "download from the author's address",
        metavar="PATH",
    )
    limit: int | None = knob(
        None, "data", "use at most N images of each split, class-balanced", metavar="N"
    )
    image_size: str | None = knob(
        None,
        "data",
        "store images at N x N pixels, or HEIGHTxWIDTH; default: their own size if all have the "
        "same, up to the preset's, else the preset's",
        metavar="N",
    )
    resize: str = knob(
        images.RESIZE,
        "data",
        "how images of other sizes become ones of that: crop keeps their middle, stretch the whole "
        "image, pad the whole image with black beside it",
        choices=images.RESIZES,
    )
    group: str | None = knob(
        None,
        "data",
        "images with the same value stay in one split: a column of a manifest or of Parquet files, "
        "or a regular expression that is searched for in paths",
        metavar="NAME_OR_REGEX",
    )
    columns: str | None = knob(
        None,
        "data",
        "columns of a manifest or of Parquet files that are not found by their names, such as "
        "path=photo,label=breed; there are path, image, label, superclass and split",
        metavar="NAME=COLUMN[,...]",
    )
    max_unreadable: float = knob(
        0.01, "data", "go on if at most this share of the images cannot be read, 0..1", metavar="X"
    )
    keep_duplicates: bool = knob(
        False, "data", "train on images that validation or test has, too, with the same contents"
    )
    preset: str | None = knob(
        None,
        "model",
        f"one of {', '.join(sorted(presets.PRESETS))}; default: {presets.ON_CPU} on a machine "
        f"without a GPU, else {presets.ON_GPU}",
        metavar="NAME",
    )
    epochs: int | None = knob(
        None,
        "model",
        f"passes over the training images; default: the preset's on a GPU; on a CPU "
        f"--train_minutes for {' and '.join(presets.MINUTES_ON_CPU)}, for others one for each four "
        "cores, two at least",
        metavar="N",
    )
    train_minutes: float | None = knob(
        None,
        "model",
        "train for so long, with the learning rate's schedule over that time, whatever the number "
        "of epochs; default on a CPU: "
        + ", ".join(f"{minutes} for {name}" for name, minutes in presets.MINUTES_ON_CPU.items())
        + ", a share of that for fewer images",
        metavar="X",
    )
    batch_size: int | None = knob(
        None, "model", "images per training step; default: the preset's", metavar="N"
    )
    learning_rate: float | None = knob(
        None, "model", "peak learning rate; default: the preset's", metavar="X"
    )
    weight_decay: float | None = knob(
        None, "model", "decoupled weight decay; default: the preset's", metavar="X"
    )
    set: tuple[str, ...] = knob(
        (),
        "model",
        "any other field of the preset, by its name in trainer/preset.py, such as "
        "augmentation.random_erasing=0.2; may be given several times",
        metavar="FIELD=VALUE",
        action="append",
        type=str,
    )
    balance: bool = knob(
        False, "model", "let examples of rare classes count more, so that all classes count alike"
    )
    engine: str = knob(
        engines.AUTO,
        "model",
        "what trains: tensorflow, jax (in a process of its own; make setup GPU=1 installs it with "
        "CUDA), or auto, which is jax where that sees a GPU",
        choices=engines.ENGINES,
    )
    seed: int = knob(0, "model", "fixes initial weights, shuffling and augmentation", metavar="N")
    tune: int | None = knob(
        None,
        "model",
        "first try N sets of learning rate, weight decay, depth and augmentation strength, and "
        "train with the best of them",
        metavar="N",
    )
    tune_fraction: float = knob(
        0.2,
        "model",
        "how long to train with each of them, as a fraction of the training's length",
        metavar="X",
    )
    warm_start: bool = knob(False, "model", "train on from the model pushed last, if there is one")
    export: str | None = knob(
        None,
        "model",
        "push the model in other formats, too: tflite (float16 and int8), onnx; they are in the "
        f"version's {formats.EXPORTS_FOLDER}",
        metavar="FORMAT[,...]",
    )
    max_accuracy_drop: float = knob(
        AUTO,
        "gate",
        "push only if no accuracy is more than this below the model pushed last, 0..1; auto: than "
        "one standard error of the difference, and two below the best version in the folder",
        metavar="X|auto",
        type=_accuracy_drop,
        shown="auto",
    )
    work_dir: str = knob(
        "output",
        "places",
        "folder for everything that is written: unpacked data, artifacts, metadata, models",
        metavar="DIR",
    )
    serving_dir: str | None = knob(
        None,
        "places",
        "folder to push models into, as <model name>/<version>; default: WORK_DIR/serving_models",
        metavar="DIR",
    )
    pipeline_name: str = knob(
        "vit", "places", "names the pipeline, its artifacts and its metadata", metavar="NAME"
    )
    model_name: str | None = knob(
        None,
        "places",
        "name of the pushed model; default: the data set's and _vit, such as cifar100_vit; "
        "cifar100_subset_vit with --limit, synthetic_vit on the synthetic set",
        metavar="NAME",
    )
    cache: bool = knob(True, "running", "take unchanged components' results from earlier runs")
    beam_workers: int = knob(
        1,
        "running",
        "processes for Beam's data processing, 0: one for each core; more than one pays for data "
        "much larger than CIFAR-100",
        metavar="N",
    )
    verbosity: str = knob(
        "quiet",
        "running",
        "quiet: progress and results; info, debug: what the frameworks log, too",
        choices=VERBOSITIES,
    )

    def __post_init__(self) -> None:
        for name in ("work_dir", "serving_dir"):
            self._check(name, getattr(self, name) != "", "name a folder")
        self._check("data", self.data is None or bool(self.data), "name a folder or an archive")
        self._check("preset", self.preset != "", "name one, or leave the flag out")
        for name, (least, most) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            self._check(
                name, value is None or least <= value <= most, f"it must be {least} to {most}"
            )
        for name, largest in _POSITIVE_NUMBERS.items():
            value = getattr(self, name)
            self._check(
                name,
                value is None or 0.0 < value <= largest,
                f"it must be above 0, up to {largest:g}",
            )
        decay = self.weight_decay
        self._check("max_unreadable", 0 <= self.max_unreadable <= 1, "it is a fraction, 0 to 1")
        self._check("group", self.group != "", "name a column, or give a regular expression")
        self._check(
            "image_size",
            self.image_size is None or self._parsed_image_size() is not None,
            "give a number of pixels, 8 to 1024, or two such as 48x64",
        )
        self._check(
            "columns",
            self.columns is None or self._parsed_columns() is not None,
            f"give NAME=COLUMN[,...], with a name of {', '.join(_COLUMNS)}",
        )
        self._check(
            "weight_decay",
            decay is None or 0.0 <= decay <= _LARGEST_FLOAT,
            f"it must be 0 to {_LARGEST_FLOAT:g}",
        )
        minutes = self.train_minutes
        if self.epochs is not None and minutes is not None:
            raise ConfigError(
                f"--epochs is {self.epochs} and --train_minutes is {minutes}: give one of them."
            )
        for name in (metric.flag for metric in METRICS):
            value = getattr(self, name)
            self._check(name, value is None or 0.0 <= value <= 1.0, "it is a fraction, 0 to 1")
        drop = self.max_accuracy_drop
        self._check("max_accuracy_drop", 0.0 <= drop <= 1.0 or drop == AUTO, "it is auto or 0 to 1")
        self._check(
            "verbosity", self.verbosity in VERBOSITIES, f"choose one of {', '.join(VERBOSITIES)}"
        )
        for name in ("pipeline_name", "model_name"):
            value = getattr(self, name)
            self._check(
                name,
                value is None or bool(_NAME_PATTERN.fullmatch(value)),
                "use up to 128 letters, digits, - and _, with a letter or digit first",
            )
        try:
            _ = self.export_formats
        except ValueError as error:
            self._check("export", False, str(error))
        try:
            self.resolve_gate(self.resolve_preset())
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check(self, name: str, holds: bool, what_to_do: str) -> None:
        if not holds:
            value = getattr(self, name)
            shown = repr(value) if isinstance(value, str) else value
            raise ConfigError(f"--{name} is {shown}: {what_to_do}.")

    def source_options(
        self, preset_size: int | None = None, card: DataCard | None = None
    ) -> Options:
        """What the flags say about the data.

        Args:
          preset_size: The preset's side in pixels, where it is known.
          card: Of the data, where they are known: the images' size is then decided here.
        """
        options = Options(
            image_size=self._parsed_image_size(),
            preset_size=preset_size,
            resize=self.resize,  # type: ignore[arg-type]  # one of the choices
            limit=self.limit,
            group=self.group,
            columns=self._parsed_columns() or {},
            max_unreadable=self.max_unreadable,
            keep_duplicates=self.keep_duplicates,
        )
        if card is None:
            return options
        # Not the preset's, so that another preset finds the examples in the cache.
        size = stored_size(card.source.smallest, card.source.largest, options)
        return dataclasses.replace(options, image_size=size, preset_size=None)

    def _parsed_image_size(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", self.image_size or "")
        if match is None:
            return None
        height, width = int(match[1]), int(match[2] or match[1])
        return (height, width) if 8 <= min(height, width) <= max(height, width) <= 1024 else None

    def _parsed_columns(self) -> dict[str, str] | None:
        pairs = [item.partition("=") for item in (self.columns or "").split(",")]
        columns = {name.strip(): column.strip() for name, _, column in pairs}
        sound = len(columns) == len(pairs) and set(columns) <= set(_COLUMNS)
        return columns if sound and all(columns.values()) else None

    def resolve_preset(self, **overrides: float) -> Preset:
        """Returns the preset, by default that for a GPU, with what the command line overrides.

        Args:
          **overrides: Fields of the preset to replace, too.

        Raises:
          ValueError: The preset is unknown, or refuses a value.
        """
        preset = presets.get_preset(self.preset or presets.ON_GPU)
        preset = override(preset, parse_assignments(self.set))
        given = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        if self.balance:
            given["balance"] = True
        return replace(preset, **{**given, **overrides})

    def resolve_gate(self, preset: Preset, classes: int = PRESET_CLASSES) -> Gate:
        """Returns what a model must reach: the preset's floors, unless the command line has others.

        Args:
          preset: The configuration's preset.
          classes: Of the data.

        Raises:
          ValueError: Two floors contradict each other.
        """
        given = {metric.name: getattr(self, metric.flag) for metric in METRICS}
        return Gate(resolve_floors(preset.floors, given, classes), self.max_accuracy_drop)

    @property
    def export_formats(self) -> tuple[str, ...]:
        """What `export` asks for: of `components.converter.formats.FORMATS`."""
        return () if self.export is None else formats.parse(self.export)

    @property
    def pipeline_root(self) -> str:
        """Folder of the pipeline's artifacts."""
        return os.path.join(self.work_dir, "pipelines", self.pipeline_name)

    @property
    def metadata_path(self) -> str:
        """ML Metadata's sqlite database; beside the artifacts it describes."""
        return metadata_path(self.pipeline_root)

    @property
    def checkpoint_dir(self) -> str:
        """Folder of the checkpoints of interrupted trainings."""
        return os.path.join(self.pipeline_root, "checkpoints")

    def resolve_model_name(self, dataset_name: str, *, subset: bool = False) -> str:
        """Names the pushed model; models of synthetic data always say so.

        Args:
          dataset_name: The data card's.
          subset: Whether the data are a part of it, as they also are with `limit`.
        """
        part = "_subset" if subset or self.limit else ""
        name = self.model_name or f"{_slug(dataset_name)}{part}_vit"
        if dataset_name == SYNTHETIC and not name.startswith(SYNTHETIC):
            return f"{SYNTHETIC}_{name}"
        return name

    def model_dir(self, dataset_name: str, *, subset: bool = False) -> str:
        """TF Serving's model base path for models of a data set; see `resolve_model_name`."""
        base = self.serving_dir or os.path.join(self.work_dir, "serving_models")
        return os.path.join(base, self.resolve_model_name(dataset_name, subset=subset))

    def absolute(self) -> PipelineConfig:
        """The same with absolute paths, which hold wherever a later command is run from.

        Raises:
          ConfigError: A path is none of this machine's, or cannot be written to by TFX.
        """
        paths = {}
        for name in ("data", "work_dir", "serving_dir"):
            value = getattr(self, name)
            if value is None or (name, value) == ("data", SYNTHETIC):
                continue
            self._check(name, "://" not in value, "here it must be on this machine, not an address")
            path = os.path.expanduser(value)
            self._check(name, not path.startswith("~"), "that user's home is not known: write it")
            paths[name] = os.path.abspath(path)
            strange = [letter for letter in _PATTERN_CHARACTERS if letter in paths[name]]
            self._check(
                name,
                name == "data" or not strange,
                f"TFX cannot write to {paths[name]}, as it takes {' and '.join(strange)} for a "
                "pattern: choose a folder without",
            )
        config = dataclasses.replace(self, **paths)
        excess = len(os.fsencode(config.metadata_path)) - _MAX_PATH_BYTES
        self._check(
            "work_dir", excess <= 0, f"the path is {excess} bytes too long for its database"
        )
        return config


def _slug(name: str) -> str:
    """Makes of a data set's name a part of a model's: `cifar-100` gives cifar100."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"-(?=\d)", "", plain)
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_") or "images"


def metadata_path(pipeline_root: str) -> str:
    """Where a local pipeline's ML Metadata database is, given the folder of its artifacts."""
    return os.path.join(pipeline_root, "metadata.sqlite")
