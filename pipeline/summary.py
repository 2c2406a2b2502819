"""The result of a run, as printed at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import tensorflow_model_analysis as tfma
from ml_metadata.proto import metadata_store_pb2

from components import models
from components.converter.formats import EXPORTS_FOLDER, REPORT_FILE
from components.evaluator.drop import COMPARISON_FILE
from components.evaluator.results import Metrics, accuracies
from dataset import card as data_card
from dataset.card import DataCard
from dataset.source import TITLES
from dataset.synthetic_names import NAME as SYNTHETIC
from pipeline.console import box, count
from pipeline.gate import METRICS, TOP_1
from pipeline.run_history import Run
from trainer import engines, presets
from trainer import report as reports
from trainer.report import TrainingReport

_ENGINES = {engines.TENSORFLOW: "TensorFlow", engines.JAX: "JAX"}


class NoOutputError(LookupError):
    """The run has not produced what a summary tells."""


def summarize(run: Run) -> str:
    """Describes a finished run: accuracy, blessing and why, the pushed model, what to do next.

    Args:
      run: A run in the state COMPLETE.

    Returns:
      Several lines of text.
    """
    model = _output(run, "Trainer", "model")
    text = _read_asset(model, reports.REPORT_FILE)
    training = reports.from_json(text, model.uri)
    evaluation = _output(run, "Evaluator", "evaluation")
    synthetic = training.dataset == SYNTHETIC
    lines = []
    if synthetic:
        lines += ["Trained and tested on SYNTHETIC images: these are no results on real ones.", ""]
    lines += _training_lines(training)
    lines += [*_start_lines(run, training), *_search_lines(run, training)]
    card = _read_card(model)
    lines += _data_lines(card)
    lines += ["", *_accuracy_lines(evaluation.uri), *_class_lines(card, evaluation.uri)]
    lines += ["", *_push_lines(run, evaluation.uri)]
    if exports := run.output("Converter", "exports"):
        lines += export_lines(exports.uri)
    lines += ["", *_next_lines(run, training)]
    lines += ["", f"time: {_times(run)}"]
    name = TITLES.get(training.dataset, training.dataset)
    if training.subset:
        name = f"a subset of {name}"
    return box(f"Summary: preset {training.preset.name} on {name}", lines)


def _training_lines(training: TrainingReport) -> list[str]:
    history, minutes = training.history, training.preset.training.train_minutes
    head = (
        f"{training.trainable_parameters:,} parameters, {training.train_examples:,} images, "
        f"{count(len(history), 'epoch')}"
    )
    if minutes:
        head += f" in {count(minutes, 'minute')} of training"
    rows = [
        f"epoch {epoch['epoch']:3}   loss {epoch['loss']:.3f}   validation "
        + "  ".join(
            f"{metric.label} {epoch[f'val_{metric.name}']:.3f}"
            for metric in METRICS
            if f"val_{metric.name}" in epoch
        )
        + f"   {epoch['seconds']:.0f} s"
        for epoch in history
    ]
    version = training.versions[training.engine]
    engine = f"trained with {_ENGINES[training.engine]} {version} on {_device(training)}"
    shown = rows if len(rows) <= 6 else [*rows[:2], "...", *rows[-3:]]
    return [head, engine, *shown]


def _device(training: TrainingReport) -> str:
    device = "the CPU" if training.device == "cpu" else training.device
    return device if training.devices == 1 else f"{training.devices} x {device}"


def _start_lines(run: Run, training: TrainingReport) -> list[str]:
    """From which model training has started, where that was asked for."""
    artifact = run.output("BaseModel", "baseline")
    if artifact is None:
        return []
    base = training.base_model
    if base is None:
        return ["trained from scratch: no model was pushed yet to start from"]
    epochs = count(base.epochs, "epoch")
    return [
        f"started from version {artifact.custom_properties['version'].string_value}, after "
        f"{epochs}: validation top-1 {base.val_top_1_accuracy:.3f}"
    ]


def _search_lines(run: Run, training: TrainingReport) -> list[str]:
    """What the Tuner has found, where there is one."""
    artifact = run.output("Tuner", "tuner_results")
    if artifact is None:
        return []
    with open(os.path.join(artifact.uri, "tuner_results.json")) as file:
        trials: list[dict[str, Any]] = json.load(file)
    first, *_ = trials = sorted(trials, key=lambda trial: int(trial["trial_id"]))
    best = max(trials, key=lambda trial: trial["score"])  # of equal ones the first, as Tuner does
    tuned = training.tuned or {}
    line = f"tuned in {len(trials)} trials: validation top-1 {best['score']:.3f}"
    if int(first["trial_id"]):  # the preset's own did not fit into memory
        return [line, *(f"{name} {value:.3g}" for name, value in tuned.items())]
    if best is first:
        return [f"{line} with the preset's own hyperparameters, and no other had more"]
    found = [
        f"{name} {value:.3g} (not {first[name]:.3g})"
        for name, value in tuned.items()
        if name in first  # the depth of the model it was started from was found by another search
    ]
    return [f"{line}, where the preset's own hyperparameters gave {first['score']:.3f}", *found]


def _accuracy_lines(evaluation_uri: str) -> list[str]:
    overall = accuracies(evaluation_uri)
    candidate = overall[tfma.CANDIDATE_KEY, None]
    lines = [f"test {_values(candidate)}   ({candidate['example_count']:,.0f} images)"]
    if baseline := overall.get((tfma.BASELINE_KEY, None)):
        lines.append(f"     {_values(baseline)}   (baseline)")
    return [*lines, *comparisons(evaluation_uri, refused=False)]


def comparisons(evaluation_uri: str, *, refused: bool) -> list[str]:
    """Says how the model compares with earlier ones, where the test's noise decides that.

    Args:
      evaluation_uri: Evaluator's output.
      refused: Whether to tell why the model is refused, or how far else it is below.

    Returns:
      One sentence for each metric.
    """
    found = models.read_json(os.path.join(evaluation_uri, COMPARISON_FILE)) or []
    return [item["text"] for item in found if item["refused"] == refused]


def _values(metrics: Metrics) -> str:
    return "   ".join(f"{metric.label} {metrics[metric.name]:.4f}" for metric in METRICS)


def _class_lines(card: DataCard, evaluation_uri: str) -> list[str]:
    """How even the accuracy is: balanced over the classes, and the worst and the best of them."""
    lines = []
    by_class = _ranked(evaluation_uri, "label", card.classes)
    if by_class:
        # The mean of the classes' recalls: each class counts the same, however many images it has.
        balanced = sum(recall for recall, _ in by_class) / len(by_class)
        lines.append(f"balanced accuracy {balanced:.4f}, classes {_range(by_class)}")
    if card.superclasses and (
        ranked := _ranked(evaluation_uri, "superclass", card.superclasses.names)
    ):
        lines.append(f"superclasses {_range(ranked)}")
    return lines


def _ranked(evaluation_uri: str, key: str, names: Sequence[str]) -> list[tuple[float, str]]:
    """(Top-1 accuracy, name) of each slice, the worst first."""
    return sorted(
        (values[TOP_1], names[label])
        for (name, label), values in accuracies(evaluation_uri, key).items()
        if name == tfma.CANDIDATE_KEY and label is not None
    )


def _range(ranked: Sequence[tuple[float, str]]) -> str:
    (worst, worst_name), (best, best_name) = ranked[0], ranked[-1]
    return f"from {worst_name} ({worst:.3f}) to {best_name} ({best:.3f})"


def _data_lines(card: DataCard) -> list[str]:
    """What was left out of the data, if anything."""
    source = card.source
    left_out = [
        f"{count(number, 'image')} {why}"
        for number, why in (
            (source.unreadable, "that could not be read (unreadable.json beside the examples)"),
            (source.duplicates, "of train that another split has, too"),
        )
        if number
    ]
    return [f"left out: {', '.join(left_out)}"] if left_out else []


def _push_lines(run: Run, evaluation_uri: str) -> list[str]:
    validation = tfma.load_validation_result(evaluation_uri)
    serving = _output(run, "ServingValidator", "blessing")
    reasons = [] if validation.validation_ok else rejection_reasons(validation)
    reasons += comparisons(evaluation_uri, refused=True)
    report = _serving_report(serving)
    reasons += [f"ServingValidator: {problem}" for problem in report["problems"]]
    if reasons:
        lines = ["NOT BLESSED, not pushed:", *(f"  {reason}" for reason in reasons)]
        if report["problems"]:
            lines += [f"(to validate it again: rm -r {_short(serving.uri)} and the same command)"]
        return lines
    pushed = _output(run, "Pusher", "pushed_model").custom_properties
    destination = pushed["pushed_destination"].string_value
    latency = report["latency"]["serving_default"]
    lines = [
        "BLESSED: reached every threshold; answers as trained when it is served "
        f"(an image in {latency['p50_ms']:.1f} ms, p99 {latency['p99_ms']:.1f} ms)",
    ]
    if os.path.exists(destination):
        return [*lines, f"pushed to {_short(destination)}"]
    copy = _output(run, "Pusher", "pushed_model").uri
    return [
        *lines,
        f"pushed earlier to {_short(destination)}, which was removed since",
        f"(to push it again: rm -r {_short(copy)} and the same command)",
    ]


def export_lines(uri: str) -> list[str]:
    """Describes the model's other formats.

    Args:
      uri: Converter's output.

    Returns:
      A line for all, and one for each file.
    """
    with open(os.path.join(uri, REPORT_FILE)) as file:
        report = json.load(file)
    return [
        f"other formats, in its {EXPORTS_FOLDER} (agreement with it on {report['images']:,} test "
        "images, time of an image alone):",
        *(
            f"  {made['name']:22} "
            + (
                f"REFUSED: {made['problem']}"
                if made["problem"]
                else f"{made['size'] / 1e6:5.1f} MB   {made['agreement']:.1%}   "
                f"{made['ms_per_image']:.1f} ms"
            )
            for made in report["files"]
        ),
    ]


def _serving_report(blessing: metadata_store_pb2.Artifact) -> dict[str, Any]:
    with open(os.path.join(blessing.uri, "report.json")) as file:
        report: dict[str, Any] = json.load(file)
    return report


def rejection_reasons(validation: Any) -> list[str]:
    """Says which thresholds were missed.

    Args:
      validation: tfma's ValidationResult.

    Returns:
      One sentence for each threshold, with the value and the bound.
    """
    reasons = ["a metric with a threshold is missing"] if validation.missing_thresholds else []
    for validations in validation.metric_validations_per_slice:
        for failure in validations.failures:
            key, value = failure.metric_key, failure.metric_value.double_value.value
            threshold = failure.metric_threshold
            if key.is_diff:
                allowed = -threshold.change_threshold.absolute.value
                reasons.append(
                    f"{key.name} is {-value:.4f} below the baseline's (allowed: {allowed:.4f})"
                )
            else:
                bound = threshold.value_threshold.lower_bound.value
                reasons.append(f"{key.name} is {value:.4f}, the threshold {bound:.4f}")
    return reasons


def _next_lines(run: Run, training: TrainingReport) -> list[str]:
    pushed = _output(run, "Pusher", "pushed_model").custom_properties
    destination = pushed["pushed_destination"].string_value
    logs = _output(run, "Trainer", "model_run").uri
    lines = ["next:"]
    if destination:
        base = os.path.dirname(destination)
        lines.append(f"  classify images   .venv/bin/vit-predict --model {_short(base)} IMAGE...")
    lines.append(f"  see the training  .venv/bin/tensorboard --logdir {_short(logs)}")
    asked = training.preset.training
    full = presets.get_preset(training.preset.name).training.epochs
    if asked.train_minutes:
        longer = 4 * asked.train_minutes
        lines.append(f"  train longer      the same command with --train_minutes {longer:g}")
    elif asked.epochs < full:
        lines.append(f"  train longer      the same command with --epochs {full}")
    return lines


def _times(run: Run) -> str:
    took = [f"{c.name} {c.seconds:.0f} s" for c in run.components if c.seconds >= 0.5]
    cached = sum(c.state == "CACHED" for c in run.components)
    parts = [*took, *([f"{cached} cached"] if cached else [])]
    return f"{', '.join(parts)}; all components {run.seconds:.0f} s"


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path


def _output(run: Run, component: str, key: str) -> metadata_store_pb2.Artifact:
    artifact = run.output(component, key)
    if artifact is None:
        raise NoOutputError(f"run {run.run_id} has no output {key!r} of {component}")
    return artifact


def _read_card(model: metadata_store_pb2.Artifact) -> DataCard:
    return data_card.from_json(_read_asset(model, data_card.CARD_FILE), model.uri)


def _read_asset(model: metadata_store_pb2.Artifact, name: str) -> str:
    with open(os.path.join(model.uri, "Format-Serving", "assets.extra", name)) as file:
        return file.read()
