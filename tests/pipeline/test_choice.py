"""What a run does that was not told what to train."""

import os
from typing import Any

import pytest

from dataset.card import DataCard, SourceInfo, Split
from pipeline.choice import available_cpus, choose_training
from pipeline.config import PipelineConfig
from tests.support.cards import make_card


def card_of(images: int, smallest: tuple[int, int] = (32, 32)) -> DataCard:
    splits = {"train": Split(images, False), "validation": Split(0, True)}
    source = SourceInfo("folders", "nowhere", "0" * 64, smallest, (640, 480), 0, 0)
    return make_card(["a", "b"], splits=splits, source=source)


CIFAR = card_of(50_000)


@pytest.mark.parametrize(
    ("given", "gpus", "cpus", "preset", "epochs", "minutes", "text"),
    [
        ({}, 0, 2, "compact", None, 10, "10 minutes of training (no GPU, 2 CPU cores; more or"),
        ({"limit": 9_000}, 0, 2, "compact", None, 1.8, "1.8 minutes of training (no GPU"),
        ({"limit": 100}, 0, 2, "compact_long", None, 1, "1 minute of training (no GPU"),
        ({"preset": "compact_long"}, 0, 2, "compact_long", None, 120, "120 minutes of training"),
        ({"epochs": 3}, 0, 2, "compact", 3, 0, "3 epochs (no GPU, 2 CPU cores)"),
        ({"train_minutes": 90.0}, 0, 2, "compact", None, 90, "90 minutes of training (no GPU"),
        ({}, 1, 2, "compact_long", 130, 0, "130 epochs (1 GPU)"),
        ({"preset": "compact", "train_minutes": 0.5}, 1, 8, "compact", None, 0.5, "0.5 minutes"),
        ({"preset": "notebook"}, 0, 2, "notebook", 2, 0, "2 epochs (no GPU, 2 CPU cores): A SHORT"),
        ({"preset": "notebook"}, 0, 16, "notebook", 4, 0, "4 epochs (no GPU, 16 CPU cores): A SH"),
        ({"preset": "notebook"}, 0, 96, "notebook", 20, 0, "20 epochs (no GPU, 96 CPU cores)"),
        ({"preset": "notebook"}, 4, 2, "notebook", 20, 0, "20 epochs (4 GPUs)"),
        ({"preset": "notebook", "epochs": 1}, 1, 2, "notebook", 1, 0, "1 epoch (1 GPU)"),
    ],
)
def test_preset_and_training_length_fit_the_machine(
    given: dict[str, Any],
    gpus: int,
    cpus: int,
    preset: str,
    epochs: int | None,
    minutes: float,
    text: str,
):
    config = PipelineConfig(**given)
    chosen, why = choose_training(config, CIFAR, gpus=gpus, cpus=cpus)
    assert (chosen.name, chosen.training.train_minutes) == (preset, minutes)
    assert epochs is None or chosen.training.epochs == epochs
    assert why.startswith(text)
    assert ("SHORT" in why) == (preset == "notebook" and "epochs" not in given and epochs < 20)


def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= available_cpus() <= len(allowed)


def test_few_images_get_much_augmentation():
    preset, why = choose_training(PipelineConfig(), card_of(1_500), gpus=0, cpus=2)
    assert (preset.name, preset.training.train_minutes) == ("compact_long", 3.6)
    assert why.endswith("; much augmentation, as 1,500 images are seen many times")
    named, _ = choose_training(PipelineConfig(preset="compact"), card_of(1_500), gpus=0, cpus=2)
    assert named.name == "compact"


def test_photographs_are_larger_and_take_longer():
    photos = card_of(50_000, smallest=(120, 64))
    preset, why = choose_training(PipelineConfig(), photos, gpus=0, cpus=2)
    assert (preset.image_size, preset.training.train_minutes) == (64, 40)
    assert "64 x 64 pixels, as no image has a side below 48 (--image_size)" in why
    # What was asked for stays.
    for given in ({"image_size": "32"}, {"preset": "compact"}):
        preset, why = choose_training(PipelineConfig(**given), photos, gpus=0, cpus=2)
        assert (preset.image_size, preset.training.train_minutes) == (32, 10)
        assert "64 x 64" not in why
    icons, _ = choose_training(PipelineConfig(), card_of(50_000, (40, 64)), gpus=0, cpus=2)
    assert icons.image_size == 32
