import json
from pathlib import Path

import pytest
from tfx import v1 as tfx
from tfx.types import standard_artifacts
from tfx.utils import path_utils

from components.baseline.component import Baseline
from components.baseline.executor import Executor, find_baseline
from components.models import has_model, versions


def push(serving_dir: Path, version: str, content: str = "graph") -> Path:
    """Writes what Pusher leaves, as far as looking it up is concerned."""
    folder = serving_dir / version
    (folder / "variables").mkdir(parents=True)
    (folder / "variables" / "variables.index").write_text(f"weights of {version}")
    (folder / "saved_model.pb").write_text(content)
    return folder


def find(serving_dir: Path, output: Path) -> standard_artifacts.Model:
    """Runs the executor with the component's own properties."""
    component = Baseline(
        model=tfx.dsl.Channel(type=standard_artifacts.Model), serving_dir=str(serving_dir)
    )
    baseline = standard_artifacts.Model()
    baseline.uri = str(output)
    Executor().Do({"model": []}, {"baseline": [baseline]}, component.exec_properties)
    return baseline


def test_no_folder(tmp_path: Path):
    assert versions(str(tmp_path / "nothing")) == []


def test_no_version(tmp_path: Path):
    assert versions(str(tmp_path)) == []


def test_order_is_numeric(tmp_path: Path):
    for version in ("9", "10", "1000000000", "999999999"):
        push(tmp_path, version)
    assert versions(str(tmp_path)) == ["9", "10", "999999999", "1000000000"]


@pytest.mark.parametrize("name", [".incoming", "tmp-20", "20.partial", "v20", "-20", "latest"])
def test_folders_that_are_no_version_do_not_count(tmp_path: Path, name: str):
    push(tmp_path, "3")
    push(tmp_path, name)
    assert versions(str(tmp_path)) == ["3"]


def test_staged_version_does_not_count(tmp_path: Path):
    push(tmp_path, "3")
    push(tmp_path / ".incoming", "4")
    assert versions(str(tmp_path)) == ["3"]


def test_incomplete_version_does_not_count(tmp_path: Path):
    push(tmp_path, "3")
    (push(tmp_path, "4") / "saved_model.pb").unlink()
    (tmp_path / "5").write_text("a file, not a folder")
    assert versions(str(tmp_path)) == ["3"]


def test_output_is_an_empty_folder_when_nothing_was_pushed(tmp_path: Path):
    baseline = find(tmp_path / "serving", tmp_path / "baseline")
    assert list((tmp_path / "baseline").iterdir()) == []
    assert not has_model(baseline)
    assert not baseline.has_custom_property("version")


def test_output_is_a_copy_of_the_newest_version(tmp_path: Path):
    push(tmp_path / "serving", "8", "older")
    newest = push(tmp_path / "serving", "12", "newer")
    baseline = find(tmp_path / "serving", tmp_path / "baseline")
    assert has_model(baseline)
    assert baseline.get_string_custom_property("version") == "12"
    # It outlives the version, and is where Evaluator looks for a model.
    for file in sorted(newest.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    copy = Path(path_utils.serving_model_path(baseline.uri))
    assert (copy / "saved_model.pb").read_text() == "newer"
    assert (copy / "variables" / "variables.index").read_text() == "weights of 12"


def test_without_a_candidate_it_is_the_newest_version(tmp_path: Path):
    """What training starts from, when there is no candidate yet."""
    push(tmp_path / "serving", "8")
    component = Baseline(serving_dir=str(tmp_path / "serving")).with_id("BaseModel")
    assert component.inputs == {}
    newest = standard_artifacts.Model()
    newest.uri = str(tmp_path / "newest")
    Executor().Do({}, {"baseline": [newest]}, component.exec_properties)
    assert newest.get_string_custom_property("version") == "8"


def candidate(tmp_path: Path, identity: str) -> standard_artifacts.Model:
    """A Model artifact as Trainer leaves it."""
    model = standard_artifacts.Model()
    model.uri = str(tmp_path / f"candidate-{identity}")
    folder = Path(path_utils.serving_model_dir(model.uri))
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").write_text("graph")
    (folder / "fingerprint.pb").write_text(identity)
    return model


def test_a_candidate_that_was_pushed_is_not_its_own_baseline(tmp_path: Path):
    serving = tmp_path / "serving"
    one, two = candidate(tmp_path, "one"), candidate(tmp_path, "two")
    assert find_baseline(str(serving), [one]) == ""
    (push(serving, "1") / "fingerprint.pb").write_text("one")
    assert find_baseline(str(serving), [one]) == ""
    assert find_baseline(str(serving), [two]) == "1"
    (push(serving, "2") / "fingerprint.pb").write_text("two")
    assert find_baseline(str(serving), [two]) == "1"
    # An older model that comes back is compared with the one that replaced it.
    assert find_baseline(str(serving), [one]) == "2"


def test_what_was_measured_of_the_versions_goes_with_the_baseline(tmp_path: Path):
    serving = tmp_path / "serving"
    for version, content in (("8", '{"examples": 7}'), ("9", "damaged"), ("12", None)):
        folder = push(serving, version) / "assets.extra"
        folder.mkdir()
        if content:
            (folder / "measured.json").write_text(content)
    baseline = find(serving, tmp_path / "baseline")
    measured = json.loads(baseline.get_string_custom_property("measured_versions"))
    assert measured == [{"examples": 7, "version": "8"}]
