""".ci/run: what fails it, and what it leaves out with a word, on stand-ins for the suite's runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "run"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder where the suite passes on TFX 1.16, and the container does as `container` says."""
    write(tmp_path / "Makefile", "test:\n\t@mkdir -p .venv && cp line .venv/.setup-stamp\n")
    (tmp_path / "line").write_text("line tfx-1.16\n")
    write(
        tmp_path / "tools" / "test-in-container.sh", '#!/bin/sh\necho "$@" >>calls\n. ./container\n'
    )
    write(tmp_path / "container", "true\n")
    for command in ("podman", "debootstrap"):  # so that none is installed
        write(tmp_path / "bin" / command, "#!/bin/sh\n")
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci" / "run")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(checkout: Path, **environment: str) -> list[int | str]:
    """Returns the exit status and the lines."""
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # Without what `make` tells a make that it starts, where it has started these tests.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    process = subprocess.run(
        [checkout / ".ci" / "run"],
        env={**inherited, "PATH": path, "CI_MINUTES": "75", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [process.returncode, *process.stdout.splitlines()]


def calls(checkout: Path) -> list[str]:
    file = checkout / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_both_lines_run_whole(checkout: Path) -> None:
    assert run(checkout) == [0, "ci: done in 0 minutes"]
    setup, lint, *parts = [call.split(" ", 3)[3] for call in calls(checkout)]
    assert (setup, lint) == ("make setup", "make lint")
    named = [part.removeprefix("make tests TESTS=") for part in parts]
    assert "tests/e2e/test_kubeflow_pipeline.py" in named[:-1]
    # The last one is everything that no other is.
    assert named[-1] == " ".join(["tests", *(f"--ignore={part}" for part in named[:-1])])


def test_a_failure_on_the_own_line_ends_it(checkout: Path) -> None:
    write(checkout / "Makefile", "test:\n\t@exit 1\n")
    assert run(checkout)[0] == 2
    assert calls(checkout) == []


def test_a_failure_in_the_container_fails_it_after_all_parts_ran(checkout: Path) -> None:
    write(checkout / "container", 'case "$*" in *TESTS=tests/trainer*) exit 2 ;; esac\n')
    assert run(checkout) == [1, "ci: failed on TFX 1.21: tests/trainer"]
    assert len(calls(checkout)) == 7


def test_what_takes_too_long_is_named_and_no_failure(checkout: Path) -> None:
    write(checkout / "container", 'case "$*" in *TESTS=tests/trainer*) exit 124 ;; esac\n')
    status, *lines = run(checkout)
    said = "ci: not tested on TFX 1.21 for lack of time: a part of tests/trainer"
    assert (status, lines) == (0, [said, "ci: done in 0 minutes"])


def test_a_container_that_cannot_be_set_up_is_no_failure(checkout: Path) -> None:
    write(checkout / "container", "echo no registry; exit 1\n")
    expected = "ci: TFX 1.21 was not tested: its container could not be set up: no registry"
    assert run(checkout) == [0, expected]


@pytest.mark.parametrize("minutes", ["0", "9"])
def test_no_time_is_left(checkout: Path, minutes: str) -> None:
    expected = f"ci: TFX 1.21 was not tested: less than ten of CI_MINUTES={minutes} are left"
    assert run(checkout, CI_MINUTES=minutes) == [0, expected]
    assert calls(checkout) == []


def test_a_machine_of_the_newer_line(checkout: Path) -> None:
    (checkout / "line").write_text("line tfx-1.21\n")
    status, line = run(checkout)
    assert status == 0
    assert str(line).startswith("ci: TFX 1.16 was not tested: ")
    assert calls(checkout) == []
