import sys
import time
from pathlib import Path

import pytest

from tests.support import patience

PYTHON = [sys.executable, "-c"]


def test_output_and_exit_code_are_the_process_s():
    code = "import sys; print('out'); print('error', file=sys.stderr); sys.exit(3)"
    result = patience.run([*PYTHON, code], cpu_seconds=60)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "error\n")


def test_a_process_that_takes_too_much_is_killed_with_what_it_has_started(tmp_path: Path):
    child = f"import time; time.sleep(1000); open({str(tmp_path / 'file')!r}, 'w')"
    code = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])\nwhile 1: 0"
    )
    with pytest.raises(AssertionError, match="took more than 2 s of CPU"):
        patience.run([*PYTHON, code], cpu_seconds=2)


def test_a_process_that_does_nothing_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "_STALLED_SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises(AssertionError, match="did nothing any more"):
        patience.run([*PYTHON, "import time; time.sleep(1000)"], cpu_seconds=60)
    assert time.monotonic() - began < 900


def test_waiting_ends_with_the_process(tmp_path: Path):
    with (
        patience.start([*PYTHON, "pass"]) as process,
        pytest.raises(AssertionError, match="it ended before, with 0"),
    ):
        patience.wait_until((tmp_path / "never").exists, process, cpu_seconds=60)
