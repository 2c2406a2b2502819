"""Fixtures of trainings; TensorFlow and TFX are imported for the tests that use them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.trainer.training import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Examples, their card and a transform graph."""
    from tests.trainer import training

    return training.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of `tiny` for two epochs."""
    from tests.trainer import training

    work = tmp_path_factory.mktemp("finished")
    training.train(inputs, work)
    return work
