"""kubeflow/Dockerfile, as far as that goes without building an image (ten minutes).

What its last stages do is done here, in a folder in place of the image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEM = "tfx-1.21-py313"


@dataclass
class Stage:
    """A stage of the build: what it starts from, and its instructions."""

    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [text for instruction, text in self.instructions if instruction == name]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """The stages by name; the last one, which becomes the image, is `image`."""
    text = re.sub(r"^#.*\n", "", (ROOT / "kubeflow" / "Dockerfile").read_text(), flags=re.M)
    found: dict[str, Stage] = {}
    for line in text.replace("\\\n", "").splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            stage = found[name or "image"] = Stage(parent)
        elif instruction and found:
            stage.instructions.append((instruction, rest.strip()))
    return found


def names(lock: str) -> set[str]:
    return set(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==", lock, flags=re.M))


def test_the_lock_file_is_filtered_and_keeps_its_hashes(stages: dict[str, Stage]) -> None:
    (program,) = re.findall(r"awk '(NR == FNR [^']*)'", stages["dependencies"].all("RUN")[1])
    lock, tools = f"requirements/{STEM}.txt", f"requirements/{STEM}-tools.txt"
    filtered = subprocess.run(
        ["awk", program, tools, lock], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    left_out = set((ROOT / tools).read_text().splitlines()[1:])
    everything = names((ROOT / lock).read_text())
    assert left_out < everything and len(left_out) > 10
    assert names(filtered) == everything - left_out
    for requirement in re.split(r"\n(?=[A-Za-z0-9])", filtered.strip()):
        assert "--hash=sha256:" in requirement


def copied(stage: Stage) -> dict[str, str]:
    """What a stage copies from the repository -> where to."""
    lines = [text.split() for text in stage.all("COPY") if not text.startswith("--from")]
    return {source: words[-1] for words in lines for source in words[:-1]}


def test_what_is_copied_is_there_and_let_through(stages: dict[str, Stage]) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!").partition("/")[0] for line in ignored if line[0] == "!"}
    assert ignored[1] == "*"  # everything else stays out: data, models, .git, .venv
    sources = {source for stage in stages.values() for source in copied(stage)}
    for source in sources:
        assert list(ROOT.glob(source)), f"there is no {source}"
    assert {source.partition("/")[0] for source in sources} == allowed


@pytest.fixture(scope="module")
def image(stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage `project` makes of a checkout that was made with a umask of 077."""
    folder = tmp_path_factory.mktemp("image")
    build = folder / "build"
    for source, target in copied(stages["project"]).items():
        place = folder / target.lstrip("/") if target.startswith("/") else build / target
        if target == "./":
            place = build / source
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, place)
    subprocess.run(["chmod", "-R", "go=", folder], check=True)
    (command,) = stages["project"].all("RUN")
    for path, here in (
        ("/opt/vit/bin/python", sys.executable),
        ("/opt/project", f"{folder}/opt/project"),
        (" /app", f" {folder}/app"),
    ):
        command = command.replace(path, here)
    process = subprocess.run(
        ["sh", "-c", command], cwd=build, capture_output=True, text=True, umask=0o022
    )
    assert process.returncode == 0, process.stderr
    return folder


def test_every_user_can_read_the_project(image: Path) -> None:
    for part in ("opt/project", "app"):
        paths = list((image / part).rglob("*"))
        assert len(paths) > 2
        for path in paths:
            needed = 0o005 if path.is_dir() else 0o004
            assert path.stat().st_mode & needed == needed, path


def test_the_project_in_the_image_is_whole(image: Path) -> None:
    def modules(folder: Path) -> set[str]:
        packages = ("components", "dataset", "pipeline", "serving", "trainer")
        return {
            str(path.relative_to(folder))
            for package in packages
            for path in (folder / package).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }

    assert modules(image / "opt/project") == modules(ROOT)


def test_the_command_of_the_image_runs_from_what_was_copied(
    stages: dict[str, Stage], image: Path
) -> None:
    (command,) = stages["image"].all("CMD")
    python, *words = json.loads(command)
    assert python == "python"
    places = {text.split()[-1] for text in stages["image"].all("COPY")}
    assert {"/opt/project", "/app"} <= places
    process = subprocess.run(
        [sys.executable, *(str(image) + word if word[0] == "/" else word for word in words)],
        env={**os.environ, "PYTHONPATH": str(image / "opt/project")},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert process.returncode == 2
    assert "required: --executor_class_path" in process.stderr


def test_the_image_has_no_compiler_and_no_root(stages: dict[str, Stage]) -> None:
    lineage = [stages["image"]]
    while lineage[-1].parent in stages:
        lineage.append(stages[lineage[-1].parent])
    assert lineage[-1].parent == "${BASE_IMAGE}"
    commands = " ".join(text for stage in lineage for text in stage.all("RUN"))
    installed = re.findall(r"apt-get install (.*?)>/dev/null", commands)
    assert installed and not re.search(r"\b(g\+\+|gcc|build-essential|python\S*-dev)\b", commands)
    (made,) = re.findall(r"useradd (.*?) vit\b", commands)
    assert "--uid 10001" in made and "--gid 0" in made
    assert stages["image"].instructions[-2] == ("USER", "10001:0")
