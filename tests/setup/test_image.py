"""kubeflow/Dockerfile, as far as that goes without building an image (ten minutes)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "kubeflow" / "Dockerfile").read_text()
STEM = "tfx-1.21-py313"


def names(lock: str) -> set[str]:
    return set(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==", lock, flags=re.M))


def test_the_lock_file_is_filtered_and_keeps_its_hashes() -> None:
    (program,) = re.findall(r"awk '(NR == FNR .*)' \\$", DOCKERFILE, flags=re.M)
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


def test_what_is_copied_is_there_and_let_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!").partition("/")[0] for line in ignored if line[0] == "!"}
    assert ignored[1] == "*"  # everything else stays out: data, models, .git, .venv
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.M)
    sources = {source for line in copied for source in line.split()}
    assert {"components", "dataset", "pipeline", "serving", "trainer", "setup.py"} <= sources
    for source in sources:
        assert list(ROOT.glob(source)), f"there is no {source}"
    assert {source.partition("/")[0] for source in sources} == allowed


def test_the_last_stage_has_no_compiler_and_no_root() -> None:
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert "apt-get" not in last
    assert re.search(r"^USER 10001:10001$", last, flags=re.M)
    assert "org.opencontainers.image.revision" in last
