"""What a run does that was not told what to train: by the data and the machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from dataset.card import TRAIN, VALIDATION, DataCard
from dataset.format import OFFICIAL_TRAIN_RECORDS
from pipeline import console
from pipeline.config import PipelineConfig
from trainer import presets
from trainer.preset import Preset

# Below that each image is seen dozens of times, and needs to look different every time.
_FEW_IMAGES = 5_000
# Photographs: stored at `_PHOTO_SIZE` where none has a side of fewer pixels than this.
_PHOTO_PIXELS = 48
_PHOTO_SIZE = 64


def choose_training(
    config: PipelineConfig, card: DataCard, *, gpus: int, cpus: int
) -> tuple[Preset, str]:
    """Resolves the preset, its image size and the training's length, as they fit unless given.

    Args:
      config: The run's configuration.
      card: Of the data.
      gpus: GPUs that the engine sees.
      cpus: Cores.

    Returns:
      The preset, and the length and the reasons for people.
    """
    images = sum(card.splits[split].examples for split in (TRAIN, VALIDATION))
    images = min(images, config.limit or images)
    reasons = []
    photos = False
    if config.preset is None:
        few = images < _FEW_IMAGES and not gpus
        if not gpus:
            name = presets.ON_CPU_FEW if few else presets.ON_CPU
            config = dataclasses.replace(config, preset=name)
        if few:
            reasons.append(f"much augmentation, as {images:,} images are seen many times")
        photos = config.image_size is None and min(card.source.smallest) >= _PHOTO_PIXELS
    preset, length = _choose_length(config, images, gpus, cpus, 4 if photos else 1)
    if photos:
        preset = dataclasses.replace(preset, image_size=_PHOTO_SIZE)
        reasons.append(
            f"{_PHOTO_SIZE} x {_PHOTO_SIZE} pixels, as no image has a side below {_PHOTO_PIXELS} "
            "(--image_size)"
        )
    return preset, "; ".join([length, *reasons])


def _choose_length(
    config: PipelineConfig, images: int, gpus: int, cpus: int, cost: int
) -> tuple[Preset, str]:
    """Resolves the preset with its length; an image costs `cost` times one of 32 x 32."""
    preset = config.resolve_preset()
    training = preset.training
    device = console.count(gpus, "GPU") if gpus else f"no GPU, {cpus} CPU cores"
    if training.train_minutes:
        return preset, f"{console.count(training.train_minutes, 'minute')} of training ({device})"
    if config.epochs or gpus:
        return preset, f"{console.count(training.epochs, 'epoch')} ({device})"
    if preset.name in presets.MINUTES_ON_CPU:
        # Fewer images are learned sooner.
        share = min(1.0, images / OFFICIAL_TRAIN_RECORDS) * cost
        minutes = max(1.0, round(presets.MINUTES_ON_CPU[preset.name] * share, 1))
        return (
            config.resolve_preset(train_minutes=minutes),
            f"{console.count(minutes, 'minute')} of training ({device}; more or less: "
            "--train_minutes X, or --epochs N)",
        )
    # An epoch of the notebook preset takes four to six minutes on two cores, and more cores help
    # less and less: this keeps a run to about a quarter of an hour in all.
    epochs = min(training.epochs, max(2, cpus // 4))
    why = f"{console.count(epochs, 'epoch')} ({device})"
    if epochs < training.epochs:
        why += f": A SHORT RUN, the preset's own length is {training.epochs} "
        why += f"(--epochs {training.epochs})"
    return config.resolve_preset(epochs=epochs), why


def available_cpus() -> int:
    """Counts the cores that this process may use, which in a container are fewer than there are."""
    cpus = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" or "max PERIOD", cgroup v2
    if limit.is_file():
        quota, _, period = limit.read_text().partition(" ")
        if quota != "max":
            cpus = min(cpus, max(1, round(int(quota) / int(period))))
    return cpus
