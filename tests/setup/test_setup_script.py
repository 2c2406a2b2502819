"""tools/setup.sh makes, keeps and mends .venv: real set-ups, from small lock files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLERS = ("pip", "setuptools", "uv", "wheel")
NO_NETWORK = ("NewConnectionError", "name resolution", "Network is unreachable", "timed out")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what the caller of `make test` chose."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "GPU")}
    return {**kept, **changes}


def set_up(checkout: Path, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(checkout / "tools/setup.sh"), *options],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def copy_checkout(folder: Path) -> Path:
    """The files that the set-up reads, with lock files that hold the installers alone."""
    shutil.copytree(ROOT / "tools", folder / "tools")
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "requirements").mkdir()
    for lock in (ROOT / "requirements").glob("tfx-*.txt"):
        blocks = re.split(r"\n(?=[A-Za-z0-9])", lock.read_text())
        kept = [block for block in blocks if block.startswith(tuple(f"{n}==" for n in INSTALLERS))]
        (folder / "requirements" / lock.name).write_text("\n".join(kept) + "\n")
    for package in ("pipeline", "components", "dataset", "trainer", "serving"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that has been set up; a test that spoils it leaves it set up again."""
    folder = copy_checkout(tmp_path_factory.mktemp("checkout with a space"))
    result = set_up(folder)
    if result.returncode and any(sign in result.stdout for sign in NO_NETWORK):
        pytest.skip("no package index can be reached, and a set-up needs one")
    assert result.returncode == 0, result.stdout
    assert re.search(r"^setup: TFX 1\.\d\d with Python 3\.\d\d: .*glibc", result.stdout, re.M)
    return folder


def test_the_environment_holds_the_locked_versions_and_the_project(checkout: Path) -> None:
    python = checkout / ".venv/bin/python"
    listed = subprocess.run(
        [python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True
    ).stdout
    fields = dict(
        line.split(" ", 1) for line in (checkout / ".venv/.setup-stamp").read_text().splitlines()
    )
    stem = f"{fields['line']}-py{fields['version'].replace('.', '')}"
    lock = (checkout / "requirements" / f"{stem}.txt").read_text()
    for name in INSTALLERS:
        version = re.search(rf"^{name}==(\S+)", lock, re.M)
        assert version and f"{name}=={version[1]}\n" in listed
    assert (checkout / ".venv/bin/vit-pipeline").exists()
    where = subprocess.run(
        [python, "-c", "import trainer; print(trainer.__file__)"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.strip() == str(checkout / "trainer/__init__.py")


def test_an_up_to_date_environment_costs_nothing(checkout: Path) -> None:
    stamp = checkout / ".venv/.setup-stamp"
    made = stamp.stat().st_mtime_ns
    started = time.monotonic()
    result = set_up(checkout, "--quiet")
    assert time.monotonic() - started < 10
    assert (result.returncode, result.stdout) == (0, "")
    assert stamp.stat().st_mtime_ns == made
    assert "up to date" in set_up(checkout).stdout


def test_a_changed_setup_py_brings_it_up_to_date_in_place(checkout: Path) -> None:
    mark = checkout / ".venv/mark"
    mark.touch()
    setup_py = checkout / "setup.py"
    setup_py.write_text(setup_py.read_text().replace("vit-predict =", "vit-ask ="))
    result = set_up(checkout)
    assert result.returncode == 0, result.stdout
    assert "replacing" not in result.stdout
    assert mark.exists()
    assert (checkout / ".venv/bin/vit-ask").exists()
    assert not (checkout / ".venv/bin/vit-predict").exists()


def test_a_half_made_environment_is_made_anew_whatever_the_user_has_configured(
    checkout: Path, tmp_path: Path
) -> None:
    mark = checkout / ".venv/mark"
    mark.touch()
    (checkout / ".venv/.setup-stamp").unlink()
    (tmp_path / "constraints.txt").write_text("pip<20\nuv<0.1\n")
    constraints = str(tmp_path / "constraints.txt")
    result = set_up(
        checkout,
        PIP_CONSTRAINT=constraints,
        UV_CONSTRAINT=constraints,
        UV_EXCLUDE_NEWER="2020-01-01",
        PIP_TARGET=str(tmp_path / "elsewhere"),
        VIRTUAL_ENV=str(tmp_path),
    )
    assert result.returncode == 0, result.stdout
    assert "replacing .venv, which is unfinished" in result.stdout
    assert not mark.exists()
    assert not (tmp_path / "elsewhere").exists()


def test_of_two_set_ups_at_once_one_installs(checkout: Path) -> None:
    setup_py = checkout / "setup.py"
    setup_py.write_text(setup_py.read_text() + "# changed\n")
    both = [
        subprocess.Popen(
            [str(checkout / "tools/setup.sh")],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("installing" in output for output in outputs) == 1, outputs
    assert sum("up to date" in output for output in outputs) == 1, outputs


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path / "checkout")
    (folder / ".venv").mkdir()
    (folder / ".venv/thesis.txt").write_text("irreplaceable")
    result = set_up(folder)
    assert result.returncode == 1
    assert f"{folder}/.venv is in the way" in result.stdout
    assert (folder / ".venv/thesis.txt").read_text() == "irreplaceable"


def test_a_missing_interpreter_ends_the_set_up_with_what_to_install(tmp_path: Path) -> None:
    # Versions that no machine has stand in for the supported ones, so that none can be found.
    folder = copy_checkout(tmp_path / "checkout")
    choose = folder / "tools/choose_python.sh"
    text = choose.read_text()
    changed = re.sub(r"^(NEW|OLD)_LINE_PYTHONS=.*$", r"\1_LINE_PYTHONS='3.99'", text, flags=re.M)
    choose.write_text(changed)
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.99: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    result = set_up(folder, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert f"passed over {shim}: it does not run" in result.stdout
    assert "no usable Python found; one of these is needed: 3.99" in result.stdout
    assert "pyenv install 3.99" in result.stdout
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PYTHON": "/nonexistent/python"}, "PYTHON=/nonexistent/python does not run"),
        ({"GPU": "yes"}, "GPU=yes is not understood. Use GPU=1"),
    ],
)
def test_a_wrong_choice_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    folder = copy_checkout(tmp_path / "checkout")
    result = set_up(folder, **changes)
    assert result.returncode == 1
    assert message in result.stdout
    assert not (folder / ".venv").exists()


def test_a_missing_compiler_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path / "checkout")
    tools = tmp_path / "bin"
    tools.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for tool in Path(place).glob("*") if place else ():
            if "++" not in tool.name and not (tools / tool.name).is_symlink():
                (tools / tool.name).symlink_to(tool)
    result = set_up(folder, PATH=str(tools), CXX="")
    assert result.returncode == 1
    assert re.search(r"no C\+\+ compiler.*apt-get install g\+\+ python3\.\d\d-dev", result.stdout)
    assert not (folder / ".venv").exists()
