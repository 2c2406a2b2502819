"""TF Serving's gRPC protocol: answers, codes and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
)

from tests.serving.server.conftest import Client, Server, Start, arrays, predict_request

X = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


@pytest.fixture(scope="module")
def server(start_server: Start, pushed: Path, tmp_path_factory: Any) -> Iterator[Server]:
    config = tmp_path_factory.mktemp("config") / "models.config"
    config.write_text(
        f"""model_config_list {{ config {{
            name: "toy" base_path: "{pushed}" model_platform: "tensorflow"
            model_version_policy {{ specific {{ versions: 1 versions: 3 }} }}
            version_labels {{ key: "stable" value: 1 }}
            version_labels {{ key: "canary" value: 3 }}
            version_labels {{ key: "gone" value: 2 }}
        }} }}"""
    )
    with start_server(None, f"--model_config_file={config}", "--max_message_bytes=1000000") as it:
        it.wait(lambda: it.client.states() == {1: "AVAILABLE", 3: "AVAILABLE"})
        yield it


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return server.client


def test_answers_with_the_resolved_model_spec(client: Client):
    response = client.stub.Predict(predict_request(x=X), timeout=30)
    outputs = arrays(response)
    assert sorted(outputs) == ["rows", "total", "y"]
    np.testing.assert_array_equal(outputs["y"], 2 * X + 3)
    np.testing.assert_array_equal(outputs["total"], [12, 20, 28])
    assert outputs["rows"].dtype == np.int32
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("toy", 3, "serving_default")


def test_picks_versions_by_number_and_by_label(client: Client):
    assert client.offset(version=1) == 1
    for label, offset in (("stable", 1), ("canary", 3)):
        request = predict_request(x=X)
        request.model_spec.version_label = label
        response = client.stub.Predict(request, timeout=30)
        assert arrays(response)["y"][0, 0] == 2 + offset
        assert response.model_spec.version.value == offset
        assert not response.model_spec.version_label


def test_computes_only_the_requested_outputs(client: Client):
    assert sorted(client.predict("", ("total",), x=X)) == ["total"]
    assert sorted(client.predict("", ("y", "total"), x=X)) == ["total", "y"]


@pytest.mark.parametrize("as_content", [True, False])
def test_reads_values_of_either_form(client: Client, as_content: bool):
    request = predict_request()
    tensor = request.inputs["x"]
    if as_content:
        tensor.CopyFrom(tf.make_tensor_proto(X))
        assert tensor.tensor_content
    else:
        tensor.dtype = tf.float32.as_datatype_enum
        for size in (3, 2):
            tensor.tensor_shape.dim.add().size = size
        tensor.float_val.extend([1, 2, 7])  # The last one stands for the rest
    expected = X if as_content else np.array([[1, 2], [7, 7], [7, 7]])
    outputs = arrays(client.stub.Predict(request, timeout=30))
    np.testing.assert_array_equal(outputs["y"], 2 * expected + 3)


def test_an_empty_batch_is_an_empty_answer(client: Client):
    assert client.predict(x=np.zeros([0, 2], np.float32))["y"].shape == (0, 2)


def spec(**fields: Any) -> Callable[[predict_pb2.PredictRequest], None]:
    def change(request: predict_pb2.PredictRequest) -> None:
        for name, value in fields.items():
            if name == "version":
                request.model_spec.version.value = value
            else:
                setattr(request.model_spec, name, value)

    return change


def inputs(**values: Any) -> Callable[[predict_pb2.PredictRequest], None]:
    def change(request: predict_pb2.PredictRequest) -> None:
        for name, value in values.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))

    return change


def rename(request: predict_pb2.PredictRequest) -> None:
    request.inputs["z"].CopyFrom(request.inputs.pop("x"))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda r: r.ClearField("model_spec"), "INVALID_ARGUMENT", "Missing ModelSpec"),
        (spec(name=""), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        (spec(name="no"), "NOT_FOUND", "Servable not found for request: Latest(no)"),
        (spec(version=2), "NOT_FOUND", "Servable not found for request: Specific(toy, 2)"),
        (
            spec(version_label="beta"),
            "INVALID_ARGUMENT",
            "Unrecognized servable version label: beta",
        ),
        # A label of a version that is not there: see --allow_version_labels_for_unavailable_models
        (
            spec(version_label="gone"),
            "INVALID_ARGUMENT",
            "Unrecognized servable version label: gone",
        ),
        (
            spec(signature_name="no"),
            "FAILED_PRECONDITION",
            'Serving signature key "no" not found.',
        ),
        (
            inputs(z=1),
            "INVALID_ARGUMENT",
            "input size does not match signature: 2!=1 len({x,z}) != len({x}). "
            "Sent extra: {z}. Missing but required: {}.",
        ),
        (
            rename,
            "INVALID_ARGUMENT",
            "input size does not match signature: 1!=1 len({z}) != len({x}). "
            "Sent extra: {z}. Missing but required: {x}.",
        ),
        (
            lambda r: r.inputs.clear(),
            "INVALID_ARGUMENT",
            "input size does not match signature: 0!=1 len({}) != len({x}). "
            "Sent extra: {}. Missing but required: {x}.",
        ),
        (
            inputs(x=[[1, 2]]),
            "INVALID_ARGUMENT",
            "Expects arg[0] to be float but int32 is provided (input 'x')",
        ),
        (
            inputs(x=np.zeros([1, 3], np.float32)),
            "INVALID_ARGUMENT",
            "input 'x' has the shape [1,3], but the signature takes [-1,2]",
        ),
        (
            inputs(x=np.float32(1)),
            "INVALID_ARGUMENT",
            "input 'x' has the shape [], but the signature takes [-1,2]",
        ),
        (
            lambda r: r.output_filter.append("no"),
            "INVALID_ARGUMENT",
            "output tensor alias not found in signature: no Outputs expected to be in the set "
            "{rows,total,y}.",
        ),
        (
            lambda r: r.output_filter.extend(["y", "y"]),
            "INVALID_ARGUMENT",
            "duplicate output tensor alias: y",
        ),
    ],
)
def test_refuses_as_tf_serving_does(client: Client, change: Any, code: str, message: str):
    request = predict_request(x=X)
    change(request)
    assert client.refusal(request) == (code, message)


def test_what_the_graph_refuses_keeps_its_code(client: Client):
    code, message = client.refusal(predict_request("root", x=np.float32([-1])))
    assert code == "INVALID_ARGUMENT"
    assert "x is negative" in message


def test_metadata(client: Client):
    signatures = client.signatures()
    assert sorted(signatures) == ["decode", "hold", "root", "serving_default", "work"]
    x = signatures["serving_default"].inputs["x"]
    assert (x.dtype, [dim.size for dim in x.tensor_shape.dim]) == (1, [-1, 2])
    request = get_model_metadata_pb2.GetModelMetadataRequest()
    request.model_spec.name = "toy"
    assert client.refusal(request, "GetModelMetadata") == (
        "INVALID_ARGUMENT",
        "GetModelMetadataRequest must specify at least one metadata_field",
    )
    request.metadata_field.append("weights")
    assert client.refusal(request, "GetModelMetadata") == (
        "INVALID_ARGUMENT",
        "Metadata field weights is not supported",
    )


def test_status(client: Client):
    assert client.states() == {1: "AVAILABLE", 3: "AVAILABLE"}
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "toy"
    request.model_spec.version.value = 3
    response = client.models.GetModelStatus(request, timeout=10)
    assert [v.version for v in response.model_version_status] == [3]
    for version, message in ((2, "Could not find version 2 of model toy"),):
        request.model_spec.version.value = version
        with pytest.raises(grpc.RpcError, match=message):
            client.models.GetModelStatus(request, timeout=10)
    request.model_spec.name = "no"
    request.model_spec.ClearField("version")
    with pytest.raises(grpc.RpcError, match="Could not find any versions of model no"):
        client.models.GetModelStatus(request, timeout=10)


def test_other_methods_are_unimplemented(client: Client):
    request = classification_pb2.ClassificationRequest()
    assert client.refusal(request, "Classify")[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize("service", ["", "tensorflow.serving.PredictionService", "ModelService"])
def test_health(client: Client, service: str):
    assert client.health(service) == "SERVING"


def test_reflection_lists_the_services(client: Client):
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    response = next(stub.ServerReflectionInfo(iter([request]), timeout=10))
    assert {service.name for service in response.list_services_response.service} == {
        "tensorflow.serving.PredictionService",
        "tensorflow.serving.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_a_message_that_is_too_large_is_refused(client: Client):
    code, _ = client.refusal(predict_request(x=np.zeros([200_000, 2], np.float32)))
    assert code == "RESOURCE_EXHAUSTED"
    assert client.predict(x=X)["y"].shape == (3, 2)


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        (1 << 40, 1, "8796093022208 bytes"),
        # Two megabytes of one value, or of none, are asked for with a few bytes.
        (1 << 18, 1, "that are allowed for 1 values, of which the last is repeated"),
        (1 << 18, 0, "that are allowed for 0 values, of which the last is repeated"),
    ],
)
def test_a_value_that_stands_for_too_many_is_refused(
    client: Client, rows: int, values: int, message: str
):
    request = predict_request()
    tensor = request.inputs["x"]
    tensor.dtype = tf.float32.as_datatype_enum
    for size in (rows, 2):
        tensor.tensor_shape.dim.add().size = size
    tensor.float_val.extend([1] * values)
    code, text = client.refusal(request)
    assert code == "INVALID_ARGUMENT"
    assert message in text
