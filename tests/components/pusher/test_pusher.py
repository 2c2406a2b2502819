import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tfx import types
from tfx import v1 as tfx
from tfx.types import standard_artifacts

from components.models import versions
from components.pusher.component import AtomicPusher
from components.pusher.executor import Executor, PushError, staging_folder
from tests.support.disk import small_disk

WEIGHTS = b"w" * 100_000
MEASURED = '{"accuracies": {"top_1_accuracy": 0.5}, "examples": 9, "data": "d", "version": ""}'
STAMPED = "stamped_model"  # TFX's name


def make_model(folder: Path, weights: bytes = WEIGHTS, blessed: bool = True) -> types.Artifact:
    """An InfraBlessing with a model's files where ServingValidator leaves them."""
    blessing = standard_artifacts.InfraBlessing()
    blessing.uri = str(folder)
    blessing.set_int_custom_property("blessed", int(blessed))
    blessing.set_int_custom_property("has_model", 1)
    export = folder / STAMPED
    (export / "variables").mkdir(parents=True)
    (export / "variables" / "variables.data").write_bytes(weights)
    (export / "assets.extra").mkdir()
    (export / "assets.extra" / "training.json").write_text("{}")
    (export / "saved_model.pb").write_bytes(b"graph")
    return blessing


def push(
    serving_dir: Path,
    model: types.Artifact,
    *,
    blessed: bool,
    output: Path,
    exports: types.Artifact | None = None,
    compared_with: str | None = None,
) -> types.Artifact:
    """Runs the executor with the component's own properties.

    With `compared_with`, the blessing has what Evaluator writes into it.
    """
    component = AtomicPusher(
        infra_blessing=tfx.dsl.Channel(type=standard_artifacts.InfraBlessing),
        model_blessing=tfx.dsl.Channel(type=standard_artifacts.ModelBlessing),
        push_destination=tfx.proto.PushDestination(
            filesystem=tfx.proto.PushDestination.Filesystem(base_directory=str(serving_dir))
        ),
        exports=tfx.dsl.Channel(type=standard_artifacts.Model) if exports else None,
    )
    blessing = standard_artifacts.ModelBlessing()
    blessing.uri = str(output.with_name("blessing"))
    blessing.set_int_custom_property("blessed", int(blessed))
    if compared_with is not None:
        blessing.set_string_custom_property("compared_with", compared_with)
        blessing.set_string_custom_property("measured", MEASURED)
    pushed = standard_artifacts.PushedModel()
    pushed.uri = str(output)
    Executor().Do(
        {
            "infra_blessing": [model],
            "model_blessing": [blessing],
            **({"exports": [exports]} if exports else {}),
        },
        {"pushed_model": [pushed]},
        component.exec_properties,
    )
    return pushed


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("by_evaluator", "by_serving_validator"), [(False, True), (True, False), (False, False)]
)
def test_model_that_is_not_blessed_twice_is_not_pushed(
    tmp_path: Path, by_evaluator: bool, by_serving_validator: bool
):
    model = make_model(tmp_path / "model", blessed=by_serving_validator)
    pushed = push(tmp_path / "serving", model, blessed=by_evaluator, output=tmp_path / "pushed")
    assert not (tmp_path / "serving").exists()
    assert pushed.get_int_custom_property("pushed") == 0
    assert not pushed.has_custom_property("pushed_destination")


@pytest.mark.parametrize("missing", ["model_blessing", "infra_blessing"])
def test_a_missing_blessing_is_no_blessing(missing: str):
    artifacts = {
        "model_blessing": [standard_artifacts.ModelBlessing()],
        "infra_blessing": [standard_artifacts.InfraBlessing()],
    }
    for (artifact,) in artifacts.values():
        artifact.set_int_custom_property("blessed", 1)
    assert Executor().CheckBlessing(artifacts)
    assert not Executor().CheckBlessing({**artifacts, missing: []})


def test_blessed_model_becomes_a_whole_version(tmp_path: Path):
    model = make_model(tmp_path / "model")
    before = int(time.time())
    pushed = push(tmp_path / "serving", model, blessed=True, output=tmp_path / "pushed")
    (version,) = os.listdir(tmp_path / "serving")
    assert before <= int(version) <= time.time()
    assert tree(tmp_path / "serving" / version) == tree(tmp_path / "model" / STAMPED)
    assert pushed.get_int_custom_property("pushed") == 1
    assert pushed.get_string_custom_property("pushed_version") == version
    destination = pushed.get_string_custom_property("pushed_destination")
    assert destination == str(tmp_path / "serving" / version)


def test_second_push_within_a_second_becomes_the_next_version(tmp_path: Path):
    first = make_model(tmp_path / "first")
    second = make_model(tmp_path / "second", b"other weights")
    # An hour ahead, as after a clock was set back: model servers serve the largest version.
    ahead = int(time.time()) + 3600
    push(tmp_path / "serving", first, blessed=True, output=tmp_path / "pushed1")
    (version,) = os.listdir(tmp_path / "serving")
    (tmp_path / "serving" / version).rename(tmp_path / "serving" / str(ahead))
    pushed = push(tmp_path / "serving", second, blessed=True, output=tmp_path / "pushed2")
    assert sorted(os.listdir(tmp_path / "serving")) == [str(ahead), str(ahead + 1)]
    assert pushed.get_string_custom_property("pushed_version") == str(ahead + 1)
    assert pushed.get_string_custom_property("pushed_destination").endswith(f"/{ahead + 1}")
    weights = tmp_path / "serving" / str(ahead + 1) / "variables" / "variables.data"
    assert weights.read_bytes() == b"other weights"


def identify(model: types.Artifact, identity: bytes, warmup: bytes) -> types.Artifact:
    """Adds what TensorFlow and ServingValidator tell models apart by."""
    (graph,) = Path(model.uri).rglob("saved_model.pb")
    (graph.parent / "fingerprint.pb").write_bytes(identity)
    (graph.parent / "assets.extra" / "tf_serving_warmup_requests").write_bytes(warmup)
    return model


def test_model_that_is_served_already_is_not_pushed_again(tmp_path: Path):
    model = identify(make_model(tmp_path / "model"), b"first", b"requests")
    warmed = identify(make_model(tmp_path / "warmed"), b"first", b"other requests")
    other = identify(make_model(tmp_path / "other"), b"second", b"requests")
    serving = tmp_path / "serving"

    def pushed_version(model: types.Artifact, name: str) -> str:
        pushed = push(serving, model, blessed=True, output=tmp_path / name)
        version = pushed.get_string_custom_property("pushed_version")
        destination = pushed.get_string_custom_property("pushed_destination")
        assert destination == str(serving / version)
        return version

    first = pushed_version(model, "pushed1")
    assert pushed_version(model, "pushed2") == first
    assert os.listdir(serving) == [first]
    # Anything else is pushed, and the same again when something else was served meanwhile.
    versions_in_turn = [first]
    for number, candidate in enumerate((warmed, other, model), start=3):
        versions_in_turn.append(pushed_version(candidate, f"pushed{number}"))
    assert versions(str(serving)) == versions_in_turn
    assert len(set(versions_in_turn)) == 4


def make_exports(folder: Path, report: bytes) -> types.Artifact:
    """Converter's output."""
    exports = standard_artifacts.Model()
    exports.uri = str(folder)
    folder.mkdir()
    (folder / "report.json").write_bytes(report)
    (folder / "model.onnx").write_bytes(b"onnx")
    return exports


def test_exports_are_pushed_in_the_version_and_only_if_it_is_blessed(tmp_path: Path):
    model = make_model(tmp_path / "model")
    exports = make_exports(tmp_path / "exports", b"{}")
    serving = tmp_path / "serving"
    push(serving, model, blessed=False, output=tmp_path / "pushed1", exports=exports)
    assert not serving.exists()
    push(serving, model, blessed=True, output=tmp_path / "pushed2", exports=exports)
    (version,) = os.listdir(serving)
    assert tree(serving / version) == {
        **tree(tmp_path / "model" / STAMPED),
        "assets.extra/exports/model.onnx": b"onnx",
        "assets.extra/exports/report.json": b"{}",
    }


def test_the_same_model_with_other_exports_is_another_version(tmp_path: Path):
    model = identify(make_model(tmp_path / "model"), b"first", b"requests")
    exports = make_exports(tmp_path / "exports", b"{}")
    others = make_exports(tmp_path / "others", b"[]")
    serving = tmp_path / "serving"
    for number, (made, expected) in enumerate(
        [(None, 1), (exports, 2), (exports, 2), (others, 3), (None, 4)]
    ):
        push(serving, model, blessed=True, output=tmp_path / f"pushed{number}", exports=made)
        assert len(os.listdir(serving)) == expected


def test_left_over_of_a_killed_push_is_cleared(tmp_path: Path):
    staging = staging_folder(str(tmp_path / "serving"), str(tmp_path / "pushed"))
    half = Path(staging) / "1700000000" / "variables"
    half.mkdir(parents=True)
    (half / "variables.data").write_bytes(b"half")
    model = make_model(tmp_path / "model")
    push(tmp_path / "serving", model, blessed=True, output=tmp_path / "pushed")
    (version,) = os.listdir(tmp_path / "serving")
    assert [version] == versions(str(tmp_path / "serving"))
    assert tree(tmp_path / "serving" / version) == tree(tmp_path / "model" / STAMPED)


def test_full_disk_leaves_the_version_before_and_nothing_else(tmp_path: Path):
    with small_disk(tmp_path / "disk", "300k") as disk:
        serving = disk / "serving"
        first = make_model(tmp_path / "first")
        push(serving, first, blessed=True, output=tmp_path / "pushed1")
        earlier = tree(serving)
        large = make_model(tmp_path / "large", b"w" * 1_000_000)
        with pytest.raises(PushError) as raised:
            push(serving, large, blessed=True, output=tmp_path / "pushed2")
        assert tree(serving) == earlier
        assert len(os.listdir(serving)) == 1
        # The space is free again.
        push(serving, make_model(tmp_path / "third"), blessed=True, output=tmp_path / "pushed3")
        assert len(os.listdir(serving)) == 2
    message = str(raised.value)
    assert message.startswith(f"the model could not be pushed to {serving}: ")
    assert "No space left on device" in message
    assert message.endswith("Free space on that disk or make the folder writable, and run again.")


def test_destination_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    model = make_model(tmp_path / "model")
    with pytest.raises(PushError, match=r"could not be pushed to .*/file/serving: "):
        push(tmp_path / "file" / "serving", model, blessed=True, output=tmp_path / "pushed")


def test_model_is_not_pushed_beside_one_that_it_was_not_compared_with(tmp_path: Path):
    """Two pipelines have found no baseline; the other one was faster."""
    serving = tmp_path / "serving"
    other = identify(make_model(tmp_path / "other"), b"other", b"requests")
    push(serving, other, blessed=True, output=tmp_path / "pushed1", compared_with="")
    (version,) = os.listdir(serving)
    before = tree(serving)
    model = identify(make_model(tmp_path / "model"), b"own", b"requests")
    with pytest.raises(PushError, match=f"the newest is now {version}, of .* same command again"):
        push(serving, model, blessed=True, output=tmp_path / "pushed2", compared_with="")
    assert tree(serving) == before
    # Compared with it, it is pushed, and its own version does not stand in the way of a retry.
    for output in ("pushed3", "pushed4"):
        push(serving, model, blessed=True, output=tmp_path / output, compared_with=version)
    assert len(os.listdir(serving)) == 2


def test_version_keeps_what_was_measured_of_it(tmp_path: Path):
    model = make_model(tmp_path / "model")
    push(tmp_path / "serving", model, blessed=True, output=tmp_path / "pushed", compared_with="")
    (version,) = os.listdir(tmp_path / "serving")
    folder = tmp_path / "serving" / version
    assert (folder / "assets.extra" / "measured.json").read_text() == MEASURED


def test_two_pushes_at_the_same_time_are_one_after_the_other(tmp_path: Path):
    serving = tmp_path / "serving"
    models = [
        identify(make_model(tmp_path / f"model{n}"), bytes([n]), b"requests") for n in range(8)
    ]

    def try_to_push(number: int) -> bool:
        try:
            output = tmp_path / f"pipeline{number}" / "pushed"
            push(serving, models[number], blessed=True, output=output, compared_with="")
        except PushError as error:
            assert "has changed since" in str(error)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(try_to_push, range(8))) == [False] * 7 + [True]
    assert len(os.listdir(serving)) == 1
