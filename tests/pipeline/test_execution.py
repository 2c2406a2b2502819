"""Runs that are interrupted, killed, or meet what others have left: a real pipeline, small."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_metadata.proto import metadata_store_pb2

from pipeline.config import PipelineConfig
from pipeline.execution import PipelineFailedError
from pipeline.metadata_file import MetadataError
from pipeline.run_history import Run, RunHistory
from tests.conftest import REPOSITORY
from tests.support import patience, small_pipeline
from tests.support.disk import small_disk


def root_of(work_dir: Path) -> Path:
    return Path(PipelineConfig(work_dir=str(work_dir)).pipeline_root)


def runs(work_dir: Path) -> list[Run]:
    return RunHistory(str(root_of(work_dir))).runs()


def states_in_database(work_dir: Path) -> list[str]:
    """The executions' states as ML Metadata have them."""
    with sqlite3.connect(root_of(work_dir) / "metadata.sqlite") as database:
        rows = database.execute("SELECT last_known_state FROM Execution ORDER BY id").fetchall()
    return [metadata_store_pb2.Execution.State.Name(state) for (state,) in rows]


def results(work_dir: Path) -> list[str]:
    folder = root_of(work_dir) / small_pipeline.NAME / small_pipeline.OUTPUT
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a finished run; to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    small_pipeline.run(folder, "write")
    return folder


def start(work_dir: Path, task: str, temporary: Path) -> subprocess.Popen[str]:
    """Starts a run and waits until its component is at its task."""
    temporary.mkdir(exist_ok=True)
    marker = work_dir.with_name("marker")
    command = [sys.executable, "-m", "tests.support.small_pipeline"]
    process = patience.start(
        [*command, str(work_dir), task, str(marker)],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    patience.wait_until(marker.exists, process, cpu_seconds=300)
    return process


@pytest.mark.parametrize(
    ("task", "number"),
    [("beam", signal.SIGINT), ("sleep", signal.SIGTERM)],
    ids=["SIGINT in Beam's function", "SIGTERM in the executor"],
)
def test_an_interruption_is_none_of_the_component_s_failures(
    tmp_path: Path, task: str, number: signal.Signals
):
    work_dir, temporary = tmp_path / "work", tmp_path / "tmp"
    with start(work_dir, task, temporary) as process:
        process.send_signal(number)
        patience.wait(process, cpu_seconds=120)
    assert process.returncode == 130
    assert not (root_of(work_dir) / "error.log").exists()
    (run,) = runs(work_dir)
    assert run.state == "INTERRUPTED"
    assert [component.state for component in run.components] == ["INTERRUPTED"]
    assert states_in_database(work_dir) == ["CANCELED"]
    assert os.listdir(temporary) == []


def test_what_a_killed_run_leaves_is_cleared_away_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work_dir, temporary = tmp_path / "work", tmp_path / "tmp"
    with start(work_dir, "sleep", temporary) as process:
        process.kill()
    # As it is after a kill: all of it is there.
    assert states_in_database(work_dir) == ["RUNNING"] and runs(work_dir)[0].state == "INTERRUPTED"
    assert results(work_dir) == ["1"] and len(os.listdir(temporary)) == 1
    working = root_of(work_dir) / small_pipeline.NAME / ".system" / "executor_execution"
    assert (working / "1" / ".temp").is_dir()
    others = temporary / "vit-0123456789ab-another-pipeline-s"
    others.mkdir()

    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    small_pipeline.run(work_dir, "write")
    assert states_in_database(work_dir) == ["CANCELED", "COMPLETE"]
    assert [run.components[0].state for run in runs(work_dir)] == ["COMPLETE", "INTERRUPTED"]
    assert results(work_dir) == ["2"]
    assert not (working / "1").exists()
    assert os.listdir(temporary) == [others.name]


def test_a_folder_of_unknown_origin_is_neither_read_nor_written_to(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    root = root_of(tmp_path)
    made = root / small_pipeline.NAME / small_pipeline.OUTPUT / "1" / "file"
    made.write_text("by the first run")
    (root / "metadata.sqlite").unlink()
    capsys.readouterr()
    small_pipeline.run(tmp_path, "write")
    assert made.read_text() == "made"
    (aside,) = (root / "set_aside").iterdir()
    old = aside / small_pipeline.NAME / small_pipeline.OUTPUT / "1" / "file"
    assert old.read_text() == "by the first run"
    assert f"were moved to {aside}" in capsys.readouterr().out
    # What the metadata know stays.
    small_pipeline.run(tmp_path, "write")
    assert runs(tmp_path)[0].components[0].state == "CACHED"
    assert len(list((root / "set_aside").iterdir())) == 1


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


def random_bytes(path: Path) -> None:
    path.write_bytes(os.urandom(5_000))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def newer_schema(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE MLMDEnv SET schema_version = 999")
    database.close()


def another_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE Songs (title TEXT)")
    database.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "database disk image is malformed"),
        (random_bytes, "file is not a database"),
        (folder, "it is not a file"),
        (newer_schema, "999"),
        (another_program, "it is a database of another program"),
    ],
)
def test_damaged_metadata_are_named_and_left_alone(
    tmp_path: Path, finished: Path, damage: Callable[[Path], None], reason: str
):
    work_dir = Path(shutil.copytree(finished, tmp_path / "work"))
    path = root_of(work_dir) / "metadata.sqlite"
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(MetadataError, match=reason) as raised:
        small_pipeline.run(work_dir, "write")
    assert str(path) in str(raised.value) and "move it away" in str(raised.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert results(work_dir) == ["1"]


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path):
    with small_disk(tmp_path / "disk", "3m") as disk:
        with pytest.raises(PipelineFailedError) as raised:
            small_pipeline.run(disk / "work", "fill the disk")
        assert "Worker failed: the disk is full while" in str(raised.value)
        assert str(disk) in str(raised.value) and "--work_dir" in str(raised.value)


def test_progress_is_a_line_for_each_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for _ in range(2):
        small_pipeline.run(tmp_path, "write")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert len(lines) == 2
    assert re.fullmatch(r"\[ 1/1\] Worker              +\d+\.\d s", lines[0])
    assert lines[1] == "[ 1/1] Worker               cached"
