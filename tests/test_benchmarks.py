import sys

import pytest

from tests.conftest import REPOSITORY
from tests.support import patience


@pytest.mark.parametrize("name", ["accuracy_per_budget", "pipeline_speed", "profile_step"])
def test_nothing_is_said_before_the_table(name: str):
    """The first of them imports all that `train_step` does, Beam and Transform among it."""
    script = REPOSITORY / "benchmarks" / f"{name}.py"
    result = patience.run([sys.executable, str(script), "--help"], cpu_seconds=300)
    assert result.returncode == 0
    assert result.stdout.startswith("usage:") and result.stderr == ""
