"""Versions come, break, switch and go while requests are answered."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from serving.server.config import PROMETHEUS_PATH
from tests.serving.server.conftest import Client, Start, free_port, predict_request

FLAGS = (
    "--file_system_poll_wait_seconds=0.1",
    "--max_num_load_retries=1",
    "--load_retry_interval_micros=100000",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "toy"
    path.mkdir()
    return path


class Load:
    """Asks without a pause for the block; every answer is expected to be one."""

    def __init__(self, client: Client):
        self._client = client
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: list[float] = []
        self.error: BaseException | None = None

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self.answers.append(self._client.offset())
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_switches_without_a_failed_request_and_frees_the_old(
    toys: list[Path], base: Path, start_server: Start
):
    os.symlink(toys[1], base / "1")
    with start_server(base, *FLAGS) as server, Load(server.client) as load:
        server.wait(lambda: len(load.answers) > 20)
        shutil.copytree(toys[2], base / "2.partial")
        (base / "2.partial").rename(base / "2")
        server.wait(lambda: server.client.states() == {1: "END", 2: "AVAILABLE"})
        seen = len(load.answers)
        server.wait(lambda: len(load.answers) > seen + 20)
    assert load.error is None
    assert load.answers == sorted(load.answers)  # Never back to the old one
    assert set(load.answers) == {1, 2}


def test_a_folder_that_is_copied_file_by_file_is_taken_whole(
    toys: list[Path], base: Path, start_server: Start
):
    os.symlink(toys[1], base / "1")
    files = sorted(path for path in toys[2].rglob("*") if path.is_file())
    # The order in which a reader that is in a hurry is misled most.
    files.sort(key=lambda path: path.name != "saved_model.pb")
    with start_server(base, *FLAGS) as server, Load(server.client) as load:
        for file in files:
            target = base / "2" / file.relative_to(toys[2])
            target.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes()
            for end in (len(content) // 2, len(content)):
                target.write_bytes(content[:end])
                time.sleep(0.15)
                assert server.client.states().get(2) in (None, "START")
        server.wait(lambda: server.client.states()[2] == "AVAILABLE")
        assert server.client.errors()[2] == ""
        server.wait(lambda: server.client.states()[1] == "END")
        assert server.client.offset() == 2
    assert load.error is None


DAMAGES = ["variables/variables.index", "variables/variables.data-00000-of-00001", "saved_model.pb"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_version_is_reported_and_taken_when_it_is_mended(
    damage: str, toys: list[Path], base: Path, start_server: Start
):
    os.symlink(toys[1], base / "1")
    shutil.copytree(toys[2], base / "2")
    content = (base / "2" / damage).read_bytes()
    (base / "2" / damage).write_bytes(content[: len(content) // 2])
    with start_server(base, *FLAGS, "--no_fallback", healthy=False) as server:
        # Without another version, the model is not there, which the health says, too.
        server.wait(lambda: server.client.states().get(2) == "END")
        assert server.client.health() == "NOT_SERVING"
        error = server.client.errors()[2]
        assert f"{base}/2 cannot be loaded" in error
        causes = ("its variables cannot be read", "variables.index", "Cannot parse file")
        assert any(cause in error for cause in causes)
        request = predict_request(x=np.zeros([1, 2], np.float32))
        assert server.client.refusal(request) == (
            "NOT_FOUND",
            "Servable not found for request: Latest(toy)",
        )
        (base / "2" / damage).write_bytes(content)
        server.wait(lambda: server.client.states()[2] == "AVAILABLE")
        assert server.client.errors()[2] == ""
        assert (server.client.health(), server.client.offset()) == ("SERVING", 2)


def test_falls_back_to_the_newest_version_that_loads(
    toys: list[Path], base: Path, start_server: Start, caplog: pytest.LogCaptureFixture
):
    for number in (1, 2):
        os.symlink(toys[number], base / str(number))
    for number in (3, 4):
        shutil.copytree(toys[3], base / str(number))
        (base / str(number) / "saved_model.pb").rename(base / str(number) / "away")
    monitoring = base.parent / "monitoring"
    monitoring.write_text("prometheus_config { enable: true }")
    port = free_port()
    flags = (f"--rest_api_port={port}", f"--monitoring_config_file={monitoring}")

    def fallbacks() -> list[str]:
        page = httpx.get(f"http://127.0.0.1:{port}{PROMETHEUS_PATH}", trust_env=False).text
        return [line for line in page.splitlines() if "embedded:fallback{" in line]

    with start_server(base, *FLAGS, *flags) as server:
        assert server.client.offset() == 2
        assert "model toy: falling back to version 2" in caplog.text
        server.wait(lambda: server.client.states() == {2: "AVAILABLE", 3: "END", 4: "END"})
        assert "in its place is served version 2" in server.client.errors()[4]
        assert fallbacks() == [':tensorflow:serving:embedded:fallback{model_name="toy"} 1.0']
        (base / "4" / "away").rename(base / "4" / "saved_model.pb")
        server.wait(lambda: server.client.states().get(2) == "END")
        assert server.client.states()[4] == "AVAILABLE"
        assert (server.client.offset(), server.client.errors()[4]) == (3, "")
        server.wait(lambda: not fallbacks())


def test_a_link_to_nowhere_does_not_hold_a_version_up(
    toys: list[Path], base: Path, start_server: Start
):
    shutil.copytree(toys[1], base / "1")
    (base / "1" / "notes.txt").symlink_to(base / "nowhere")
    with start_server(base, *FLAGS) as server:
        assert server.client.offset() == 1
        shutil.copytree(toys[2], base / "2")
        data = base / "2" / "variables" / "variables.data-00000-of-00001"
        data.unlink()
        data.symlink_to(base / "nowhere")
        server.wait(lambda: server.client.states().get(2) == "END")
        assert "variables.data-00000-of-00001" in server.client.errors()[2]


def test_a_swap_does_not_stop_the_threads_for_long(
    toys: list[Path], base: Path, start_server: Start
):
    """The time of the longest collection of garbage, against one that looks at everything."""
    longest, begin = 0.0, 0.0

    def watch(phase: str, _: object) -> None:
        nonlocal longest, begin
        if phase == "start":
            begin = time.perf_counter()
        else:
            longest = max(longest, time.perf_counter() - begin)

    os.symlink(toys[1], base / "1")
    with start_server(base, *FLAGS) as server:
        gc.callbacks.append(watch)
        try:
            for number in (2, 3, 4):
                os.symlink(toys[1], base / str(number))
                server.wait(lambda old=number - 1: server.client.states().get(old) == "END")
            during_swaps, longest = longest, 0.0
            gc.unfreeze()
            gc.collect()
        finally:
            gc.callbacks.remove(watch)
    assert during_swaps < longest / 3


def test_a_broken_version_does_not_take_the_place_of_a_good_one(
    toys: list[Path], base: Path, start_server: Start
):
    os.symlink(toys[1], base / "1")
    with start_server(base, *FLAGS) as server, Load(server.client) as load:
        (base / "5").mkdir()
        (base / "5" / "saved_model.pb").write_bytes(b"no model")
        server.wait(lambda: server.client.states().get(5) == "END")
        assert server.client.states()[1] == "AVAILABLE"
        os.symlink(toys[3], base / "6")
        server.wait(lambda: server.client.states() == {1: "END", 5: "END", 6: "AVAILABLE"})
    assert load.error is None
    assert set(load.answers) == {1, 3}


def test_a_version_that_is_deleted_goes_and_the_one_before_comes_back(
    toys: list[Path], base: Path, start_server: Start
):
    shutil.copytree(toys[1], base / "1")
    shutil.copytree(toys[2], base / "2")
    with start_server(base, *FLAGS) as server:
        with Load(server.client) as load:
            assert server.client.offset() == 2
            shutil.rmtree(base / "2")
            server.wait(lambda: server.client.states() == {1: "AVAILABLE", 2: "END"})
        assert load.error is None
        assert set(load.answers) == {1, 2}
        # The last one: TF Serving unloads it, too, and the model is gone until another one comes.
        shutil.rmtree(base / "1")
        server.wait(lambda: server.client.states()[1] == "END")
        assert server.client.health() == "NOT_SERVING"
        shutil.copytree(toys[3], base / "3")
        server.wait(lambda: server.client.health() == "SERVING")
        assert server.client.offset() == 3
        # Without its base path nothing is known of the versions: they stay.
        base.rename(base.with_name("away"))
        time.sleep(0.5)
        assert server.client.offset() == 3
        base.with_name("away").rename(base)
        # What was unloaded because it went can come again.
        shutil.copytree(toys[2], base / "4")
        server.wait(lambda: server.client.states().get(4) == "AVAILABLE")


def test_names_that_are_no_versions(
    toys: list[Path], base: Path, start_server: Start, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    for name in ("1.partial", "tmp", "-1", "٣", "9" * 30):
        shutil.copytree(toys[0], base / name)
    (base / "7").write_text("a file")
    os.symlink(toys[2], base / "2")
    with start_server(base, *FLAGS) as server:
        assert server.client.states() == {2: "AVAILABLE"}
        (base / "1.5").mkdir()
        server.wait(lambda: "'1.5'" in caplog.text)
        time.sleep(0.5)
    lines = [line for line in caplog.text.splitlines() if "not versions" in line]
    assert len(lines) == 2
    assert "'-1', '1.partial', '7', " in lines[0] and "'tmp', '\\u0663'" in lines[0]


def write_warmup(version: Path, *requests: Any) -> None:
    (version / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(version / "assets.extra/tf_serving_warmup_requests")) as writer:
        for request in requests:
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.CopyFrom(request)
            writer.write(log.SerializeToString())


def test_warm_up_is_replayed_before_the_switch(
    toys: list[Path], base: Path, start_server: Start, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    x = np.zeros([1, 2], np.float32)
    shutil.copytree(toys[1], base / "1")
    # The name is that of the model that was exported, under whatever name it is served.
    write_warmup(base / "1", predict_request(x=x, name="other"), predict_request("root", x=x[0]))
    with start_server(base, *FLAGS) as server:
        assert "model toy version 1: 2 warm-up requests" in caplog.text
        # A model that cannot answer its own warm-up requests is not let in.
        shutil.copytree(toys[2], base / "2.partial")
        write_warmup(base / "2.partial", predict_request("root", x=np.float32([-1])))
        (base / "2.partial").rename(base / "2")
        server.wait(lambda: server.client.states().get(2) == "END")
        assert "warm-up failed" in server.client.errors()[2]
        assert server.client.offset() == 1
    with start_server(base, *FLAGS, "--enable_model_warmup=false") as server:
        assert server.client.offset() == 2


def config_text(*models: str) -> str:
    return "model_config_list {" + "".join(f"config {{ {model} }}" for model in models) + "}"


def test_the_models_file_can_be_changed(
    toys: list[Path], base: Path, start_server: Start, tmp_path: Path
):
    for number in (1, 2, 3):
        os.symlink(toys[number], base / str(number))
    file = tmp_path / "models.config"

    def write(name: str, policy: str, labels: str = "") -> str:
        return (
            f'name: "{name}" base_path: "{base}" model_platform: "tensorflow" '
            f"model_version_policy {{ {policy} }} {labels}"
        )

    def label(name: str, version: int) -> str:
        return f'version_labels {{ key: "{name}" value: {version} }}'

    def ask(client: Client, name: str) -> float:
        request = predict_request(x=np.zeros([1, 2], np.float32))
        request.model_spec.version_label = name
        return float(client.stub.Predict(request, timeout=30).model_spec.version.value)

    only_one = write("toy", "specific { versions: 1 }", label("stable", 1))
    file.write_text(config_text(only_one))
    flags = (f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=0.1", *FLAGS)
    with start_server(None, *flags) as server:
        client = server.client
        assert (client.states(), ask(client, "stable")) == ({1: "AVAILABLE"}, 1)
        labels = label("stable", 1) + label("canary", 3)
        two = write("toy", "specific { versions: 1 versions: 3 }", labels)
        file.write_text(config_text(two, write("again", "latest { num_versions: 2 }")))
        server.wait(lambda: client.states() == {1: "AVAILABLE", 3: "AVAILABLE"})
        server.wait(lambda: client.states("again") == {2: "AVAILABLE", 3: "AVAILABLE"})
        assert (ask(client, "stable"), ask(client, "canary")) == (1, 3)
        file.write_text("model_config_list { config { nonsense } }")
        time.sleep(0.4)
        assert client.states("again") == {2: "AVAILABLE", 3: "AVAILABLE"}
        file.write_text(config_text(write("toy", "all {}", label("stable", 3))))
        server.wait(lambda: client.states("again") == {})
        server.wait(lambda: set(client.states().values()) == {"AVAILABLE"})
        assert (sorted(client.states()), ask(client, "stable")) == ([1, 2, 3], 3)
        with pytest.raises(grpc.RpcError, match="Unrecognized servable version label: canary"):
            ask(client, "canary")
