"""MixUp and CutMix: images and labels in the same proportion, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from tests.support.networks import build_model
from trainer.losses import build_loss, build_metrics
from trainer.network.mixing import Mixing
from trainer.optimizer import build_optimizer
from trainer.preset import replace
from trainer.presets import get_preset

COUNT = 40


def _mixing(mixup: float, cutmix: float) -> Mixing:
    preset = replace(get_preset("compact"), mixup=mixup, cutmix=cutmix)
    return Mixing(preset.augmentation, num_classes=COUNT)


def _batch(labels: np.ndarray) -> np.ndarray:
    """Images of as many channels as there are classes, that of their label 1, the others 0."""
    one_hot = np.eye(COUNT, dtype=np.float32)[labels]
    return np.broadcast_to(one_hot[:, None, None], (len(labels), 8, 8, COUNT)).copy()


def _mix(mixing: Mixing, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(COUNT)
    images, shares = mixing(_batch(labels), labels, np.array([seed, 0], np.uint32))
    return ops.convert_to_numpy(images), ops.convert_to_numpy(shares)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_the_shares_of_the_images(mixup: float, cutmix: float) -> None:
    images, shares = _mix(_mixing(mixup, cutmix))
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, atol=1e-5)
    assert ((shares > 1e-6).sum(axis=1) <= 2).all()
    # CutMix cuts at fractions of a pixel and counts them: a row and a column of 8 at most.
    tolerance = 0.27 if cutmix else 1e-5
    np.testing.assert_allclose(images.mean(axis=(1, 2)), shares, atol=tolerance)
    own = shares[np.arange(COUNT), np.arange(COUNT)]
    assert np.std(own) > 0.1  # each image has its own draw


def test_each_kind_mixes_its_own_way() -> None:
    uniform = [
        (images == images[:, :1, :1]).all(axis=(1, 2, 3))
        for images, _ in (_mix(_mixing(0.8, 0.0)), _mix(_mixing(0.0, 1.0)), _mix(_mixing(0.8, 1.0)))
    ]
    assert uniform[0].all()  # MixUp: every pixel alike
    assert uniform[1].mean() < 0.4  # CutMix: but where it cuts nothing or all
    assert uniform[1].mean() < uniform[2].mean() < 1


def test_same_seed_same_batch_and_nothing_is_remembered() -> None:
    mixing = _mixing(0.8, 1.0)
    first, other, again = _mix(mixing, 1), _mix(mixing, 2), _mix(mixing, 1)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 0.1


def test_augmentation_that_mixes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mixup and cutmix are 0"):
        _mixing(0.0, 0.0)


def test_model_trains_on_mixed_labels_and_is_validated_on_plain_ones() -> None:
    preset = replace(
        get_preset("tiny"),
        transformer_layers=1,
        mixup=0.8,
        cutmix=1.0,
        random_shift=4,
        epochs=2,
    )
    labels = np.arange(60) % 10
    images = np.random.default_rng(0).normal(size=(60, 32, 32, 3)).astype(np.float32)
    plain = tf.data.Dataset.from_tensor_slices((images, labels)).batch(20)

    model = build_model(preset, num_classes=10, seed=0)
    model.compile(
        build_optimizer(preset.training, steps_per_epoch=3),
        build_loss(preset),
        metrics=build_metrics(preset, 10),
    )
    mixing = Mixing(preset.augmentation, 10)
    mixed = plain.map(lambda image, label: mixing(image, label, tf.constant([3, 0], tf.uint32)))
    history = model.fit(mixed, validation_data=plain, epochs=2, verbose=0, shuffle=False).history
    assert history["loss"][0] != history["loss"][1]
    # As computed by hand from the model's answers.
    logits = model.predict(images, verbose=0)
    hits = np.argsort(-logits, axis=1)[:, :5] == labels[:, None]
    np.testing.assert_allclose(history["val_top_1_accuracy"][-1], hits[:, 0].mean(), atol=1e-6)
    np.testing.assert_allclose(
        history["val_top_5_accuracy"][-1], hits.any(axis=1).mean(), atol=1e-6
    )
