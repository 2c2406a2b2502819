"""vit-client against the embedded server, and against servers that misbehave."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from PIL import Image

from dataset import images
from pipeline.graph import BATCHING_FILE
from serving import client, server_process, tensors
from serving.client import Client
from serving.connection import ServerError, Tls
from serving.images import ServingError
from serving.protos import predict_pb2
from tests.serving.helpers import Classifier, grpc_server, pixels, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an embedded server with version 3 of the model `vit`."""
    folder = tmp_path_factory.mktemp("models")
    Classifier().save(folder / "vit" / "3")
    with server_process.serve(
        folder / "vit", "vit", batching=Path(BATCHING_FILE), log=folder / "log", timeout=120
    ) as running:
        yield running.address


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(pixels(5, seed=7)):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], server: str) -> Callable[..., list[str]]:
    """Arguments -> lines of the standard output; nothing may go to the standard error."""

    def call(*arguments: object) -> list[str]:
        client.main(["--server", server, "--model", "vit", *map(str, arguments)])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return call


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Arguments -> the one line of the standard error of a call that must exit with code 1."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            client.main([str(argument) for argument in arguments])
        assert caught.value.code == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line.removeprefix("error: ")

    return call


@pytest.mark.parametrize("signature", ["serving_bytes", "serving_default", "serving_examples"])
def test_json_lines_are_the_models_answers(
    run: Callable[..., list[str]], photos: Path, signature: str
):
    # In batches of two, and a file twice.
    lines = run("--json", "--signature", signature, "--batch_size", 2, photos, photos / "1.png")
    answers = [json.loads(line) for line in lines]
    names = [Path(answer["image"]).name for answer in answers]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "1.png"]
    odds = np.exp(pixels(5, seed=7).reshape(5, -1).astype(np.float64) @ weights())
    expected = odds / odds.sum(axis=1, keepdims=True)
    for answer, probabilities in zip(answers, [*expected, expected[1]]):
        best = np.argsort(-probabilities)[:5]
        assert [item["id"] for item in answer["classes"]] == best.tolist()
        assert [item["name"] for item in answer["classes"]] == [str(label) for label in best]
        np.testing.assert_allclose(
            [item["probability"] for item in answer["classes"]], probabilities[best], rtol=1e-4
        )


def test_a_table_for_people(run: Callable[..., list[str]], photos: Path):
    (line,) = run("--json", photos / "0.png")
    first, *rows = run(photos / "0.png")
    assert first == str(photos / "0.png")
    assert [" ".join(row.split()) for row in rows] == [
        f"{100 * item['probability']:.2f}% {item['name']} ({item['superclass']})"
        for item in json.loads(line)["classes"]
    ]


def test_status_and_metadata(run: Callable[..., list[str]]):
    assert run("--status") == ["version 3  AVAILABLE"]
    (status,) = run("--status", "--json", "--version", 3)
    assert json.loads(status) == {"version": 3, "state": "AVAILABLE", "error": ""}
    lines = run("--metadata")
    assert lines[:3] == [
        "version 3",
        "  serving_bytes",
        "    takes image_bytes: string [N]",
    ]
    assert "    takes images: uint8 [N, 32, 32, 3]" in lines
    (metadata,) = run("--metadata", "--json")
    signatures = json.loads(metadata)["signatures"]
    assert list(signatures) == ["serving_bytes", "serving_default", "serving_examples"]
    assert signatures["serving_default"]["outputs"]["top_5_ids"] == {
        "dtype": "int32",
        "shape": [None, 5],
    }


def test_the_python_api(server: str, photos: Path):
    with Client(server, "vit", version=3) as vit:
        outputs = vit.predict({"images": pixels(5, seed=7)})
        assert outputs["probabilities"].shape == (5, 10)
        assert outputs["probabilities"].dtype == np.float32
        answers = list(vit.classify([photos]))
        assert [answer["classes"][0]["id"] for answer in answers] == [
            int(row[0]) for row in outputs["top_5_ids"]
        ]
        with pytest.raises(ServingError, match=r"cannot be sent to a signature 'other': use "):
            list(vit.classify([photos], signature="other"))
        with pytest.raises(ServerError) as caught:
            vit.predict({"images": np.zeros([1, 2], np.uint8)})
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(ValueError, match="a tensor of complex128 cannot be sent"):
            vit.predict({"images": np.zeros([1], complex)})


def unreadable(folder: Path) -> dict[str, str]:
    """Makes files that are no images; names -> reasons."""
    jpeg = io.BytesIO()
    Image.fromarray(pixels(1, seed=8)[0]).save(jpeg, "JPEG")
    files = {
        "cut.jpg": (jpeg.getvalue()[:700], "is a truncated JPEG"),
        "empty.png": (b"", "is empty"),
        "page.jpg": (b"<html>", "is text"),
        "scan.tif": (b"II*\0", "is TIFF, which is not read (PNG, JPEG, GIF, BMP, WebP are)"),
        "cut.png": (b"\x89PNG\r\n\x1a\n cut short", "is a damaged or truncated PNG"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: reason for name, (_, reason) in files.items()}


@pytest.mark.parametrize("signature", ["serving_bytes", "serving_default", "serving_examples"])
def test_bad_files_are_listed_and_the_others_answered(
    capsys: pytest.CaptureFixture[str], server: str, photos: Path, tmp_path: Path, signature: str
):
    reasons = unreadable(tmp_path)
    for photo in photos.iterdir():
        shutil.copy(photo, tmp_path)
    arguments = ["--server", server, "--model", "vit", "--signature", signature]
    with pytest.raises(SystemExit) as caught:
        client.main([*arguments, "--batch_size", "3", str(tmp_path)])
    assert caught.value.code == 3
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line[:1] != " "] == [
        str(tmp_path / f"{number}.png") for number in range(5)
    ]
    assert err.splitlines() == [
        *(f"error: {tmp_path / name} {reasons[name]}" for name in sorted(reasons)),
        "error: 5 of 10 files could not be read as images.",
    ]
    with pytest.raises(SystemExit) as caught:
        client.main([*arguments, "--json", "--batch_size", "3", str(tmp_path)])
    assert caught.value.code == 3
    out, err = capsys.readouterr()
    assert err == "error: 5 of 10 files could not be read as images.\n"
    results = {Path(item["image"]).name: item for item in map(json.loads, out.splitlines())}
    assert list(results) == sorted(path.name for path in tmp_path.iterdir())
    assert {name: item["error"] for name, item in results.items() if "error" in item} == reasons
    assert sum(len(item.get("classes", ())) for item in results.values()) == 25


def test_files_that_do_not_exist_are_an_error(fail: Callable[..., str], server: str, photos: Path):
    missing = photos / "none.png"
    message = fail("--server", server, "--model", "vit", photos / "0.png", missing)
    assert message == f"{missing} does not exist."


def test_hidden_files_of_a_folder_are_left_out(run: Callable[..., list[str]], tmp_path: Path):
    image = Image.fromarray(pixels(1, seed=8)[0])
    image.save(tmp_path / "a.gif")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for name in (".b.png", "._c.png", ".cache/d.png", "__MACOSX/e.png"):
        image.save(tmp_path / name)
    (line,) = run("--json", tmp_path)
    assert json.loads(line)["image"] == str(tmp_path / "a.gif")


def test_large_photographs_are_sent_in_the_size_of_the_model(
    run: Callable[..., list[str]], tmp_path: Path
):
    """Upright, the middle of them, whatever they would take the server to decode."""
    picture = Image.fromarray(pixels(1, seed=8)[0]).resize((4000, 3000))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in {"a": {}, "b": {}, "c": {}, "d": {}, "e": {"exif": exif}}.items():
        picture.save(tmp_path / f"{name}.jpg", **options)
    results = [json.loads(line)["classes"] for line in run("--json", tmp_path)]
    expected = [
        images.resize(images.decode((tmp_path / name).read_bytes()), (32, 32))
        for name in ("a.jpg", "e.jpg")
    ]
    odds = np.exp(np.stack(expected).reshape(2, -1).astype(np.float64) @ weights())
    probabilities = -np.sort(-odds / odds.sum(axis=1, keepdims=True))[:, :5]
    for classes, row in zip(results, [0, 0, 0, 0, 1]):
        np.testing.assert_allclose(
            [item["probability"] for item in classes], probabilities[row], rtol=1e-4
        )
    assert not np.allclose(*probabilities, rtol=1e-2)


def test_images_are_resized_as_it_is_told(run: Callable[..., list[str]], tmp_path: Path):
    Image.fromarray(pixels(1, seed=8)[0]).resize((90, 40)).save(tmp_path / "a.png")
    stored = images.decode((tmp_path / "a.png").read_bytes())
    best = []
    for how in images.RESIZES:
        (line,) = run("--json", "--resize", how, tmp_path)
        flat = images.resize(stored, (32, 32), how).reshape(-1).astype(np.float64)
        odds = np.exp(flat @ weights())
        best.append(json.loads(line)["classes"][0]["probability"])
        assert best[-1] == pytest.approx(odds.max() / odds.sum(), rel=1e-4)
    assert len(set(best)) == 3


def test_a_reader_that_has_seen_enough(server: str, photos: Path):
    command = [sys.executable, "-m", "serving.client", "--server", server, "--model", "vit"]
    many = [str(photos)] * 400  # More than a pipe holds
    process = subprocess.Popen(
        [*command, *many], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == f"{photos / '0.png'}\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_unknown_model_version_and_label(fail: Callable[..., str], server: str, photos: Path):
    arguments = ("--server", server, photos / "0.png")
    assert "NOT_FOUND" in fail(*arguments, "--model", "other")
    assert "NOT_FOUND" in fail(*arguments, "--model", "vit", "--version", 4)
    assert "label" in fail(*arguments, "--model", "vit", "--label", "canary")


def test_no_server(fail: Callable[..., str], photos: Path):
    began = time.monotonic()
    message = fail("--server", "127.0.0.1:1", photos / "0.png")
    assert message.startswith("no model server answers at 127.0.0.1:1 (")
    assert message.endswith("correct the address. If it uses TLS, give --tls or --ca.")
    assert time.monotonic() - began < 15


def test_nothing_asked_for(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        client.main([])
    assert caught.value.code == 2
    assert "give images to classify, --status or --metadata" in capsys.readouterr().err


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(code: grpc.StatusCode):
    requests = []

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        requests.append(request)
        if len(requests) <= 2:
            context.abort(code, "busy")
        response = predict_pb2.PredictResponse()
        response.outputs["y"].CopyFrom(tensors.to_proto(np.float32([1.5])))
        return bytes(response.SerializeToString())

    # Larger than the buffer that gRPC keeps for retries unless it is told otherwise.
    with grpc_server(handle) as address, Client(address) as vit:
        assert vit.predict({"x": np.zeros(400_000, np.uint8)}) == {"y": np.float32([1.5])}
    assert len(requests) == 3
    assert len(set(requests)) == 1


def test_a_server_that_stays_overloaded_and_one_that_is_slow(
    fail: Callable[..., str], photos: Path
):
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        return b""

    with grpc_server(refuse) as address:
        message = fail("--server", address, photos / "0.png")
        assert message == f"{address} is overloaded, try again later: the queue is full."

    def wait(_: bytes, context: grpc.ServicerContext) -> bytes:
        time.sleep(1)
        return b""

    with grpc_server(wait) as address:
        message = fail("--server", address, "--timeout", 0.2, photos / "0.png")
        assert message == f"{address} has not answered within 0.2 s."


def test_tls(fail: Callable[..., str], tmp_path: Path):
    authority, other = trustme.CA(), trustme.CA()
    files: dict[str, Path] = {}
    certificates: dict[str, Any] = {
        "ca": authority.cert_pem,
        "other": other.cert_pem,
        "cert": (issued := authority.issue_cert("client")).cert_chain_pems[0],
        "key": issued.private_key_pem,
    }
    for name, pem in certificates.items():
        files[name] = tmp_path / f"{name}.pem"
        pem.write_to_path(files[name])
    own = authority.issue_cert("127.0.0.1")
    credentials = grpc.ssl_server_credentials(
        [(own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())],
        root_certificates=authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    with grpc_server(None, credentials) as address:
        arguments = ("--server", address, "--status")
        both = ("--cert", files["cert"], "--key", files["key"])
        # It is no model server: but that is what it says over TLS.
        assert "is no TF Serving" in fail(*arguments, "--ca", files["ca"], *both)
        for wrong in (("--ca", files["other"], *both), ("--tls",)):
            assert fail(*arguments, *wrong).startswith(f"no TLS connection to {address}: ")
        assert "--ca" in fail(*arguments)  # TLS is what it lacks
        message = fail(*arguments, "--ca", tmp_path / "none.pem")
        assert message == f"{tmp_path / 'none.pem'} cannot be read: No such file or directory."
        message = fail(*arguments, "--cert", files["cert"])
        assert message == "a client's certificate and its key go together: give both."
    with grpc_server(None) as address:
        message = fail("--server", address, "--status", "--tls")
        assert message.startswith(f"no TLS connection to {address}: ")


def test_a_certificate_is_an_api_argument(tmp_path: Path):
    with pytest.raises(ServingError, match="cannot be read"):
        Client("localhost:1", tls=Tls(ca=tmp_path / "none.pem"))
