"""python -m serving.versions on the layout that the pipeline pushes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serving import versions
from serving.server.config import read_models


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Versions 10, 20 and 30 beside what is no version: a push under way, and an empty folder."""
    for name in ("10", "20", "30", ".incoming-1a2b3c4d/40"):
        (tmp_path / "vit" / name).mkdir(parents=True)
        (tmp_path / "vit" / name / "saved_model.pb").touch()
    (tmp_path / "vit" / "50").mkdir()
    shipped = Path(versions.__file__).parent / "config" / "models.config"
    text = shipped.read_text().replace("/models/cifar100_vit", str(tmp_path / "vit"))
    (tmp_path / "models.config").write_text(text)
    return tmp_path


def run(layout: Path, *arguments: str) -> None:
    versions.main([str(layout / "models.config"), *arguments])


def state(layout: Path) -> tuple[list[int], dict[str, int]]:
    """What a server reads out of the file: versions of the specific policy, and the labels."""
    (model,) = read_models(layout / "models.config")
    return sorted(model.versions), dict(model.labels)


def test_pushed_versions_are_shown(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (layout / "models.config").read_text()
    run(layout)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["10", "not", "served"],
        ["20", "served"],
        ["30", "served"],
    ]
    assert (layout / "models.config").read_text() == before


def test_a_canary_is_promoted_and_rolled_back(layout: Path) -> None:
    run(layout, "label", "stable=20", "canary=latest")
    assert state(layout) == ([20, 30], {"stable": 20, "canary": 30})
    run(layout, "promote")
    assert state(layout) == ([20, 30], {"stable": 30, "canary": 30})
    run(layout, "rollback")
    assert state(layout) == ([20, 30], {"stable": 20})
    run(layout, "load")
    assert state(layout) == ([20], {"stable": 20})


def test_a_label_moves_only_to_what_is_loaded(
    layout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(layout, "label", "stable=20")
    before = (layout / "models.config").read_text()
    for arguments in (["label", "stable=10"], ["rollback"]):
        with pytest.raises(SystemExit, match="2"):
            run(layout, *arguments)
        assert "`load 10`" in capsys.readouterr().err
    assert (layout / "models.config").read_text() == before
    run(layout, "load", "10")
    assert state(layout) == ([10, 20], {"stable": 20})
    run(layout, "rollback")
    assert state(layout) == ([10, 20], {"stable": 10})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["label", "stable=40"], "40"),  # a push under way
        (["load", "50"], "10, 20, 30"),  # an empty folder
        (["load"], "nothing is labelled"),
        (["promote"], "there is no canary"),
        (["rollback"], "no version is stable"),
        (["label", "stable"], "LABEL=VERSION"),
        (["label", "st-able=20"], "LABEL=VERSION"),
        (["label", "stable=new"], "a version is a number"),
        (["--model", "other", "show"], "cifar100_vit"),
        (["--base_path", "/nowhere", "show"], "/nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_refused(
    layout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    before = (layout / "models.config").read_text()
    with pytest.raises(SystemExit, match="2"):
        run(layout, *arguments)
    assert named in capsys.readouterr().err
    assert (layout / "models.config").read_text() == before


def test_a_labelled_version_that_is_gone_is_seen(
    layout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(layout, "label", "stable=20", "canary=30")
    shutil.rmtree(layout / "vit" / "30")
    capsys.readouterr()
    run(layout)
    assert "30  missing on disk  canary" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run(layout, "load", "10")
    assert "version 30 is not on disk" in capsys.readouterr().err
    run(layout, "label", "canary=")
    assert state(layout) == ([20], {"stable": 20})
