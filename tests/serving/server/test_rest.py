"""TF Serving's HTTP paths and the metrics, on a server that batches."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.server.conftest import Server, Start, free_port, predict_request


@pytest.fixture(scope="module")
def server(start_server: Start, pushed: Path, tmp_path_factory: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("config")
    (folder / "batching").write_text(
        "max_batch_size { value: 8 } batch_timeout_micros { value: 1 }"
    )
    (folder / "monitoring").write_text('prometheus_config { enable: true path: "/metrics" }')
    (folder / "models").write_text(
        f"""model_config_list {{ config {{
            name: "toy" base_path: "{pushed}" model_platform: "tensorflow"
            model_version_policy {{ all {{}} }} version_labels {{ key: "stable" value: 1 }} }} }}"""
    )
    port = free_port()
    with start_server(
        None,
        f"--rest_api_port={port}",
        f"--model_config_file={folder}/models",
        f"--monitoring_config_file={folder}/monitoring",
        "--enable_batching",
        f"--batching_parameters_file={folder}/batching",
        "--max_message_bytes=1000000",
        "--rest_api_enable_cors_support",
    ) as server:
        server.wait(lambda: server.client.states() == {1: "AVAILABLE", 3: "AVAILABLE"})
        server.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        yield server


Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def ask(server: Server) -> Ask:
    """(path below /v1/models/toy, JSON to send or None) -> (HTTP status, JSON)."""

    def call(path: str, body: Any = None, name: str = "toy") -> tuple[int, Any]:
        url = f"/v1/models/{name}{path}"
        if body is None:
            response = server.http.get(url)
        else:
            content = body if isinstance(body, bytes) else json.dumps(body)
            response = server.http.post(url, content=content)
        assert response.headers["content-type"] == "application/json"
        return response.status_code, response.json()

    return call


def test_rows(ask: Ask):
    expected = [{"rows": 2, "total": 12.0, "y": [5, 7]}, {"rows": 2, "total": 20.0, "y": [9, 11]}]
    assert ask(":predict", {"instances": [[1, 2], [3, 4]]}) == (200, {"predictions": expected})
    named = {"instances": [{"x": [1, 2]}, {"x": [3, 4]}]}
    assert ask(":predict", named) == (200, {"predictions": expected})


def test_columns(ask: Ask):
    expected = {"rows": [1], "total": [12.0], "y": [[5.0, 7.0]]}
    for inputs in ([[1, 2]], {"x": [[1, 2]]}):
        assert ask(":predict", {"inputs": inputs}) == (200, {"outputs": expected})


def test_a_single_output_has_no_name_and_floats_are_short(ask: Ask):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 20, 31)).save(buffer, "PNG")
    item = {"b64": base64.b64encode(buffer.getvalue()).decode()}
    mean = float(str(np.float32(61 / 3)))
    for instances in ([item], [{"image_bytes": item}]):
        body = {"signature_name": "decode", "instances": instances}
        assert ask(":predict", body) == (200, {"predictions": [mean]})
    assert ask(":predict", {"signature_name": "decode", "inputs": [item]})[1] == {"outputs": [mean]}


def test_versions_and_labels(ask: Ask):
    body = {"instances": [[0, 0]]}
    for path, offset in (("", 3), ("/versions/1", 1), ("/labels/stable", 1)):
        status, answer = ask(f"{path}:predict", body)
        assert (status, answer["predictions"][0]["y"]) == (200, [offset, offset])


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (":predict", b"", 400, "The document is empty"),
        (":predict", b"{", 400, "JSON Parse error"),
        (":predict", b"[" * 100_000, 400, "nested too deeply"),
        (":predict", b'{"instances": [[1' + b"0" * 5000 + b", 1]]}", 400, "JSON Parse error|type"),
        (":predict", [1], 400, "Is not object"),
        (":predict", {}, 400, "Missing 'inputs' or 'instances' key"),
        (":predict", {"inputs": 1, "instances": [1]}, 400, "only one of"),
        (":predict", {"instances": 1}, 400, "to be an list/array"),
        (":predict", {"instances": []}, 400, "No values in 'instances' array"),
        (":predict", {"instances": [[1, 2], [3]]}, 400, "unexpected size"),
        (":predict", {"instances": [["a", "b"]]}, 400, "is not of expected type: float"),
        (":predict", {"instances": [[True, 1]]}, 400, "is not of expected type: float"),
        # The most common mistake of all: encoded images for the signature that takes numbers.
        (
            ":predict",
            {"instances": [{"b64": "aGk="}]},
            400,
            'expected type: float; encoded bytes go with "signature_name": "',
        ),
        (":predict", {"instances": [[1, 2, 3]]}, 400, r"has the shape \[1,3\]"),
        (":predict", {"instances": [{"z": [1, 2]}]}, 400, "keys must be equal to: x"),
        (":predict", {"inputs": {"z": [[1, 2]]}}, 400, "Missing named input: x"),
        (":predict", {"signature_name": 1, "inputs": 1}, 400, "must be a string value"),
        (":predict", {"signature_name": "no", "inputs": 1}, 400, 'key "no" not found'),
        (":predict", {"signature_name": "work", "inputs": [1.5]}, 400, "expected type: int32"),
        (":predict", {"signature_name": "work", "inputs": [2**40]}, 400, "expected type: int32"),
        (":predict", {"signature_name": "decode", "inputs": [1]}, 400, "expected type: string"),
        (":predict", {"signature_name": "decode", "inputs": [{"b64": "?"}]}, 400, "base64 decode"),
        (":predict", {"signature_name": "decode", "inputs": ["text"]}, 400, "Unknown image"),
        (":predict", {"signature_name": "root", "inputs": [-1]}, 400, "x is negative"),
        (":predict", {"instances": [[0, 0]] * 9}, 400, "larger than maximum input batch size 8"),
        (":predict", b" " * 1_000_001, 413, "larger than 1000000 bytes"),
        ("/versions/2:predict", {"inputs": 1}, 404, r"Specific\(toy, 2\)"),
        ("/labels/no:predict", {"inputs": 1}, 400, "Unrecognized servable version label: no"),
        (f"/versions/{2**63}:predict", {"inputs": 1}, 400, "to numeric"),
        (":classify", {"examples": []}, 501, "classify is not supported"),
        (":train", {}, 400, "Malformed request: POST /v1/models/toy:train"),
        ("/versions/2", None, 404, "Could not find version 2 of model toy"),
    ],
)
def test_refusals(ask: Ask, path: str, body: Any, status: int, message: str):
    answer = ask(path, body)
    assert answer[0] == status
    assert list(answer[1]) == ["error"]
    assert re.search(message, answer[1]["error"])


def test_until_a_model_is_loaded_it_is_said_that_it_will_be(
    start_server: Start, toys: list[Path], tmp_path: Path
):
    shutil.copytree(toys[1], tmp_path / "toy" / "1")  # new, so that it may still be written to
    (tmp_path / "toy" / "1" / "saved_model.pb").touch()
    port = free_port()
    with start_server(tmp_path / "toy", f"--rest_api_port={port}", healthy=False) as server:
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        ready = http.get("/readyz")
        refused = http.post("/v1/models/toy:predict", json={"instances": [[1, 2]]})
        code, _ = server.client.refusal(predict_request())
        for response in (ready, refused):
            assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
            assert list(response.json()) == ["error"]
        assert code == "UNAVAILABLE"
        server.wait(lambda: server.client.health() == "SERVING")
        assert http.get("/readyz").status_code == 200
        assert http.post("/v1/models/toy:predict", json={"instances": [[1, 2]]}).status_code == 200


def test_status_and_metadata(ask: Ask):
    versions = [
        {"version": v, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        for v in ("3", "1")
    ]
    assert ask("") == (200, {"model_version_status": versions})
    assert ask("/versions/1") == (200, {"model_version_status": versions[1:]})
    assert ask("", name="no") == (404, {"error": "Could not find any versions of model no"})
    status, metadata = ask("/versions/1/metadata")
    assert status == 200
    assert metadata["model_spec"]["name"] == "toy"
    assert metadata["model_spec"]["version"] == "1"
    x = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]["x"]
    assert x["dtype"] == "DT_FLOAT"
    assert [dim["size"] for dim in x["tensor_shape"]["dim"]] == ["-1", "2"]


def test_pages_from_elsewhere_may_ask(server: Server):
    response = server.http.get("/v1/models/toy", headers={"Origin": "http://example.org"})
    assert response.headers["access-control-allow-origin"] == "*"


def test_metrics(server: Server, ask: Ask):
    def read() -> dict[str, float]:
        response = server.http.get("/metrics")
        assert response.status_code == 200
        return {
            " ".join([sample.name, *sorted(sample.labels.values())]): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    before = read()
    ask(":predict", {"instances": [[1, 2]]})
    ask(":predict", {"instances": [["a", 2]]})
    ask(":predict", {"instances": [[1, 2]]}, name="thought_up")
    server.client.predict(x=np.zeros([2, 2], np.float32))
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    serving = ":tensorflow:serving:"
    assert grown(f"{serving}request_count OK toy") == 2
    assert grown(f"{serving}request_count INVALID_ARGUMENT toy") == 1
    assert grown(f"{serving}request_count  NOT_FOUND") == 1
    assert not [name for name in after if "thought_up" in name]
    assert grown(f"{serving}request_latency_count Predict REST toy") == 1
    assert grown(f"{serving}request_latency_count GRPC Predict toy") == 1
    assert 0 < grown(f"{serving}request_latency_sum GRPC Predict toy") < 10_000_000  # microseconds
    assert grown(f"{serving}batching:processed_batch_size_count") == 2
    assert grown(f"{serving}batching:processed_batch_size_sum") == 3
    assert grown(f"{serving}batching_session:queuing_latency_count") == 2
    assert after[f"{serving}embedded:model_version_state 3 toy"] == 30
    assert after[f"{serving}embedded:waiting_rows"] == 0
    assert after[f"{serving}embedded:requests_in_progress"] == 0
