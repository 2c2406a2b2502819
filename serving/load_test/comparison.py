"""A server against the same model called in a process, measured by turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from serving.load_test.generator import Target, closed_loop
from serving.load_test.in_process import InProcess, as_result
from serving.load_test.results import Result

CLIENTS = 32
MAX_OVERHEAD_MS = 3.0
MIN_THROUGHPUT_RATIO = 0.85


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What serving costs.

    Attributes:
      in_process_p50_ms: Of a call with one image.
      server_p50_ms: Of a request with one image, one client.
      in_process_images_per_second: In calls of 32 images.
      server_images_per_second: 32 clients with requests of one image.
    """

    in_process_p50_ms: float
    server_p50_ms: float
    in_process_images_per_second: float
    server_images_per_second: float

    @property
    def overhead_ms(self) -> float:
        """What the server adds to the latency of one image."""
        return self.server_p50_ms - self.in_process_p50_ms

    @property
    def throughput_ratio(self) -> float:
        """The server's throughput as a fraction of the model's."""
        return self.server_images_per_second / self.in_process_images_per_second

    def as_json(self) -> dict[str, Any]:
        """A JSON-serializable dictionary with the attributes and what follows from them."""
        return {
            **dataclasses.asdict(self),
            "overhead_ms": self.overhead_ms,
            "throughput_ratio": self.throughput_ratio,
        }

    def describe(self) -> list[str]:
        """Two lines, each with the goal and whether it is reached."""
        latency, throughput = self.overhead_ms, self.throughput_ratio
        return [
            f"1 client: p50 {self.server_p50_ms:.1f} ms, in process {self.in_process_p50_ms:.1f} "
            f"ms: {latency:+.1f} ms (goal: at most +{MAX_OVERHEAD_MS:g} ms: "
            f"{_verdict(latency <= MAX_OVERHEAD_MS)})",
            f"{CLIENTS} clients: {self.server_images_per_second:.0f} images/s, in process "
            f"{self.in_process_images_per_second:.0f}: {throughput:.0%} (goal: at least "
            f"{MIN_THROUGHPUT_RATIO:.0%}: {_verdict(throughput >= MIN_THROUGHPUT_RATIO)})",
        ]


def compare(
    target: Target,
    model_dir: Path,
    *,
    rounds: int,
    seconds: float,
    warmup: float,
    report: Callable[[Result], None],
) -> Comparison:
    """Measures both by turns, so that what else the machine does meets both alike.

    Args:
      target: Requests of one image.
      model_dir: The model that the server serves.
      rounds: How many times; the medians count.
      seconds: Length of each of a round's four measurements.
      warmup: Seconds before each measurement of the server.
      report: Is given each result.

    Raises:
      ServingError: The model cannot be loaded.
    """
    figures: list[tuple[float, float, float, float]] = []
    with InProcess(model_dir) as model:
        for _ in range(rounds):
            one = as_result(1, model.measure(1, seconds))
            single = closed_loop(target, 1, seconds, warmup)
            many = as_result(CLIENTS, model.measure(CLIENTS, seconds))
            loaded = closed_loop(target, CLIENTS, seconds, warmup)
            for result in (one, single, many, loaded):
                report(result)
            figures.append(
                (
                    one.latencies["p50_ms"],
                    single.latencies.get("p50_ms", float("inf")),
                    many.images_per_second,
                    loaded.images_per_second,
                )
            )
    return Comparison(*(float(np.median(column)) for column in zip(*figures)))


def _verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"
