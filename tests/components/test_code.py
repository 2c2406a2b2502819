"""What the cache key of a component holds of its code: a copy of the project is edited."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components import code

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys; from components.code import fingerprint; print(fingerprint(*sys.argv[1:]))"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for package in ("components", "dataset", "serving", "trainer"):
        shutil.copytree(ROOT / package, folder / package)
    return folder


def fingerprint(project: Path, *names: str) -> str:
    command = [sys.executable, "-c", PROGRAM, *names]
    return subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("names", "file", "changes"),
    [
        (["components.pusher"], "components/pusher/executor.py", True),
        # What it imports, and what that imports.
        (["components.pusher"], "components/models.py", True),
        (["components.evaluator"], "dataset/card.py", True),
        (["components.evaluator"], "components/pusher/executor.py", False),
        # A module that is run by its name is part of a package.
        (["trainer"], "trainer/on_jax/__main__.py", True),
        (["trainer.preprocessing"], "trainer/run.py", False),
        (["components.serving_validator", "serving"], "serving/server/rest.py", True),
    ],
)
def test_an_edit_changes_the_components_that_use_the_module(
    project: Path, names: list[str], file: str, changes: bool
):
    before = fingerprint(project, *names)
    text = (project / file).read_text()
    (project / file).write_text(text + "\n# edited\n")
    assert (fingerprint(project, *names) != before) is changes
    (project / file).write_text(text)
    assert fingerprint(project, *names) == before


def test_a_new_module_in_a_subfolder_counts(project: Path):
    before = fingerprint(project, "trainer")
    (project / "trainer" / "new").mkdir()
    (project / "trainer" / "new" / "module.py").write_text("")
    assert fingerprint(project, "trainer") != before


def test_no_such_module():
    with pytest.raises(ModuleNotFoundError, match=r"no module 'trainer\.gone'"):
        code.fingerprint("trainer.gone")
