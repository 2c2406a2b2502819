"""What a served model must answer to be pushed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.client import Client, Signature
from serving.connection import ServerError
from serving.encoding import BYTES, EXAMPLES, IMAGES, INPUTS, example, png

# In probabilities: between signatures, batch sizes, and what Trainer's model has computed.
TOLERANCE = 1e-4
PROBABILITIES = "probabilities"

_LATENCY_REQUESTS = 100
_LATENCY_SECONDS = 4.0  # for each signature; slow models are measured with fewer requests


@dataclass(frozen=True)
class Images:
    """The same images as each signature takes them.

    Args:
      pixels: uint8 [N, H, W, 3].
      examples: N serialized tf.Examples; made from the pixels where there are none.
    """

    pixels: np.ndarray
    examples: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self) -> dict[str, Any]:
        """Signature -> its input, all images in a batch."""
        return {
            IMAGES: self.pixels,
            BYTES: [png(image) for image in self.pixels],
            EXAMPLES: list(self.examples or (example(x.tobytes()) for x in self.pixels)),
        }


@dataclass
class Findings:
    """What was found out about a model.

    Attributes:
      problems: A sentence for each reason not to push it.
      report: JSON-serializable figures.
    """

    problems: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def check(
    client: Client,
    images: Images,
    known: Images,
    known_probabilities: np.ndarray,
    batch_sizes: Sequence[int],
) -> Findings:
    """Queries every signature and compares the answers.

    Args:
      client: Asks the served model.
      images: Of the test split.
      known: Images that Trainer's model was asked about itself.
      known_probabilities: float [N, classes], what it answered.
      batch_sizes: Sizes of the batches to ask for, those beyond the number of images excepted.

    Returns:
      The findings.

    Raises:
      ServerError: The server is gone.
    """
    findings = Findings()
    _, signatures = client.metadata()
    findings.problems += _unexpected(signatures)
    signatures = {name: signatures[name] for name in INPUTS if name in signatures}
    answers: dict[str, dict[str, np.ndarray]] = {}
    inputs, known_inputs = images.inputs(), known.inputs()
    largest = min(len(images), max(batch_sizes))
    for name, signature in signatures.items():
        try:
            outputs = client.predict({INPUTS[name]: inputs[name][:largest]}, name)
            problems = shape_problems(signature, outputs, largest) or value_problems(outputs)
            if not problems:
                answers[name] = outputs
                problems = _batch_problems(client, name, inputs[name], outputs, batch_sizes)
                parts = _parts(known_inputs[name], largest)
                problems += _known_problems(
                    client, name, parts, known_probabilities, findings.report
                )
        except ServerError as error:
            client.status()  # raises where the server is what has failed
            problems = [str(error)]
        findings.problems += [f"{name}: {problem}" for problem in problems]
    findings.problems += _disagreements(answers, findings.report)
    findings.report["latency"] = {
        name: measure(client, name, inputs[name]) for name in answers if not findings.problems
    }
    findings.report["signatures"] = sorted(signatures)
    findings.report["images"] = {"test": largest, "validation": len(known)}
    return findings


def _unexpected(signatures: Mapping[str, Signature]) -> list[str]:
    missing = [f"there is no signature {name}" for name in INPUTS if name not in signatures]
    unknown = [
        f"the signature {name} cannot be queried: only {', '.join(INPUTS)} are known"
        for name in signatures
        if name not in INPUTS
    ]
    return missing + unknown


def shape_problems(signature: Signature, outputs: Mapping[str, np.ndarray], size: int) -> list[str]:
    """Compares outputs with what the signature declares.

    Args:
      signature: The declaration.
      outputs: The answer to a request of `size` images.
      size: The batch dimension that every output must have.
    """
    problems = []
    if set(outputs) != set(signature.outputs):
        problems.append(f"returns {_join(outputs)}, where it declares {_join(signature.outputs)}")
    if PROBABILITIES not in signature.outputs:
        problems.append(f"has no output {PROBABILITIES}")
    for name, values in outputs.items():
        declared = signature.outputs.get(name)
        if declared is None:
            continue
        dtype = "string" if values.dtype == object else values.dtype.name
        shape = (size, *declared.shape[1:])
        matches = len(shape) == values.ndim and all(
            wanted in (None, actual) for wanted, actual in zip(shape, values.shape)
        )
        if dtype != declared.dtype or not matches:
            problems.append(
                f"{name} is {dtype} {list(values.shape)} for {size} images, where it declares "
                f"{declared.dtype} {list(declared.shape)}"
            )
    return problems


def value_problems(outputs: Mapping[str, np.ndarray]) -> list[str]:
    """Checks that probabilities are some, and that the top 5 are those of the probabilities."""
    probabilities = outputs[PROBABILITIES]
    if not np.all(np.isfinite(probabilities)) or probabilities.min() < 0:
        return [f"{PROBABILITIES} has values that are negative or no numbers"]
    problems = []
    sums = probabilities.sum(axis=-1, dtype=np.float64)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > TOLERANCE:
        problems.append(f"{PROBABILITIES} sum to {sums[worst]:.4f}, not to 1 (image {worst})")
    ids, top = outputs.get("top_5_ids"), outputs.get("top_5_probabilities")
    if ids is not None and top is not None:
        best = -np.sort(-probabilities, axis=-1)[:, : top.shape[-1]]
        named = np.take_along_axis(probabilities, ids.astype(np.int64), axis=-1)
        if max(np.abs(best - top).max(), np.abs(named - top).max()) > TOLERANCE:
            problems.append(f"top_5_ids are not the {top.shape[-1]} largest {PROBABILITIES}")
    return problems


def _batch_problems(
    client: Client,
    name: str,
    inputs: Any,
    outputs: Mapping[str, np.ndarray],
    batch_sizes: Sequence[int],
) -> list[str]:
    """Asks again in batches of other sizes, which must make no difference."""
    whole = outputs[PROBABILITIES]
    for size in sorted(size for size in batch_sizes if size < len(whole)):
        part = client.predict({INPUTS[name]: inputs[:size]}, name)[PROBABILITIES]
        if part.shape != (size, *whole.shape[1:]):
            return [f"{PROBABILITIES} is {list(part.shape)} for {size} images"]
        difference = _difference(part, whole[:size])
        if not difference <= TOLERANCE:
            return [
                f"the same image in batches of {size} and of {len(whole)} gets {PROBABILITIES} "
                f"that differ by up to {difference:.3g} (allowed: {TOLERANCE:g})"
            ]
    return []


def _parts(inputs: Any, size: int) -> list[Any]:
    """Cuts an input into requests that the server admits."""
    return [inputs[begin : begin + size] for begin in range(0, len(inputs), size)]


def _known_problems(
    client: Client, name: str, parts: list[Any], expected: np.ndarray, report: dict[str, Any]
) -> list[str]:
    answered = np.concatenate(
        [client.predict({INPUTS[name]: part}, name)[PROBABILITIES] for part in parts]
    )
    if answered.shape != expected.shape:
        return [f"{PROBABILITIES} is {list(answered.shape)}, in training {list(expected.shape)}"]
    difference = _difference(answered, expected)
    report.setdefault("difference_from_trainer", {})[name] = difference
    if difference <= TOLERANCE:
        return []
    return [
        f"{PROBABILITIES} differ from Trainer's own by up to {difference:.3g} (allowed: "
        f"{TOLERANCE:g})"
    ]


def _disagreements(
    answers: Mapping[str, Mapping[str, np.ndarray]], report: dict[str, Any]
) -> list[str]:
    problems = []
    for (first, ours), (second, theirs) in itertools.combinations(answers.items(), 2):
        if set(ours) != set(theirs):
            problems.append(f"{first} and {second} return different outputs")
            continue
        difference = _difference(ours[PROBABILITIES], theirs[PROBABILITIES])
        report.setdefault("difference_between_signatures", {})[f"{first} {second}"] = difference
        if not difference <= TOLERANCE:
            problems.append(
                f"{first} and {second} differ by up to {difference:.3g} in {PROBABILITIES} of the "
                f"same images (allowed: {TOLERANCE:g})"
            )
    return problems


def measure(client: Client, name: str, inputs: Any) -> dict[str, float]:
    """Times requests of one image, one after the other.

    Args:
      client: Asks the served model.
      name: The signature.
      inputs: Its input for some images, which are sent in turn.

    Returns:
      `requests`, and in milliseconds `p50_ms` and `p99_ms`.
    """
    times: list[float] = []
    began = time.monotonic()
    while len(times) < _LATENCY_REQUESTS and time.monotonic() - began < _LATENCY_SECONDS:
        one = len(times) % len(inputs)
        start = time.perf_counter()
        client.predict({INPUTS[name]: inputs[one : one + 1]}, name)
        times.append(1e3 * (time.perf_counter() - start))
    p50, p99 = np.percentile(times, [50, 99])
    return {"requests": len(times), "p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max(initial=0.0))


def _join(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
