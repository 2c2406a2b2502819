"""The exported model: three signatures, one answer, whole or not there."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import apache_beam as beam
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2

import dataset.images
from dataset.card import CARD_FILE, from_json
from serving import server_process
from serving.client import Client
from tests.support import patience
from tests.support.cards import SYNTHETIC_CARD, make_card
from tests.support.networks import build_model
from trainer import export, preprocessing
from trainer.images import decode_image
from trainer.preset import Preset, replace
from trainer.presets import PRESETS, get_preset

EXTRA = {"training.json": json.dumps({"history": [{"loss": 4.5}]})}
BATCHING = Path(__file__).resolve().parents[2] / "serving" / "config" / "batching.config"
SIGNATURES = ("serving_default", "serving_bytes", "serving_examples")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)


def analyze(folder: Path, images: np.ndarray, preprocessing_fn: Callable) -> tft.TFTransformOutput:
    metadata = tft.DatasetMetadata.from_feature_spec(
        {
            "image": tf.io.FixedLenFeature([], tf.string),
            "label": tf.io.FixedLenFeature([], tf.int64),
        }
    )
    rows = [{"image": image.tobytes(), "label": 0} for image in images]
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(folder / "tmp")):
        data = (pipeline | beam.Create(rows), metadata)
        graph = data | tft_beam.AnalyzeDataset(preprocessing_fn)
        _ = graph | tft_beam.WriteTransformFn(str(folder / "graph"))
    return tft.TFTransformOutput(str(folder / "graph"))


@pytest.fixture(scope="module")
def transform_output(
    images: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> tft.TFTransformOutput:
    folder = tmp_path_factory.mktemp("transform")
    return analyze(folder, images, preprocessing.preprocessing_fn)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return build_model(get_preset("tiny"), seed=0)


@pytest.fixture(scope="module")
def exported(
    model: keras.Model,
    transform_output: tft.TFTransformOutput,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    target = tmp_path_factory.mktemp("export") / "model"
    export.export_model(model, transform_output, SYNTHETIC_CARD, str(target), EXTRA)
    return target


@pytest.fixture(scope="module")
def loaded(exported: Path) -> tf.Module:
    return tf.saved_model.load(str(exported))


@pytest.fixture(scope="module")
def ask(loaded: tf.Module) -> Callable:
    """(name of a signature, its input) -> outputs as arrays."""

    def call(name: str, values: object) -> dict[str, np.ndarray]:
        dtype = tf.uint8 if name == "serving_default" else tf.string
        outputs = loaded.signatures[name](tf.constant(values, dtype))
        return {key: value.numpy() for key, value in outputs.items()}

    return call


def png(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def example(image: bytes) -> bytes:
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def as_inputs(images: np.ndarray) -> dict[str, object]:
    return {
        "serving_default": images,
        "serving_bytes": [png(image) for image in images],
        "serving_examples": [example(image.tobytes()) for image in images],
    }


def test_signatures_are_those_of_the_documentation(loaded: tf.Module):
    inputs = {
        "serving_default": ("images", tf.uint8, [None, 32, 32, 3]),
        "serving_bytes": ("image_bytes", tf.string, [None]),
        "serving_examples": ("examples", tf.string, [None]),
    }
    outputs = {
        "top_5_names": (tf.string, [None, 5]),
        "top_5_superclasses": (tf.string, [None, 5]),
        "top_5_ids": (tf.int32, [None, 5]),
        "top_5_probabilities": (tf.float32, [None, 5]),
        "probabilities": (tf.float32, [None, 100]),
    }
    assert sorted(loaded.signatures) == sorted(inputs)
    for name, signature in loaded.signatures.items():
        ((key, spec),) = signature.structured_input_signature[1].items()
        assert (key, spec.dtype, spec.shape.as_list()) == inputs[name]
        specs = {
            key: (spec.dtype, spec.shape.as_list())
            for key, spec in signature.structured_outputs.items()
        }
        assert specs == outputs


def test_answers_are_the_model_s(ask: Callable, model: keras.Model, images: np.ndarray):
    mean = images.mean(axis=(0, 1, 2))
    deviation = images.std(axis=(0, 1, 2))
    logits = model.predict((images - mean) / deviation, verbose=0).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    outputs = ask("serving_default", images)
    np.testing.assert_allclose(outputs["probabilities"], expected, rtol=1e-4)
    best = np.argsort(-outputs["probabilities"], axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(outputs["top_5_ids"], best)
    np.testing.assert_array_equal(
        outputs["top_5_probabilities"], np.take_along_axis(outputs["probabilities"], best, 1)
    )
    assert (np.diff(outputs["top_5_probabilities"]) <= 0).all()
    names = [[SYNTHETIC_CARD.classes[index] for index in row] for row in best]
    coarse = [[SYNTHETIC_CARD.superclass_of[index] for index in row] for row in best]
    assert [[name.decode() for name in row] for row in outputs["top_5_superclasses"]] == coarse
    assert [[name.decode() for name in row] for row in outputs["top_5_names"]] == names


@pytest.mark.parametrize("count", [1, 20, 150])
def test_three_signatures_agree(ask: Callable, images: np.ndarray, count: int):
    pixels = np.resize(images, (count, 32, 32, 3))
    answers = [ask(name, values) for name, values in as_inputs(pixels).items()]
    for answer in answers:
        assert len(answer["probabilities"]) == count
        np.testing.assert_array_equal(answer["top_5_names"], answers[0]["top_5_names"])
        np.testing.assert_array_equal(answer["top_5_ids"], answers[0]["top_5_ids"])
        np.testing.assert_allclose(
            answer["probabilities"], answers[0]["probabilities"], rtol=1e-6, atol=0
        )


def test_a_model_server_answers_the_same(
    exported: Path, ask: Callable, images: np.ndarray, tmp_path: Path
):
    """By whatever signature, from TensorFlow Serving where it is installed, else the embedded."""
    (tmp_path / "vit").mkdir()
    os.symlink(exported, tmp_path / "vit" / "1")
    settings = {"batching": BATCHING, "log": tmp_path / "log", "timeout": 90.0}
    with (
        server_process.serve(tmp_path / "vit", "vit", **settings) as server,
        Client(server.address, "vit") as client,
    ):
        assert sorted(client.metadata()[1]) == sorted(SIGNATURES)
        for name, values in as_inputs(images).items():
            key = {"serving_default": "images", "serving_bytes": "image_bytes"}.get(
                name, "examples"
            )
            served, expected = client.predict({key: values}, name), ask(name, values)
            assert served.keys() == expected.keys()
            for output in ("top_5_ids", "top_5_names", "top_5_superclasses"):
                np.testing.assert_array_equal(served[output], expected[output])
            for output in ("probabilities", "top_5_probabilities"):
                np.testing.assert_allclose(served[output], expected[output], rtol=1e-4)


@pytest.mark.parametrize("name", SIGNATURES)
def test_an_empty_batch_has_an_empty_answer(ask: Callable, name: str):
    outputs = ask(name, np.empty((0, 32, 32, 3)) if name == "serving_default" else [])
    assert {key: value.shape for key, value in outputs.items()} == {
        "top_5_names": (0, 5),
        "top_5_superclasses": (0, 5),
        "top_5_ids": (0, 5),
        "top_5_probabilities": (0, 5),
        "probabilities": (0, 100),
    }


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise, so that a filter without antialiasing gives something else."""
    generator = np.random.default_rng(height)
    return generator.integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (32, 33), (100, 75), (640, 480)])
def test_other_sizes_are_resized(ask: Callable, height: int, width: int):
    image = photo(height, width)
    # Which tests/trainer/test_images.py compares with what ingest and clients see.
    pixels = decode_image(tf.constant(png(image)), (32, 32))
    by_bytes = ask("serving_bytes", [png(image)])["probabilities"]
    by_pixels = ask("serving_default", pixels[None])["probabilities"]
    np.testing.assert_allclose(by_bytes, by_pixels, rtol=1e-6)
    np.testing.assert_allclose(pixels, dataset.images.resize(image, (32, 32)), atol=1)


def test_sizes_can_be_mixed_in_a_batch(ask: Callable, images: np.ndarray):
    contents = [png(photo(90, 10)), png(images[0]), png(photo(10, 90))]
    together = ask("serving_bytes", contents)["probabilities"]
    alone = [ask("serving_bytes", [content])["probabilities"][0] for content in contents]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_kinds_of_images(ask: Callable):
    colour, grey = photo(32, 32), photo(32, 32, 1)
    opacity = np.full((32, 32, 1), 128, np.uint8)
    smooth = Image.fromarray(photo(8, 8)).resize((32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # Lies on its side
    contents = [
        encoded(Image.fromarray(grey[..., 0]), "PNG"),
        png(np.concatenate([colour, opacity], axis=2)),
        encoded(Image.fromarray(colour).quantize(16), "PNG"),
        encoded(smooth, "JPEG"),
        encoded(smooth, "JPEG", exif=exif),
        encoded(smooth, "BMP"),
        encoded(smooth, "GIF"),
    ]
    by_bytes = ask("serving_bytes", contents)["probabilities"]
    pixels = np.stack([dataset.images.decode(content) for content in contents])
    by_pixels = ask("serving_default", pixels)["probabilities"]
    np.testing.assert_allclose(by_bytes, by_pixels, rtol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not an image", png(photo(32, 32))[:100]])
def test_bytes_that_are_no_image_are_an_error(ask: Callable, content: bytes):
    with pytest.raises(tf.errors.InvalidArgumentError):
        ask("serving_bytes", [content])


@pytest.mark.parametrize("size", [0, 1024, 3071, 6144])
def test_examples_of_another_length_are_an_error(ask: Callable, size: int):
    with pytest.raises(tf.errors.InvalidArgumentError):
        ask("serving_examples", [example(bytes(size))] * 3)


def test_extra_assets_are_whole(exported: Path):
    folder = exported / "assets.extra"
    texts = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert from_json(json.dumps(texts.pop(CARD_FILE)), "it") == SYNTHETIC_CARD
    assert texts == {name: json.loads(text) for name, text in EXTRA.items()}
    # And the weights to train on from; tests/trainer/test_warm_start.py reads them.
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*EXTRA, CARD_FILE, export.WEIGHTS_FILE]
    )
    assert os.listdir(exported.parent) == ["model"]


def test_serves_where_there_is_only_tensorflow(exported: Path, ask: Callable, images: np.ndarray):
    program = """if True:
        import json, sys
        import tensorflow as tf
        contents = [bytes.fromhex(line) for line in json.load(sys.stdin)]
        signatures = tf.saved_model.load(sys.argv[1]).signatures
        outputs = signatures["serving_bytes"](tf.constant(contents))
        ours = ("keras", "trainer", "tensorflow_transform", "tfx_bsl")
        print(json.dumps({
            "ids": outputs["top_5_ids"].numpy().tolist(),
            "imported": [name for name in ours if name in sys.modules],
        }))
    """
    contents = [png(image) for image in images]
    process = patience.run(
        [sys.executable, "-c", program, str(exported)],
        input=json.dumps([content.hex() for content in contents]),
        cwd=exported,
        cpu_seconds=120,
    )
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout.splitlines()[-1])
    assert answer["imported"] == []
    assert answer["ids"] == ask("serving_bytes", contents)["top_5_ids"].tolist()


def other_preprocessing_fn(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """As an earlier version of the code might have been: it centers, and does not scale."""
    outputs = preprocessing.preprocessing_fn(inputs)
    return {**outputs, "image": outputs["image"] * tf.sqrt(outputs["image_variance"][0])}


def test_refuses_a_transform_graph_of_other_code(
    tmp_path: Path, model: keras.Model, images: np.ndarray
):
    other = analyze(tmp_path, images, other_preprocessing_fn)
    with pytest.raises(
        export.ExportError, match=r"normalise differently \(by up to \d+\).*--no_cache"
    ):
        export.export_model(model, other, SYNTHETIC_CARD, str(tmp_path / "model"), {})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("count", [1, 99, 101])
def test_refuses_a_wrong_number_of_names(
    tmp_path: Path, model: keras.Model, transform_output: tft.TFTransformOutput, count: int
):
    names = [str(index) for index in range(count)]
    with pytest.raises(export.ExportError, match=f"^{count} class names for 100 logits"):
        card = make_card(names)
        export.export_model(model, transform_output, card, str(tmp_path / "model"), {})
    assert os.listdir(tmp_path) == []


# Full while the variables, the graph or the extra assets are written.
@pytest.fixture(params=[0.25, 0.75, 1.1])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path, exported: Path) -> Iterator[Path]:
    """A file system with that many times the size of the SavedModel."""
    files = [path for path in exported.rglob("*") if path.is_file()]
    size = int(request.param * sum(path.stat().st_size for path in files))
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing(
    small_disk: Path, model: keras.Model, transform_output: tft.TFTransformOutput
):
    target = small_disk / "model"
    extra = {**EXTRA, "large.json": "x" * 1_000_000}
    with pytest.raises(export.ExportError, match=rf"(?s)not be written to {target}: .*Free space"):
        export.export_model(model, transform_output, SYNTHETIC_CARD, str(target), extra)
    assert os.listdir(small_disk) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files end at 64 KB, as at the end of a disk; this needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, model: keras.Model, transform_output: tft.TFTransformOutput
):
    with pytest.raises(export.ExportError, match="could not be written to"):
        export.export_model(model, transform_output, SYNTHETIC_CARD, str(tmp_path / "model"), EXTRA)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, model: keras.Model, transform_output: tft.TFTransformOutput
):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(export.ExportError, match="could not be written to"):
        export.export_model(
            model, transform_output, SYNTHETIC_CARD, str(tmp_path / "file" / "model"), {}
        )
    assert os.listdir(tmp_path) == ["file"]


def test_what_an_interrupted_export_left_does_not_survive(
    tmp_path: Path, model: keras.Model, transform_output: tft.TFTransformOutput
):
    (tmp_path / "model.partial" / "assets.extra").mkdir(parents=True)
    (tmp_path / "model.partial" / "assets.extra" / "stale.json").write_text("{}")
    export.export_model(model, transform_output, SYNTHETIC_CARD, str(tmp_path / "model"), EXTRA)
    assert os.listdir(tmp_path) == ["model"]
    assert sorted(os.listdir(tmp_path / "model" / "assets.extra")) == sorted(
        [*EXTRA, CARD_FILE, export.WEIGHTS_FILE]
    )


AUGMENTED = replace(
    get_preset("compact"), random_rotation=0.02, random_zoom=0.2, head_dropout_rate=0.1
)


@pytest.mark.parametrize("preset", [*PRESETS.values(), AUGMENTED], ids=[*PRESETS, "augmented"])
def test_nothing_for_training_alone_is_served(
    preset: Preset, transform_output: tft.TFTransformOutput, tmp_path: Path
):
    network = build_model(replace(preset, transformer_layers=1), seed=0)
    assert any("seed" in variable.path for variable in network.variables)
    export.export_model(network, transform_output, SYNTHETIC_CARD, str(tmp_path / "model"), EXTRA)

    reader = tf.train.load_checkpoint(str(tmp_path / "model" / "variables" / "variables"))
    dtypes = {
        name: dtype
        for name, dtype in reader.get_variable_to_dtype_map().items()
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }
    assert dtypes and set(dtypes.values()) == {tf.float32}  # a generator's state is of integers
    saved = saved_model_pb2.SavedModel.FromString(
        (tmp_path / "model" / "saved_model.pb").read_bytes()
    )
    (graph,) = (meta.graph_def for meta in saved.meta_graphs)
    functions = [node for function in graph.library.function for node in function.node_def]
    nodes = [*graph.node, *functions]
    assert len(nodes) > 100
    of_training = re.compile("random|seed|dropout|augment|ImageProjective", re.IGNORECASE)
    assert not [node.name for node in nodes if of_training.search(f"{node.name} {node.op}")]
