"""What makes an interrupted training continue as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.trainer.test_callbacks import data, fit, small_model
from trainer import callbacks
from trainer.checkpoint import Checkpoint, CheckpointError, History

__all__ = ["data"]  # a fixture


def train(
    folder: Path, data: tuple, epochs: int, model: keras.Model | None = None, first: int = 0
) -> tuple[keras.Model, History]:
    """Trains from where the folder's checkpoints end, or from `first` where these are ignored."""
    model, history = model or small_model(), History()
    checkpoint = Checkpoint(str(folder), history)
    finished = checkpoint.restore(model)
    fit(model, data, epochs, [history, checkpoint, callbacks.EpochSeeds()], first=finished)
    return model, history


def test_a_continued_training_is_the_uninterrupted_one(
    data: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = small_model()
    losses = fit(model, data, 4, [callbacks.EpochSeeds()])
    train(tmp_path / "checkpoints", data, 2)
    # An interruption while a later epoch is saved costs that epoch alone.
    (tmp_path / "checkpoints" / "partial").write_bytes(b"half")
    continued, history = train(tmp_path / "checkpoints", data, 4)
    assert capsys.readouterr().out == "  continuing after epoch 2\n"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-000003.npz", "epoch-000004.npz"]
    assert [epoch["epoch"] for epoch in history.epochs] == [1, 2, 3, 4]
    assert all(0 <= epoch["seconds"] < 60 for epoch in history.epochs)
    # Keras alone would draw as in epochs 1 and 2 again, and be off by 2.8 here.
    np.testing.assert_allclose([epoch["loss"] for epoch in history.epochs], losses, atol=1e-6)
    for ours, theirs in zip(continued.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def damage_by_cutting(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_in_the_middle(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes(64) + content[at + 64 :]


@pytest.mark.parametrize(
    "damage",
    [damage_by_cutting, damage_in_the_middle, lambda content: b"", lambda content: b"text"],
    ids=["cut", "zeros", "empty", "text"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    damage, data: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path, data, 3)
    newest, before = tmp_path / "epoch-000003.npz", tmp_path / "epoch-000002.npz"
    newest.write_bytes(damage(newest.read_bytes()))
    _, history = train(tmp_path, data, 3)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"  the checkpoint {newest} is damaged: ")
    assert second == "  continuing after epoch 2"
    assert [epoch["epoch"] for epoch in history.epochs] == [1, 2, 3]
    for path in (newest, before):
        path.write_bytes(damage(path.read_bytes()))
    _, history = train(tmp_path, data, 1)
    *named, last = capsys.readouterr().out.splitlines()
    assert len(named) == 2 and last == "  no checkpoint is whole: training anew"
    assert [epoch["epoch"] for epoch in history.epochs] == [1]


def test_a_checkpoint_of_another_network(
    data: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path, data, 1)
    other = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten()])
    other.add(keras.layers.Dense(5))
    other.compile(keras.optimizers.AdamW(1e-3), "mse")
    assert Checkpoint(str(tmp_path), History()).restore(other) == 0
    assert "is damaged: it is of another network" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the small model, of 1.2 MB, and a half."""
    folder = tmp_path / "disk [1]"  # whatever it is called
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(
    small_disk: Path, data: tuple, capsys: pytest.CaptureFixture[str]
):
    message = (
        r"checkpoint of epoch 2 could not be written to .*: No space left on device\. Free space "
        r".* after epoch 1\."
    )
    with pytest.raises(CheckpointError, match=message):
        train(small_disk, data, 2)
    assert os.listdir(small_disk) == ["epoch-000001.npz"]
    assert Checkpoint(str(small_disk), History()).restore(small_model()) == 1
    assert "continuing after epoch 1" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made(data: tuple, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    message = r"checkpoint of epoch 1 could not be written to .*file/checkpoints: Not a directory"
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path / "file" / "checkpoints", data, 1)
