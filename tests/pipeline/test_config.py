import dataclasses
import os

import pytest

from components.evaluator.drop import AUTO
from dataset.card import SourceInfo
from pipeline import config as pipeline_config
from pipeline.command_line import parse_args
from pipeline.config import ConfigError, PipelineConfig
from tests.support.cards import make_card


def test_without_flags_is_the_default_configuration():
    assert parse_args([]) == PipelineConfig()


def test_every_knob_has_a_flag_that_sets_it():
    values = {
        "data": "d", "limit": 200, "image_size": "48x64", "resize": "pad", "group": "patient",
        "columns": "path=photo,label=breed", "max_unreadable": 0.2, "preset": "tiny",
        "train_minutes": 2.5, "batch_size": 8,
        "learning_rate": 0.5, "weight_decay": 0.0, "seed": 7, "min_top_1_accuracy": 0.2,
        "min_top_5_accuracy": 0.4, "max_accuracy_drop": 0.1, "work_dir": "w", "serving_dir": "s",
        "tune": 4, "tune_fraction": 0.5, "pipeline_name": "p", "model_name": "m", "beam_workers": 2,
        "verbosity": "info", "export": "onnx", "engine": "jax",
    }  # fmt: skip
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    flags += ["--set", "training.warmup=0", "--set", "augmentation.cutmix=1"]
    switches = ["--no_cache", "--warm_start", "--keep_duplicates", "--balance"]
    expected = {**values, "cache": False, "warm_start": True, "keep_duplicates": True}
    expected |= {
        "epochs": None,
        "balance": True,
        "set": ("training.warmup=0", "augmentation.cutmix=1"),
    }
    assert dataclasses.asdict(parse_args([*flags, *switches])) == expected
    assert parse_args(["--epochs", "3"]) == PipelineConfig(epochs=3)


def test_the_accuracy_drop_follows_the_noise_of_the_test_unless_a_number_is_given():
    assert parse_args([]).max_accuracy_drop == AUTO
    assert parse_args(["--max_accuracy_drop", "auto"]).max_accuracy_drop == AUTO
    assert parse_args(["--max_accuracy_drop", "0"]).max_accuracy_drop == 0.0


def test_help_explains_every_knob(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    for field in dataclasses.fields(PipelineConfig):
        assert f"--{'no_' if field.default is True else ''}{field.name} " in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "--batch_size is 0: it must be 1 to 1000000."),
        (["--batch_size", "many"], "argument --batch_size: invalid int value: 'many'"),
        (["--epochs", "-1"], "--epochs is -1: it must be 1 to 1000000."),
        (["--train_minutes", "0"], "--train_minutes is 0.0: it must be above 0, up to 1e+06."),
        (["--train_minutes", "9", "--epochs", "2"], "--epochs is 2 and --train_minutes is 9.0:"),
        (["--tune", "0"], "--tune is 0: it must be 1 to 10000."),
        (["--tune_fraction", "1.5"], "--tune_fraction is 1.5: it must be above 0, up to 1."),
        (["--limit", "1"], "--limit is 1: it must be 2 to 2147483647."),
        (["--image_size", "7"], "--image_size is '7': give a number of pixels, 8 to 1024"),
        (["--image_size", "32x"], "--image_size is '32x': give a number"),
        (["--resize", "fit"], "invalid choice: 'fit'"),
        (["--columns", "label"], "--columns is 'label': give NAME=COLUMN[,...], with a name of"),
        (["--columns", "breed=label"], "--columns is 'breed=label': give NAME=COLUMN"),
        (["--group", ""], "--group is '': name a column"),
        (["--max_unreadable", "2"], "--max_unreadable is 2.0: it is a fraction, 0 to 1."),
        (["--learning_rate", "0"], "--learning_rate is 0.0: it must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate is nan: it must be above 0"),
        (["--weight_decay", "-0.1"], "--weight_decay is -0.1: it must be 0 to 3.4e+38"),
        (["--min_top_1_accuracy", "33"], "--min_top_1_accuracy is 33.0: it is a fraction, 0 to 1."),
        (["--max_accuracy_drop", "-0.1"], "--max_accuracy_drop is -0.1: it is auto or 0 to 1"),
        (["--min_top_1_accuracy", ".5", "--min_top_5_accuracy", ".4"], "below min_top_1_accuracy"),
        (["--export", "onnx,tf"], "--export is 'onnx,tf': 'tf' is no format: there are tflite,"),
        (["--preset", "notbook"], "Did you mean 'notebook'?"),
        (
            ["--set", "augmentation.random_erasin=0.2"],
            "there is no field 'augmentation.random_erasin' in a preset: did you mean "
            "augmentation.random_erasing",
        ),
        (
            ["--set", "augmentation.random_erasing=2"],
            "augmentation.random_erasing is 2: input should be less than or equal to 1.",
        ),
        (["--set", "epochs"], "--set 'epochs' is not NAME=VALUE"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", "4294967296"], "--seed is 4294967296: it must be 0 to 4294967295."),
        (["--limit", "99999999999999999999999"], "--limit is 99999999999999999999999: it must be"),
        (["--epochs", "1000001"], "--epochs is 1000001: it must be 1 to 1000000."),
        (["--batch_size", "2147483648"], "--batch_size is 2147483648: it must be 1 to 1000000."),
        (["--tune", "10001"], "--tune is 10001: it must be 1 to 10000."),
        (["--beam_workers", "9999"], "--beam_workers is 9999: it must be 0 to 1024."),
        (["--train_minutes", "inf"], "--train_minutes is inf: it must be above 0, up to 1e+06."),
        (["--learning_rate", "1e39"], "--learning_rate is 1e+39: it must be above 0, up to 3.4e"),
        (["--weight_decay", "inf"], "--weight_decay is inf: it must be 0 to 3.4e+38."),
        (["--max_accuracy_drop", "most"], "argument --max_accuracy_drop: invalid"),
        (["--max_accuracy_drop", "1.5"], "--max_accuracy_drop is 1.5: it is auto or 0 to 1."),
        (["--preset", ""], "--preset is '': name one, or leave the flag out."),
        (["--export", ""], "--export is '': a name is missing: there are tflite, onnx."),
        (["--export", "tflite,,onnx"], "--export is 'tflite,,onnx': a name is missing"),
        (["--pipeline_name", "x" * 129], "use up to 128 letters"),
        (["--data", ""], "--data is '': name a folder or an archive."),
        (["--work_dir", ""], "--work_dir is '': name a folder."),
        (["--pipeline_name", "../up"], "--pipeline_name is '../up': use up to"),
        (["--model_name", "a b"], "--model_name is 'a b': use up to 128"),
        (["--engine", "torch"], "invalid choice: 'torch'"),
        (["--verbosity", "loud"], "invalid choice: 'loud'"),
        (["--beam_workers", "-1"], "--beam_workers is -1: it must be 0 to 1024."),
        (["--epoch", "3"], "there is no flag --epoch; did you mean --epochs?"),
        (["--frobnicate"], "there is no flag --frobnicate; see --help."),
        (["stray"], "stray"),
    ],
)
def test_refuses_what_it_cannot_use(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(flags)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_preset_takes_what_is_given_and_keeps_the_rest():
    preset = PipelineConfig(preset="notebook", batch_size=64, learning_rate=0.01).resolve_preset()
    training = preset.training
    assert (training.batch_size, training.learning_rate) == (64, 0.01)
    assert (training.epochs, training.weight_decay) == (20, 1e-3)
    assert preset.architecture.projection_dim == 64


def test_a_flag_of_its_own_goes_before_set():
    flags = ["--preset", "compact", "--set", "training.epochs=3", "--set", "training.warmup=0.2"]
    training = parse_args(flags).resolve_preset().training
    assert (training.epochs, training.warmup) == (3, 0.2)
    assert parse_args([*flags, "--epochs", "5"]).resolve_preset().training.epochs == 5


def test_a_top_1_threshold_raises_the_top_5_threshold_of_the_preset():
    def floors(given: float) -> tuple[float, ...]:
        config = PipelineConfig(min_top_1_accuracy=given)
        return tuple(config.resolve_gate(config.resolve_preset()).floors.values())

    assert floors(0.3) == (0.3, 0.3)
    assert floors(0.1) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("model_name", "dataset", "expected"),
    [
        (None, "cifar-100", "cifar100_vit"),
        (None, "synthetic", "synthetic_vit"),
        (None, "cifar-10", "cifar10_vit"),
        (None, "My photos-2024 (new)", "my_photos2024_new_vit"),
        (None, "Käse", "kase_vit"),
        (None, "日本", "images_vit"),
        ("mine", "cifar-100", "mine"),
        ("mine", "synthetic", "synthetic_mine"),
        ("synthetic_mine", "synthetic", "synthetic_mine"),
        ("notsynthetic", "synthetic", "synthetic_notsynthetic"),
    ],
)
def test_a_model_of_synthetic_data_says_so(model_name: str | None, dataset: str, expected: str):
    config = PipelineConfig(model_name=model_name)
    assert config.resolve_model_name(dataset) == expected
    assert config.model_dir(dataset) == os.path.join("output", "serving_models", expected)


def test_a_model_of_a_subset_does_not_take_the_place_of_the_real_one():
    assert PipelineConfig(limit=100).resolve_model_name("cifar-100") == "cifar100_subset_vit"
    assert PipelineConfig().resolve_model_name("cifar-100", subset=True) == "cifar100_subset_vit"
    assert PipelineConfig(limit=100, model_name="m").resolve_model_name("cifar-100") == "m"


def test_absolute_paths_do_not_depend_on_the_working_directory():
    config = PipelineConfig(work_dir="w", serving_dir="s").absolute()
    assert config.work_dir == os.path.join(os.getcwd(), "w")
    assert config.model_dir("cifar-100") == os.path.join(os.getcwd(), "s", "cifar100_vit")
    assert PipelineConfig().absolute().serving_dir is None
    assert PipelineConfig(work_dir="~/w").absolute().work_dir == os.path.expanduser("~/w")


def test_errors_are_raised_without_a_command_line_too():
    with pytest.raises(ConfigError, match="--epochs is 0"):
        pipeline_config.PipelineConfig(epochs=0)


def test_the_size_to_store_follows_the_images_where_they_are_known():
    def size(config: PipelineConfig, smallest: int, largest: int) -> tuple[int, int] | None:
        source = SourceInfo("folders", "x", "0", (smallest, smallest), (largest, largest), 0, 0)
        card = make_card(["a", "b"], source=source)
        return config.source_options(64, card).image_size

    assert size(PipelineConfig(), 32, 32) == (32, 32)
    assert size(PipelineConfig(), 96, 96) == (64, 64)
    assert size(PipelineConfig(), 32, 40) == (64, 64)
    assert size(PipelineConfig(image_size="48"), 32, 32) == (48, 48)
    assert size(PipelineConfig(image_size="48x96"), 32, 40) == (48, 96)
    # As on Kubeflow, where the component that reads them decides.
    options = PipelineConfig(limit=9, columns="label=a").source_options(64)
    assert (options.image_size, options.preset_size, options.limit) == (None, 64, 9)
    assert options.columns == {"label": "a"}
