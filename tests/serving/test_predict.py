"""vit-predict on a model as the pipeline exports it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from PIL import Image

from dataset import images
from dataset.synthetic import LABEL_NAMES
from serving import predict
from tests.support.cards import SYNTHETIC_CARD
from tests.support.networks import build_model
from trainer import export, preprocessing
from trainer.presets import get_preset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TF Serving model base path with version 9."""
    work = tmp_path_factory.mktemp("model")
    metadata = tft.DatasetMetadata.from_feature_spec(
        {
            "image": tf.io.FixedLenFeature([], tf.string),
            "label": tf.io.FixedLenFeature([], tf.int64),
        }
    )
    rows = [{"image": os.urandom(3072), "label": 0} for _ in range(10)]
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(work / "tmp")):
        graph = (pipeline | beam.Create(rows), metadata) | tft_beam.AnalyzeDataset(
            preprocessing.preprocessing_fn
        )
        _ = graph | tft_beam.WriteTransformFn(str(work / "transform"))
    model = build_model(get_preset("tiny"), seed=0)
    transform_output = tft.TFTransformOutput(str(work / "transform"))
    (work / "vit").mkdir()
    export.export_model(model, transform_output, SYNTHETIC_CARD, str(work / "vit" / "9"), {})
    return work / "vit"


def image(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable:
    """Arguments -> lines of the standard output; nothing may go to the standard error."""

    def call(*arguments: object) -> list[str]:
        predict.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return call


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Callable:
    """Arguments -> the one line of the standard error of a call that must exit with code 1."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            predict.main([str(argument) for argument in arguments])
        assert caught.value.code == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return line

    return call


def test_json_lines(run: Callable, model_dir: Path, tmp_path: Path):
    path = image(tmp_path / "a.png", (40, 30))
    (line,) = run("--model", model_dir, "--json", path)
    result = json.loads(line)
    assert result["image"] == str(path)
    signature = tf.saved_model.load(str(model_dir / "9")).signatures["serving_default"]
    pixels = images.resize(images.decode(path.read_bytes()), (32, 32))
    outputs = signature(tf.constant(pixels[None]))
    assert [item["id"] for item in result["classes"]] == outputs["top_5_ids"][0].numpy().tolist()
    for item, probability in zip(result["classes"], outputs["top_5_probabilities"][0].numpy()):
        assert item["name"] == LABEL_NAMES.fine[item["id"]]
        assert item["superclass"] == LABEL_NAMES.coarse[item["id"] // 5]
        assert item["probability"] == pytest.approx(float(probability), rel=1e-5)


def test_table(run: Callable, model_dir: Path, tmp_path: Path):
    path = image(tmp_path / "a.png")
    (line,) = run("--model", model_dir, "--json", path)
    first, *rows = run("--model", model_dir, path)
    assert first == str(path)
    expected = [
        f"{100 * item['probability']:.2f}% {item['name']} ({item['superclass']})"
        for item in json.loads(line)["classes"]
    ]
    assert [" ".join(row.split()) for row in rows] == expected
    assert all(re.match(r"  [ \d]{2}\d\.\d\d%  \w", row) for row in rows)  # right-aligned


def test_files_and_folders_in_any_mixture(run: Callable, model_dir: Path, tmp_path: Path):
    expected = [
        image(tmp_path / "single.bmp.png"),
        image(tmp_path / "folder" / "a.JPG", (5, 60)),
        image(tmp_path / "folder" / "b.png"),
        image(tmp_path / "folder" / "deeper" / "c.jpeg", (300, 200)),
    ]
    (tmp_path / "folder" / "notes.txt").write_text("not an image")
    (tmp_path / "folder" / "album.png").mkdir()
    lines = run("--model", model_dir, "--json", expected[0], tmp_path / "folder")
    assert [json.loads(line)["image"] for line in lines] == [str(path) for path in expected]


def test_more_images_than_a_batch(model_dir: Path, tmp_path: Path):
    one, other = image(tmp_path / "one.png"), image(tmp_path / "other.png")
    results = list(predict.classify(model_dir, [one] * 64 + [other] * 2))
    assert [result["image"] for result in results] == [str(one)] * 64 + [str(other)] * 2
    assert results[0]["classes"] != results[64]["classes"]
    # The same image in another place of the batch: rounded otherwise at most.
    for first, second in zip(results[64]["classes"], results[65]["classes"], strict=True):
        assert first["id"] == second["id"]
        assert first["probability"] == pytest.approx(second["probability"], abs=1e-6)


def test_a_kind_by_contents_not_by_name(run: Callable, model_dir: Path, tmp_path: Path):
    path = image(tmp_path / "a.png").rename(tmp_path / "photo")
    assert len(run("--model", model_dir, path)) == 6


def test_images_are_resized_as_the_model_s_card_says(
    run: Callable, model_dir: Path, tmp_path: Path
):
    path = image(tmp_path / "a.png", (40, 90))
    version = tmp_path / "vit" / "1"
    shutil.copytree(model_dir / "9", version)
    card = version / "assets.extra" / "dataset.json"
    probabilities = []
    for how in images.RESIZES:
        card.write_text(json.dumps({**json.loads(card.read_text()), "resize": how}))
        (line,) = run("--model", version, "--json", path)
        probabilities.append(json.loads(line)["classes"][0]["probability"])
        signature = tf.saved_model.load(str(version)).signatures["serving_default"]
        pixels = images.resize(images.decode(path.read_bytes()), (32, 32), how)
        expected = signature(tf.constant(pixels[None]))["top_5_probabilities"][0, 0]
        assert probabilities[-1] == pytest.approx(float(expected), rel=1e-5)
    assert len(set(probabilities)) == 3


def test_newest_version_by_number(model_dir: Path, tmp_path: Path):
    for version in ("9", "10", "backup", "11"):
        (tmp_path / version).mkdir()
        if version != "11":  # still being copied
            shutil.copy(model_dir / "9" / "saved_model.pb", tmp_path / version)
    assert predict.find_version(tmp_path) == tmp_path / "10"
    assert predict.find_version(tmp_path / "9") == tmp_path / "9"


def test_no_such_file(fail: Callable, model_dir: Path, tmp_path: Path):
    line = fail("--model", model_dir, image(tmp_path / "a.png"), tmp_path / "b.png")
    assert line == f"error: {tmp_path / 'b.png'} does not exist."


def test_a_folder_without_images(fail: Callable, model_dir: Path, tmp_path: Path):
    assert "has no files of .png, .jpg, " in fail("--model", model_dir, tmp_path)


def test_bad_files_are_listed_and_the_others_answered(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
):
    contents = {"a": b"", "b": b"plain text", "d": b"\x89PNG\r\n\x1a\n cut short"}
    for name, content in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    good = image(tmp_path / "c.png")
    with pytest.raises(SystemExit) as caught:
        predict.main(["--model", str(model_dir), str(tmp_path)])
    assert caught.value.code == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == str(good) and len(out.splitlines()) == 6
    assert err.splitlines() == [
        f"error: {tmp_path / 'a.png'} is empty",
        f"error: {tmp_path / 'b.png'} is text",
        f"error: {tmp_path / 'd.png'} is a damaged or truncated PNG",
        "error: 3 of 4 files could not be read as images.",
    ]


def test_a_photograph_is_classified_upright(run: Callable, model_dir: Path, tmp_path: Path):
    upright = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    ).resize((48, 64))
    exif = Image.Exif()
    exif[0x0112] = 8
    upright.save(tmp_path / "a.png")
    upright.rotate(-90, expand=True).save(tmp_path / "b.png", exif=exif)
    upright.save(tmp_path / "c.webp", lossless=True)
    upright.rotate(90, expand=True).save(tmp_path / "d.png")
    results = [
        json.loads(line)["classes"] for line in run("--model", model_dir, "--json", tmp_path)
    ]
    assert results[0] == results[1] == results[2] != results[3]


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_model(fail: Callable, tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    line = fail("--model", tmp_path / name, image(tmp_path / "a.png"))
    assert line.startswith(f"error: {tmp_path / name} holds no model: ")


def test_a_damaged_model(fail: Callable, model_dir: Path, tmp_path: Path):
    shutil.copytree(model_dir / "9", tmp_path / "vit" / "1")
    shutil.rmtree(tmp_path / "vit" / "1" / "variables")
    line = fail("--model", tmp_path / "vit", image(tmp_path / "a.png"))
    assert f"{tmp_path / 'vit' / '1'} is damaged" in line
    (tmp_path / "vit" / "1" / "saved_model.pb").write_bytes(b"cut short")
    line = fail("--model", tmp_path / "vit", image(tmp_path / "a.png"))
    assert f"{tmp_path / 'vit' / '1'} is damaged" in line


def test_another_model(fail: Callable, tmp_path: Path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"))
    line = fail("--model", tmp_path, image(tmp_path / "a.png"))
    assert "has no signature 'serving_default'" in line


def test_a_process_says_nothing_else(model_dir: Path, tmp_path: Path):
    path = image(tmp_path / "a.png")
    command = [sys.executable, "-m", "serving.predict", "--model", str(model_dir), str(path)]
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    process = subprocess.run(
        command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert lines[0] == str(path)
    assert len(lines) == 6


def test_an_error_of_a_process(tmp_path: Path):
    command = [sys.executable, "-m", "serving.predict", "--model", str(tmp_path), "missing.png"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert (process.stdout, process.stderr) == ("", "error: missing.png does not exist.\n")
