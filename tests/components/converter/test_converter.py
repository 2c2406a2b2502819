"""Conversion of a small transformer by the real converters, run by the real interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from tfx import types
from tfx.types import standard_artifacts

from components.converter import conversion, formats, onnx_model, tflite
from components.converter.component import Converter
from components.converter.executor import Executor
from components.converter.saved_model import ConversionError, PixelsToProbabilities
from components.examples import ExamplesError
from tests.support.cards import make_card
from tests.support.examples import example, examples_artifact
from tests.support.networks import build_model
from trainer.network import inference
from trainer.preset import replace
from trainer.presets import PRESETS, get_preset

CLASSES = 5
NAMES = [f"class {label}" for label in range(CLASSES)]


def images(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise around a colour for each class; pixels and labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(number) % CLASSES
    colours = np.random.default_rng(0).integers(40, 216, (CLASSES, 1, 1, 3))
    noise = generator.normal(0, 25, (number, 32, 32, 3))
    return (colours[labels] + noise).clip(0, 255).astype(np.uint8), labels


class Served(tf.Module):
    """A network with the signature of our exports, and with names, which no other format takes."""

    def __init__(self, network: keras.Model, total: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.total = total
        self.names = tf.constant(NAMES)

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8, name="images")])
    def images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = self.network(tf.cast(images, tf.float32) / 64 - 2, training=False)
        probabilities = tf.nn.softmax(logits)
        top = tf.math.top_k(probabilities, 3)
        return {"probabilities": probabilities, "names": tf.gather(self.names, top.indices)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> types.Artifact:
    """Trainer's output: preset tiny, trained for some steps."""
    network = build_model(get_preset("tiny"), num_classes=CLASSES, seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.Adam(3e-3), loss=loss)
    pixels, labels = images(640, seed=1)
    network.fit(pixels / np.float32(64) - 2, labels, batch_size=32, verbose=0)
    artifact = standard_artifacts.Model()
    artifact.uri = str(tmp_path_factory.mktemp("model"))
    target = Path(artifact.uri) / "Format-Serving"
    served = Served(inference.for_inference(network))
    tf.saved_model.save(served, str(target), signatures={"serving_default": served.images})
    return artifact


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> types.Artifact:
    """ExampleGen's output: 50 images to quantize with, 130 to test on."""
    splits = {
        split: [
            example(image=image.tobytes(), label=int(label))
            for image, label in zip(*images(number, seed))
        ]
        for seed, (split, number) in enumerate({"train": 50, "test": 130}.items(), start=2)
    }
    folder = tmp_path_factory.mktemp("examples")
    return examples_artifact(folder, {**splits, "validation": []}, make_card(NAMES))


def convert(
    model: types.Artifact,
    examples: types.Artifact,
    output: Path,
    names: tuple[str, ...] = ("tflite", "onnx"),
    split: str = "test",
) -> dict[str, Any]:
    """Runs the executor as the component describes it; returns the report."""
    component = Converter(
        types.Channel(type=standard_artifacts.Model),
        types.Channel(type=standard_artifacts.Examples),
        formats=names,
        split=split,
        representative_split="train",
    )
    exports = standard_artifacts.Model()
    exports.uri = str(output)
    Executor().Do(
        {"model": [model], "examples": [examples]},
        {"exports": [exports]},
        component.exec_properties,
    )
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def exports(
    model: types.Artifact, examples: types.Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("output") / "exports"
    convert(model, examples, output)
    return output


@pytest.fixture(scope="module")
def expected(model: types.Artifact) -> np.ndarray:
    """The SavedModel's probabilities of seven images."""
    loaded = tf.saved_model.load(f"{model.uri}/Format-Serving")
    pixels, _ = images(7, seed=9)
    signature = loaded.signatures["serving_default"]
    return signature(images=tf.constant(pixels))["probabilities"].numpy()


def test_report(exports: Path):
    report = json.loads((exports / "report.json").read_text())
    assert report["images"] == 130
    # It has learned, or agreement would say nothing.
    assert report["top_1_accuracy"] > 0.9
    files = {file["name"]: file for file in report["files"]}
    assert list(files) == ["model.float16.tflite", "model.int8.tflite", "model.onnx"]
    for name, file in files.items():
        assert file["size"] == (exports / name).stat().st_size
        assert file["problem"] == ""
        assert 0.95 <= file["agreement"] <= 1
        assert abs(file["top_1_accuracy"] - report["top_1_accuracy"]) <= 0.05
        assert file["ms_per_image"] > 0
    assert files["model.onnx"]["agreement"] == 1
    assert files["model.onnx"]["largest_difference"] < 1e-5
    assert files["model.float16.tflite"]["largest_difference"] < 0.02
    assert files["model.int8.tflite"]["largest_difference"] < 0.3
    assert files["model.float16.tflite"]["size"] < 0.6 * files["model.onnx"]["size"]


def test_labels(exports: Path):
    assert (exports / "labels.txt").read_text() == "".join(f"{name}\n" for name in NAMES)
    properties = onnx.load(str(exports / "model.onnx")).metadata_props
    assert {entry.key: entry.value.split("\n") for entry in properties} == {"labels": NAMES}


@pytest.mark.parametrize(
    ("name", "tolerance"), [("model.float16.tflite", 0.02), ("model.int8.tflite", 0.3)]
)
def test_tflite_as_the_readme_calls_it(
    exports: Path, expected: np.ndarray, name: str, tolerance: float
):
    interpreter = Interpreter(str(exports / name))
    run = interpreter.get_signature_runner("serving_default")
    pixels, _ = images(7, seed=9)
    for number in (7, 1, 3):
        probabilities = run(images=pixels[:number])["probabilities"]
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, expected[:number], atol=tolerance)
    (given,), (returned,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert (given["dtype"], list(given["shape_signature"])) == (np.uint8, [-1, 32, 32, 3])
    assert (returned["dtype"], list(returned["shape_signature"])) == (np.float32, [-1, CLASSES])


def test_int8_has_the_weights_in_int8(exports: Path):
    interpreter = Interpreter(str(exports / "model.int8.tflite"))
    tensors = interpreter.get_tensor_details()
    matrices = [t for t in tensors if t["dtype"] == np.int8 and len(t["shape"]) == 2]
    # A head's hidden layer: 512 x 64.
    assert [64, 512] in [list(matrix["shape"]) for matrix in matrices]
    assert not [t for t in tensors if t["dtype"] == np.float32 and list(t["shape"]) == [64, 512]]


def test_onnx_as_the_readme_calls_it(exports: Path, expected: np.ndarray):
    session = onnxruntime.InferenceSession(exports / "model.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", 32, 32, 3],
    )
    assert (returned.type, returned.shape) == ("tensor(float)", ["batch", CLASSES])
    pixels, _ = images(7, seed=9)
    for number in (7, 1, 3):
        (probabilities,) = session.run(["probabilities"], {"images": pixels[:number]})
        np.testing.assert_allclose(probabilities, expected[:number], atol=1e-5)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_onnx_of_every_preset(preset: str, tmp_path: Path):
    small = replace(get_preset(preset), transformer_layers=1)
    network = build_model(small, num_classes=CLASSES, seed=0)
    served = Served(inference.for_inference(network))
    tf.saved_model.save(served, str(tmp_path), signatures={"serving_default": served.images})
    model = PixelsToProbabilities(str(tmp_path))
    pixels, _ = images(4, seed=5)
    actual = onnx_model.load(onnx_model.convert(model, NAMES))(pixels)
    np.testing.assert_allclose(actual, model(pixels), atol=1e-5)


def test_onnx_of_the_complementary_error_function(tmp_path: Path):
    class Complement(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8, name="images")])
        def images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            values = tf.cast(images, tf.float32)[:, :, 0, 0] / 32 - 4
            return {"probabilities": tf.math.erfc(values)}

    complement = Complement()
    tf.saved_model.save(
        complement, str(tmp_path), signatures={"serving_default": complement.images}
    )
    model = PixelsToProbabilities(str(tmp_path))
    pixels = np.arange(256, dtype=np.uint8).repeat(96).reshape(8, 32, 32, 3)
    expected = model(pixels)
    assert (expected.min(), expected.max()) == (pytest.approx(0, abs=1e-6), 2)
    actual = onnx_model.load(onnx_model.convert(model, NAMES))(pixels)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_file_that_does_not_agree_is_refused_and_the_others_are_kept(
    model: types.Artifact, examples: types.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    strict = formats.ExportedFile(formats.INT8.name, 1.01)
    monkeypatch.setattr(formats, "INT8", strict)
    report = convert(model, examples, tmp_path / "exports", ("tflite",))
    kept, refused = report["files"]
    assert refused["problem"].startswith("agrees with the SavedModel on ")
    assert refused["problem"].endswith("% of 130 test images, below the 101.0% that it must")
    assert kept["problem"] == ""
    made = sorted(path.name for path in (tmp_path / "exports").iterdir())
    assert made == ["labels.txt", "model.float16.tflite", "report.json"]


def test_no_number_is_no_answer():
    pixels, labels = images(10, seed=3)
    expected = np.eye(CLASSES, dtype=np.float32)[(labels + 1) % CLASSES]
    answered = expected.copy()
    answered[5:] = np.nan
    result = conversion.measure(
        formats.FLOAT16,
        b"content",
        lambda images: answered[: len(images)],
        conversion.Reference(pixels, labels, expected),
    )
    assert 0.5 <= result.agreement <= 0.6
    assert result.problem.startswith("agrees with the SavedModel on ")
    assert result.largest_difference == 1


def test_what_cannot_be_converted(tmp_path: Path, model: types.Artifact, examples: types.Artifact):
    class Unknown(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8, name="images")])
        def images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            flat = tf.reshape(tf.cast(images, tf.float32), [-1, 3072])
            return {"probabilities": tf.math.igamma(flat[:, :5] + 1.0, flat[:, 5:10])}

    unknown = Unknown()
    functions = {"serving_default": unknown.images}
    tf.saved_model.save(unknown, str(tmp_path / "unknown"), signatures=functions)
    converted = PixelsToProbabilities(str(tmp_path / "unknown"))
    with pytest.raises(ConversionError, match=r"^TFLite's converter failed: .*Igamma"):
        tflite.convert_float16(converted)
    with pytest.raises(ConversionError, match=r"^tf2onnx failed: .*Igamma"):
        onnx_model.convert(converted, NAMES)

    functions = {"other": unknown.images}
    tf.saved_model.save(unknown, str(tmp_path / "other"), signatures=functions)
    with pytest.raises(ConversionError, match="has no signature serving_default with the output"):
        PixelsToProbabilities(str(tmp_path / "other"))
    for content in (b"", b"nonsense"):
        with pytest.raises(ConversionError, match=r"^TFLite's interpreter cannot run it: "):
            tflite.load(content)
        with pytest.raises(ConversionError, match=r"^ONNX Runtime cannot run it: "):
            onnx_model.load(content)
    with pytest.raises(ExamplesError, match="have no split 'eval'"):
        convert(model, examples, tmp_path / "exports", split="eval")
    assert not (tmp_path / "exports").exists()


def test_formats():
    for text in ("", " , ", "onnx,,tflite"):
        with pytest.raises(ValueError, match=r"^a name is missing: there are tflite, onnx$"):
            formats.parse(text)
    assert formats.parse("onnx, tflite,onnx") == ("tflite", "onnx")
    with pytest.raises(ValueError, match=r"^'int8' is no format: there are tflite, onnx$"):
        formats.parse("tflite,int8")


def test_onnx_without_its_packages():
    program = (
        "import sys\n"
        "sys.path = [path for path in sys.path if 'site-packages' not in path]\n"
        "from components.converter import formats\n"
        "formats.check_installed(('tflite',))\n"
        "try:\n"
        "    formats.check_installed(('tflite', 'onnx'))\n"
        "except formats.MissingPackagesError as error:\n"
        "    print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == (
        "--export onnx needs onnx, onnxruntime, tf2onnx: install the package's extra with "
        "`pip install .[onnx]`, or run `make setup`.\n"
    )
