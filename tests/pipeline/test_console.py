import contextlib
import logging
import subprocess
import sys

import pytest
from absl import logging as absl_logging

from pipeline import console


@pytest.fixture
def progress():
    verbosity = absl_logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        stack.callback(absl_logging.set_verbosity, verbosity)
        result = console.follow("quiet", 10)
        stack.callback(result.stop)
        yield result


def test_progress_survives_what_exporting_a_model_does_to_the_verbosity(
    progress, capsys: pytest.CaptureFixture[str]
):
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_verbosity(before)
    absl_logging.info("Component %s is running.", "Evaluator")
    assert "Evaluator" in capsys.readouterr().out


def test_quiet_shows_errors_and_nothing_below(progress, capsys: pytest.CaptureFixture[str]):
    for handler in logging.getLogger("absl").handlers:
        if handler is not progress:
            assert handler.level == logging.ERROR
    assert not logging.getLogger("absl").propagate


_IMPORT = """
from pipeline import console
with console.importing({verbosity!r}):
    import os, sys, warnings
    os.write(2, b"from C++\\n")
    warnings.warn("a warning")
    {statement}
print("after", file=sys.stderr)
"""


def _import(verbosity: str, statement: str = "pass") -> "subprocess.CompletedProcess[str]":
    code = _IMPORT.format(verbosity=verbosity, statement=statement)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_imports_are_silent_and_later_output_is_not():
    assert _import("quiet").stderr == "after\n"


def test_verbosity_brings_the_remarks_back():
    stderr = _import("info").stderr
    assert "from C++" in stderr and "a warning" in stderr


def test_a_failing_import_shows_everything():
    result = _import("quiet", "raise ImportError('broken')")
    assert result.returncode == 1
    assert "from C++" in result.stderr and "ImportError: broken" in result.stderr


def test_box_frames_its_lines():
    text = console.box("Title", ["one", "a longer second line"])
    assert text.splitlines() == [
        "== Title ===============",
        "  one",
        "  a longer second line",
        "========================",
    ]
