import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import PipelineConfig
from pipeline.run_lock import LockHolder, PipelineBusyError, exclusive_run, lock_holder
from tests.conftest import REPOSITORY

MODULE = "pipeline.local_runner"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--data", "no/such/archive.tar.gz"], 1, "no/such/archive.tar.gz"),
        (
            ["--preset", "huge"],
            2,
            "Unknown preset 'huge': choose one of compact, compact_long, compact_wide, notebook, "
            "tiny.",
        ),
        (["--batch_size", "0"], 2, "--batch_size is 0: it must be 1 to 1000000."),
    ],
)
def test_bad_input_is_refused_in_a_line(run_module, tmp_path, flags, code, message):
    result = run_module(MODULE, *flags, "--work_dir", tmp_path / "work")
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--work_dir", "gs://bucket/x"], "--work_dir is 'gs://bucket/x': here it must be on this"),
        (["--serving_dir", "s3://b/x"], "--serving_dir is 's3://b/x': here it must be on this"),
        (["--data", "gs://bucket/data"], "--data is 'gs://bucket/data': here it must be on this"),
        (["--data", "~nosuchuser/x"], "--data is '~nosuchuser/x': that user's home is not known"),
        (["--work_dir", "~nosuchuser/x"], "that user's home is not known"),
        (["--work_dir", "photos [ab]"], "takes [ for a pattern: choose a folder without"),
        (["--serving_dir", "a*"], "takes * for a pattern"),
        (["--work_dir", "/".join(["long"] * 320)], "bytes too long for its database"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_and_nothing_made(
    run_module, tmp_path, flags, message
):
    environment = {"PYTHONPATH": str(REPOSITORY)}
    result = run_module(MODULE, *flags, cwd=tmp_path, env=environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_neither_a_home_nor_a_user_s_name_is_needed(tmp_path):
    """As in containers and cron jobs: finding the data gets to the point where they are refused."""
    folder = tmp_path / "data"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from dataset.format import DataError\n"
        "from dataset.locate import locate\n"
        "os.setuid(54321)\n"
        "try:\n"
        "    locate(sys.argv[1], Path('work'))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    if os.geteuid():
        pytest.skip("only root can become a user without a name")
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(folder) in result.stdout


def test_an_output_folder_that_cannot_be_made_is_refused(run_module, tmp_path, synthetic_folder):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    result = run_module(MODULE, "--data", synthetic_folder, "--work_dir", in_the_way)
    assert result.returncode == 1
    assert f"cannot write to {in_the_way}" in result.stderr
    assert "Choose another --work_dir" in result.stderr
    assert in_the_way.read_text() == "not a folder"


def test_a_truncated_data_file_is_refused_before_anything_runs(
    run_module, tmp_path, synthetic_folder
):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in synthetic_folder.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-5] if file.name == "test.bin" else content)
    result = run_module(MODULE, "--data", folder, "--work_dir", tmp_path / "work")
    assert result.returncode == 1
    assert "test.bin" in result.stderr and "3,074" in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_lock_that_is_a_folder_is_named(tmp_path):
    root = PipelineConfig(work_dir=str(tmp_path)).pipeline_root
    (Path(root) / ".lock").mkdir(parents=True)
    for use in (lock_holder, lambda root: exclusive_run(root).__enter__()):
        with pytest.raises(PipelineBusyError, match=f"{root}/.lock is a folder.*: remove or"):
            use(root)


_HOLD = """
import sys, time
from pipeline.run_lock import exclusive_run
with exclusive_run(sys.argv[1], "the run"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_on_the_same_pipeline_is_refused(run_module, tmp_path, synthetic_folder):
    root = PipelineConfig(work_dir=str(tmp_path)).pipeline_root
    assert lock_holder(root) is None
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, root], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert lock_holder(root) == LockHolder(holder.pid, "the run")
        result = run_module(
            MODULE, "--data", synthetic_folder, "--work_dir", tmp_path, "--preset", "tiny"
        )
        assert result.returncode == 1
        assert f"is running already (process {holder.pid})" in result.stderr
        assert "--pipeline_name" in result.stderr
        # Before the model is chosen, for which TensorFlow and TFX are imported.
        assert "model: preset" not in result.stdout
        assert not (Path(root) / "ExampleGen").exists()
    finally:
        holder.kill()
        holder.wait()
    # Killed without a chance to clean up, and yet nothing is left locked.
    assert lock_holder(root) is None
    with exclusive_run(root):
        assert lock_holder(root) == LockHolder(os.getpid(), "")


def test_flags_from_the_environment_are_shown_and_those_of_the_command_line_win(run_module):
    environment = {"VIT_PIPELINE_ARGS": "--batch_size 0"}
    result = run_module(MODULE, env=environment)
    assert result.returncode == 2 and "--batch_size is 0" in result.stderr
    assert result.stdout == "flags: --batch_size 0 (from VIT_PIPELINE_ARGS)\n"
    result = run_module(MODULE, "--epochs", "0", env=environment)
    assert result.returncode == 2 and "--epochs is 0" in result.stderr and not result.stdout
    result = run_module(MODULE, env={"VIT_PIPELINE_ARGS": "--data 'open"})
    assert result.returncode == 2 and "No closing quotation" in result.stderr
