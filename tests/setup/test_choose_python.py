"""The choice of the TFX line and the Python interpreter: tools/choose_python.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
ABSENT = "3.99"  # a version that no machine has, whatever is installed on it


def call(function: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one of the script's functions in a shell that stops at errors, as setup.sh does."""
    script = '. "$1"; shift; "$@"'
    return subprocess.run(
        ["sh", "-euc", script, "sh", str(ROOT / "tools/choose_python.sh"), function, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("glibc", "pythons"),
    [
        ("2.28", "3.10"),
        ("2.36", "3.10"),
        ("2.37", "3.10"),
        ("2.38", "3.12 3.13 3.11 3.10"),
        ("2.41", "3.12 3.13 3.11 3.10"),
        ("3.0", "3.12 3.13 3.11 3.10"),
    ],
)
def test_glibc_decides_which_pythons_can_be_used(glibc: str, pythons: str) -> None:
    assert call("pythons_for", "Linux", "x86_64", glibc).stdout.strip() == pythons


@pytest.mark.parametrize(
    ("machine", "named"),
    [
        (("Darwin", "arm64", ""), "Darwin on arm64"),
        (("Linux", "aarch64", "2.39"), "Linux on aarch64"),
        (("Linux", "x86_64", ""), "no glibc"),
        (("Linux", "x86_64", "2.4"), "2.4"),
        (("Linux", "x86_64", "2.27"), "2.27"),
    ],
)
def test_an_unsupported_machine_is_refused_with_what_is_supported(
    machine: tuple[str, str, str], named: str
) -> None:
    result = call("pythons_for", *machine)
    assert result.returncode == 1
    assert named in result.stderr
    assert "2.28" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("version", "line"),
    [("3.10", "tfx-1.16"), ("3.11", "tfx-1.21"), ("3.12", "tfx-1.21"), ("3.13", "tfx-1.21")],
)
def test_each_python_has_its_line_and_its_lock_files(version: str, line: str) -> None:
    assert call("line_of", version).stdout.strip() == line
    stem = f"{line}-py{version.replace('.', '')}"
    assert (ROOT / "requirements" / f"{stem}.txt").is_file()
    assert (ROOT / "requirements" / f"{stem}-gpu.txt").is_file()


@pytest.mark.parametrize("version", ["3.9", "3.14", "2.7", "3.1"])
def test_other_pythons_have_no_line(version: str) -> None:
    assert call("line_of", version).returncode == 1


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def shim(path: Path) -> Path:
    """What pyenv puts on PATH for a version that is not selected."""
    message = f"pyenv: {path.name}: command not found"
    return executable(path, f'#!/bin/sh\necho "{message}" >&2\nexit 127\n')


def wrapper(path: Path, environment: str = "") -> Path:
    """The interpreter that runs this test, under another path."""
    return executable(path, f'#!/bin/sh\n{environment} exec "{sys.executable}" "$@"\n')


def test_a_shim_that_answers_command_not_found_is_passed_over(tmp_path: Path) -> None:
    bad = shim(tmp_path / "shims" / f"python{VERSION}")
    wrapper(tmp_path / "bin" / f"python{VERSION}")
    path = f"{tmp_path}/shims:{tmp_path}/bin:/usr/bin:/bin"
    result = call("find_python", VERSION, PATH=path)
    assert result.stdout == f"{VERSION}\t{sys.executable}\n"
    assert f"passed over {bad}: it does not run" in result.stderr


def test_a_version_behind_a_shim_is_found_though_not_selected(tmp_path: Path) -> None:
    shim(tmp_path / "pyenv/shims" / f"python{VERSION}")
    wrapper(tmp_path / f"pyenv/versions/{VERSION}.7/bin/python{VERSION}")
    result = call("find_python", VERSION, PATH=f"{tmp_path}/pyenv/shims:/usr/bin:/bin")
    assert result.stdout == f"{VERSION}\t{sys.executable}\n"


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("HOME", f".pyenv/versions/{VERSION}.7/bin"),
        ("HOME", f".local/share/uv/python/cpython-{VERSION}.7-linux-x86_64-gnu/bin"),
        ("PYENV_ROOT", f"versions/{VERSION}.7/bin"),
        ("UV_PYTHON_INSTALL_DIR", f"cpython-{VERSION}.7-linux-x86_64-gnu/bin"),
    ],
)
def test_interpreters_outside_path_are_candidates(
    tmp_path: Path, variable: str, place: str
) -> None:
    interpreter = wrapper(tmp_path / place / f"python{VERSION}")
    elsewhere = {name: "" for name in ("PYENV_ROOT", "UV_PYTHON_INSTALL_DIR", "XDG_DATA_HOME")}
    result = call("candidates", VERSION, **{**elsewhere, variable: str(tmp_path)})
    assert str(interpreter) in result.stdout.splitlines()


def test_an_interpreter_of_another_version_than_its_name_says_is_passed_over(
    tmp_path: Path,
) -> None:
    bad = wrapper(tmp_path / f"python{ABSENT}")
    result = call("find_python", ABSENT, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert result.returncode == 1
    assert f"passed over {bad}: it is Python {VERSION}" in result.stderr


def test_a_python_without_ensurepip_is_passed_over_and_says_so(tmp_path: Path) -> None:
    # Debian's python3.x without python3.x-venv: everything is there but ensurepip.
    (tmp_path / "site").mkdir()
    (tmp_path / "site/ensurepip.py").write_text("raise ImportError('No module named ensurepip')")
    bad = wrapper(tmp_path / f"python{VERSION}", f"PYTHONPATH={tmp_path}/site")
    result = call("find_python", VERSION, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert f"passed over {bad}: it lacks ensurepip (on Debian or" in result.stderr
    assert f"apt-get install python{VERSION}-venv)" in result.stderr


def test_versions_are_tried_in_the_order_given(tmp_path: Path) -> None:
    wrapper(tmp_path / f"python{VERSION}")
    path = f"{tmp_path}:/usr/bin:/bin"
    result = call("find_python", ABSENT, VERSION, PATH=path)
    assert result.stdout == f"{VERSION}\t{sys.executable}\n"


@pytest.mark.parametrize(
    ("versions", "package"),
    [(("3.12", "3.13", "3.11", "3.10"), "python3.12-venv"), (("3.10",), "python3.10-venv")],
)
def test_what_to_install_is_said_for_each_line(versions: tuple[str, ...], package: str) -> None:
    text = call("how_to_install", *versions).stdout
    assert f"apt-get install python{versions[0]} {package}" in text
    assert f"pyenv install {versions[0]}" in text
    assert f"uv python install {versions[0]}" in text
