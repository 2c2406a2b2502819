"""Time and memory of every component, on a whole data set.

    .venv/bin/python benchmarks/pipeline_speed.py --data cifar-100-binary.tar.gz

runs the pipeline once, uncached and in a folder of its own, and prints a table and the three
figures that the project holds itself to on two cores: ExampleGen to Transform in 2.5 minutes
together, Evaluator in 3 minutes, 4 GB of memory at the peak.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serving.quiet import quiet_tensorflow

with quiet_tensorflow():
    from pipeline.config import PipelineConfig
    from pipeline.run_history import Run, RunHistory

_BEFORE_TRAINING = (
    "ExampleGen",
    "SchemaGen",
    "StatisticsGen",
    "ExampleValidator",
    "DataGate",
    "Transform",
)
_SECONDS_BETWEEN_SAMPLES = 0.1


def measure(command: list[str]) -> list[tuple[float, int]]:
    """Runs a command and samples its memory.

    Args:
      command: Program and arguments; its output goes to ours.

    Returns:
      (time since the epoch in seconds, resident memory of the process in bytes) for each sample.

    Raises:
      SystemExit: The command failed.
    """
    samples = []
    process = subprocess.Popen(command)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("VmRSS:"):
                samples.append((time.time(), int(line.split()[1]) * 1024))
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(process.returncode)
    return samples


def report(run: Run, samples: list[tuple[float, int]], seconds: float) -> str:
    """Lays out what was measured.

    Args:
      run: The run, from ML Metadata.
      samples: From `measure`.
      seconds: Wall time of the whole process.
    """
    lines = [f"{'component':<18}{'seconds':>9}{'peak memory':>14}"]
    for component in run.components:
        begin = component.started.timestamp()
        within = [size for at, size in samples if begin <= at <= begin + component.seconds]
        peak = f"{max(within) / 1e9:10.2f} GB" if within else f"{'-':>14}"
        lines.append(f"{component.name:<18}{component.seconds:9.1f}{peak}")
    took = {component.name: component.seconds for component in run.components}
    # Of the largest process, by the system's own account, which no short peak escapes.
    peak_memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    lines += [
        f"{'whole process':<18}{seconds:9.1f}{peak_memory:10.2f} GB",
        "",
        f"ExampleGen to Transform  {sum(took[name] for name in _BEFORE_TRAINING):7.1f} s   (150 s)",
        f"Evaluator                {took['Evaluator']:7.1f} s   (180 s)",
        f"peak memory              {peak_memory:7.2f} GB   (4 GB)",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="as for the pipeline")
    parser.add_argument("--preset", default="notebook", help="default: notebook")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = PipelineConfig(work_dir=folder)
        began = time.monotonic()
        samples = measure(
            [
                *(sys.executable, "-m", "pipeline.local_runner", "--data", options.data),
                *("--work_dir", folder, "--preset", options.preset, "--epochs", "1"),
            ]
        )
        seconds = time.monotonic() - began
        (run,) = RunHistory(config.pipeline_root).runs()
        print(report(run, samples, seconds))


if __name__ == "__main__":
    main()
