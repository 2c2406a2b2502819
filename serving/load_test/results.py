"""The figures of one measurement."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

OK = "OK"
PERCENTILES = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p99_9_ms": 99.9}


@dataclasses.dataclass(frozen=True)
class Result:
    """A measurement of one kind of load.

    Attributes:
      mode: `closed` (clients that wait for their answer), `open` (requests at a given rate) or
        `in process` (the SavedModel, called without a server).
      concurrency: Clients of a closed loop; requests under way at most in an open one.
      rate: Requests a second that were meant to be sent; None in a closed loop.
      batch: Images in a request.
      seconds: Length of the measurement.
      codes: gRPC status code -> requests that ended with it.
      latencies: p50_ms, p90_ms, p99_ms and p99_9_ms of the successful requests; empty without any.
      qps: Successful requests a second.
      images_per_second: The same in images.
      client_cpu: Cores that this process used meanwhile, 0.5 for half a core.
    """

    mode: str
    concurrency: int
    rate: float | None
    batch: int
    seconds: float
    codes: dict[str, int]
    latencies: dict[str, float]
    qps: float
    images_per_second: float
    client_cpu: float

    @property
    def errors(self) -> dict[str, int]:
        """The codes other than OK."""
        return {code: count for code, count in self.codes.items() if code != OK}

    def as_json(self) -> dict[str, Any]:
        """A JSON-serializable dictionary with all attributes."""
        return dataclasses.asdict(self)


def summarize(
    mode: str,
    *,
    batch: int,
    seconds: float,
    outcomes: Sequence[tuple[str, float]],
    concurrency: int = 1,
    rate: float | None = None,
    client_cpu: float = 0.0,
) -> Result:
    """Computes a result.

    Args:
      mode: See `Result`.
      batch: See `Result`.
      seconds: See `Result`.
      outcomes: (code, latency in seconds) of each request.
      concurrency: See `Result`.
      rate: See `Result`.
      client_cpu: See `Result`.
    """
    good = [1e3 * latency for code, latency in outcomes if code == OK]
    latencies = {}
    if good:
        values = np.percentile(good, list(PERCENTILES.values()))
        latencies = {name: round(float(value), 3) for name, value in zip(PERCENTILES, values)}
    qps = len(good) / seconds
    return Result(
        mode=mode,
        concurrency=concurrency,
        rate=rate,
        batch=batch,
        seconds=round(seconds, 3),
        codes=dict(collections.Counter(code for code, _ in outcomes)),
        latencies=latencies,
        qps=round(qps, 2),
        images_per_second=round(qps * batch, 1),
        client_cpu=round(client_cpu, 3),
    )


_HEADER = ("load", "batch", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "QPS", "images/s", "errors")


def table(results: Sequence[Result]) -> str:
    """Shows results, a line for each."""
    rows = [_HEADER, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _row(result: Result) -> tuple[str, ...]:
    load = {
        "closed": f"{result.concurrency} client{'s' if result.concurrency > 1 else ''}",
        "open": f"{result.rate or 0:g}/s",
    }.get(result.mode, result.mode)
    latencies = [
        f"{result.latencies[name]:.1f}" if result.latencies else "-" for name in PERCENTILES
    ]
    errors = ", ".join(f"{count} {code}" for code, count in sorted(result.errors.items()))
    return (
        load,
        str(result.batch),
        *latencies,
        f"{result.qps:.1f}",
        f"{result.images_per_second:.0f}",
        errors or "0",
    )
