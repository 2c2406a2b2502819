"""The chart of a load test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.load_test.results import PERCENTILES, Result
from serving.load_test.soak import Memory


def draw(
    path: Path, results: Sequence[Result], in_process: float | None, memory: Memory | None
) -> bool:
    """Writes a PNG: latency and throughput over the load, and the memory of a soak.

    Args:
      path: The file to write.
      results: Of closed and open loops; those without a successful request are left out.
      in_process: Images a second of the model in a process, for comparison.
      memory: Of the server in a soak.

    Returns:
      Whether there was anything to draw; nothing is written otherwise.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(results)
    rows = len(groups) + (memory is not None)
    if not rows:
        return False
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(11, 4 * rows), layout="constrained", squeeze=False
    )
    for row, ((mode, batch), group) in zip(axes, groups.items()):
        loads = [result.rate if mode == "open" else result.concurrency for result in group]
        for panel in row:
            panel.set_title(f"{mode} loop, requests of {batch} image{'s' if batch > 1 else ''}")
            panel.set_xlabel("requests a second, meant" if mode == "open" else "clients")
            panel.set_xscale("log")
            panel.set_xticks(loads, [f"{load:g}" for load in loads])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        _latency(row[0], loads, group)
        _throughput(row[1], loads, group, in_process)
    if memory is not None:
        panel, unused = axes[-1]
        unused.axis("off")
        panel.plot([s / 60 for s in memory.seconds], memory.megabytes)
        panel.set(title="soak", xlabel="minutes", ylabel="the server's resident memory, MB")
        panel.set_ylim(0, 1.1 * max(memory.megabytes))
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
    return True


def _groups(results: Sequence[Result]) -> dict[tuple[str, int], list[Result]]:
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        if result.latencies:
            groups.setdefault((result.mode, result.batch), []).append(result)
    return groups


def _latency(panel: Any, loads: Sequence[Any], group: Sequence[Result]) -> None:
    for name in PERCENTILES:
        values = [result.latencies[name] for result in group]
        panel.plot(loads, values, marker="o", label=name.removesuffix("_ms").replace("_", "."))
    panel.set_ylabel("latency, ms")
    panel.set_ylim(bottom=0)
    panel.legend()


def _throughput(
    panel: Any, loads: Sequence[Any], group: Sequence[Result], in_process: float | None
) -> None:
    panel.plot(loads, [result.images_per_second for result in group], marker="o", label="server")
    if in_process is not None:
        panel.axhline(in_process, color="gray", linestyle="--", label="in process, in batches")
        panel.legend()
    panel.set_ylabel("images a second")
    panel.set_ylim(bottom=0)
