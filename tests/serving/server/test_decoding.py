"""Images that the server decodes for a model of this pipeline, and what it lets other models do."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import predict_pb2

from dataset import images
from serving.server.errors import RequestError
from serving.server.images import ImageReader
from serving.server.servable import Servable
from tests.serving.helpers import Classifier, pixels
from tests.serving.server.conftest import Client, Start, arrays, predict_request
from tests.support.cards import make_card

MEGAPIXEL = 1_000_000


@pytest.fixture(scope="module")
def client(
    start_server: Start, toys: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """Of a server with the models `vit` and `toy`, which decodes images of up to a megapixel."""
    folder = tmp_path_factory.mktemp("models")
    Classifier().save(folder / "vit" / "1")
    for how in images.RESIZES:
        shutil.copytree(folder / "vit" / "1", folder / how / "1")
        (folder / how / "1" / "assets.extra").mkdir()
        card = folder / how / "1" / "assets.extra" / "dataset.json"
        card.write_text(make_card(["a"], resize=how).to_json())
    (folder / "toy").mkdir()
    (folder / "toy" / "1").symlink_to(toys[1])
    config = "".join(
        f'config {{ name: "{name}" base_path: "{folder / name}" model_platform: "tensorflow" }} '
        for name in ("vit", "toy", *images.RESIZES)
    )
    (folder / "models.config").write_text(f"model_config_list {{ {config} }}")
    (folder / "batching.config").write_text("max_batch_size { value: 128 }")
    flags = [
        "--enable_batching",
        f"--batching_parameters_file={folder / 'batching.config'}",
        f"--max_image_pixels={MEGAPIXEL}",
        f"--model_config_file={folder / 'models.config'}",
    ]
    with start_server(None, *flags) as server:
        yield server.client


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(pixels(1, seed=3)[0]).resize((width, height))


def with_scans(content: bytes, count: int) -> bytes:
    """Adds scans that refine nothing to a progressive JPEG."""
    scan = bytes.fromhex("ffda 0008 01 01 00 01 3f 00") + b"\x7f" * 3
    return content[:-2] + scan * count + content[-2:]


def bytes_request(contents: list[bytes], name: str = "vit") -> predict_pb2.PredictRequest:
    signature = "decode" if name == "toy" else "serving_bytes"
    return predict_request(signature, name=name, image_bytes=np.array(contents, np.object_))


def test_files_of_any_form_are_what_ingest_makes_of_them(client: Client):
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = [
        encode(photo(32, 32)),
        encode(photo(48, 64), "JPEG", exif=exif),
        encode(photo(48, 64), "JPEG", progressive=True)[:-2],
        encode(photo(32, 32), exif=exif),
        encode(photo(30, 300), "WEBP"),
        encode(photo(300, 30).convert("RGBA"), "GIF"),
        encode(photo(20, 20).convert("CMYK"), "JPEG"),
        encode(photo(33, 32), "BMP"),
    ]
    expected = np.stack([images.resize(images.decode(c), (32, 32)) for c in contents])
    by_pixels = client.predict("serving_default", name="vit", images=expected)
    by_bytes = arrays(client.stub.Predict(bytes_request(contents), timeout=30))
    np.testing.assert_allclose(by_bytes["probabilities"], by_pixels["probabilities"], rtol=1e-5)


@pytest.mark.parametrize("how", images.RESIZES)
def test_images_are_resized_as_the_model_s_card_says(client: Client, how: images.Resize):
    content = encode(photo(40, 90))
    expected = images.resize(images.decode(content), (32, 32), how)
    by_pixels = client.predict("serving_default", name=how, images=expected[None])
    by_bytes = arrays(client.stub.Predict(bytes_request([content], how), timeout=30))
    np.testing.assert_allclose(by_bytes["probabilities"], by_pixels["probabilities"], rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"some text", "is text"),
        (encode(photo(90, 90), "JPEG")[:900], "is a truncated JPEG"),
        (encode(photo(9, 9), "TIFF"), "is TIFF, which is not read (PNG, JPEG, GIF, BMP, WebP are)"),
        (encode(photo(1001, 1000)), "is too large: 1001000 pixels, more than 1000000"),
        (
            with_scans(encode(photo(9, 9), "JPEG", progressive=True), 990),
            "is a JPEG of 1000 scans, more than 64",
        ),
    ],
)
def test_a_bad_image_among_many_is_named_by_its_index(client: Client, content: bytes, reason: str):
    contents = [encode(photo(32, 32))] * 32
    contents[17] = content
    code, message = client.refusal(bytes_request(contents))
    assert (code, message) == ("INVALID_ARGUMENT", f"input 'image_bytes': image 17 {reason}")


def test_many_large_images_in_a_request_are_decoded_one_after_the_other(client: Client):
    content = encode(photo(1000, 1000))
    outputs = arrays(client.stub.Predict(bytes_request([content] * 5), timeout=60))
    assert outputs["probabilities"].shape == (5, 10)
    # The graph of another model would decode them all before it goes on.
    code, message = client.refusal(bytes_request([content] * 5, "toy"))
    assert code == "INVALID_ARGUMENT"
    assert "5000000 pixels together, more than the 4000000 that this server decodes" in message
    outputs = arrays(client.stub.Predict(bytes_request([content] * 4, "toy"), timeout=60))
    assert outputs["mean"].shape == (4,)


def test_scans_are_bounded_for_other_models_too(client: Client):
    content = encode(photo(1000, 1000), "JPEG", progressive=True)
    begin = time.monotonic()
    code, message = client.refusal(bytes_request([content, with_scans(content, 990)], "toy"))
    assert code == "INVALID_ARGUMENT"
    assert "image 1 is a JPEG of 1000 scans, more than 64" in message
    assert time.monotonic() - begin < 2
    arrays(client.stub.Predict(bytes_request([with_scans(content, 54)], "toy"), timeout=60))


def test_decoding_ends_when_nobody_waits_any_more():
    reader = ImageReader(MEGAPIXEL)
    contents = [encode(photo(1000, 1000))] * 500
    end = time.monotonic() + 0.3
    with pytest.raises(RequestError) as caught:
        reader.read("x", contents, (32, 32), "crop", lambda: end - time.monotonic())
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - end < 5  # One image, not 500
    calls = iter([1.0, 1.0])

    def gone() -> float:
        try:
            return next(calls)
        except StopIteration:
            raise RequestError(grpc.StatusCode.CANCELLED, "the client has gone") from None

    with pytest.raises(RequestError, match="the client has gone"):
        reader.read("x", contents, (32, 32), "crop", gone)
    # What was taken is free again, as is the turn.
    assert len(reader.read("x", contents[:5], (32, 32), "crop", lambda: 60.0)) == 5


def test_a_run_ends_when_nobody_waits_any_more(toys: list[Path]):
    servable = Servable("toy", 1, toys[1], ["serve"])
    begin = time.monotonic()
    with pytest.raises(RequestError) as caught:
        inputs = {"loops": np.array([50_000_000], np.int32)}
        servable.run(servable.signatures["work"], inputs, ["done"], 0.3)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - begin < 20
    time.sleep(0.1)
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.25  # It would use a core
    servable.close()


@pytest.mark.parametrize("garbage", [b"\xff\xff", b"\xff\xfe\x00\x80" * 500, b"text", b""])
def test_garbage_examples_are_the_clients_mistake(client: Client, garbage: bytes):
    contents = np.array([garbage, garbage], np.object_)
    request = predict_request("serving_examples", name="vit", examples=contents)
    code, message = client.refusal(request)
    assert code == "INVALID_ARGUMENT"
    assert "arse example" in message or "Feature: image" in message or "image" in message
    assert message.encode().decode() == message


def test_an_empty_batch_that_a_model_does_not_take(client: Client):
    empty = np.array([], np.object_)
    code, message = client.refusal(predict_request("hold", path=empty))
    assert code == "INVALID_ARGUMENT"
    assert message.startswith("the batch is empty, which this model does not take: ")
    for signature, name in (("serving_bytes", "image_bytes"), ("serving_examples", "examples")):
        request = predict_request(signature, name="vit", **{name: empty})
        assert arrays(client.stub.Predict(request, timeout=30))["probabilities"].shape == (0, 10)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([1] * 40, "40 dimensions"),
        ([0, 2**62], "is too large"),
        ([0, 2**40, 2**40, 3], "is too large"),
        ([21_800, 32, 32, 3], "for 1 values, of which the last is repeated"),
    ],
)
def test_shapes_that_no_array_can_have(client: Client, sizes: list[int], reason: str):
    request = predict_request("serving_default", name="vit", images=np.zeros(1, np.uint8))
    tensor = request.inputs["images"]
    tensor.Clear()
    tensor.dtype = types_pb2.DT_UINT8
    tensor.int_val.append(7)
    for size in sizes:
        tensor.tensor_shape.dim.add().size = size
    code, message = client.refusal(request)
    assert code == "INVALID_ARGUMENT" and reason in message


def test_a_few_repetitions_are_answered(client: Client):
    request = predict_request("serving_default", name="vit", images=np.zeros(1, np.uint8))
    tensor = request.inputs["images"]
    tensor.CopyFrom(tf.make_tensor_proto(7, tf.uint8, [64, 32, 32, 3]))
    assert tensor.ByteSize() < 50
    outputs = arrays(client.stub.Predict(request, timeout=30))
    assert outputs["probabilities"].shape == (64, 10)


@pytest.mark.parametrize("name", ["vit", "toy"])
def test_no_damaged_file_is_an_error_of_the_server(client: Client, name: str):
    generator = np.random.default_rng(5)
    originals = [
        encode(photo(24, 24), kind, **options)
        for kind, options in (
            ("PNG", {}),
            ("JPEG", {}),
            ("JPEG", {"progressive": True}),
            ("GIF", {}),
            ("BMP", {}),
            ("WEBP", {}),
        )
    ]
    codes = set()
    for number in range(300):
        content = bytearray(originals[number % len(originals)])
        for position in generator.integers(0, len(content), 1 + number % 9):
            content[position] = generator.integers(256)
        cut = bytes(content[: generator.integers(0, 2 * len(content))])
        try:
            client.stub.Predict(bytes_request([cut], name), timeout=30)
        except grpc.RpcError as error:
            codes.add(error.code().name)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert codes == {"INVALID_ARGUMENT"}
