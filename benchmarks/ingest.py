"""Time per image and peak memory of ingesting many small images from class folders.

    .venv/bin/python benchmarks/ingest.py --images 100000 --output results/ingest.json

Two processes, as in a run: the first opens the source (lists, reads and hashes every file, and
makes the plan), the second is ExampleGen, which does that again, decodes, and writes the examples.
Where other processes take the cores, the time of a core tells more than that of the clock. Peak
memory is the process's largest resident set; that after the imports alone is given beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

_CLASSES = 100
_SIDE = 32


def generate(folder: Path, images: int) -> None:
    """Writes PNG files of smooth noise in class folders: some 2.5 KB each, all different."""
    random = np.random.default_rng(0)
    for label in range(_CLASSES):
        (folder / f"class {label:03}").mkdir(parents=True)
    for number in range(images):
        coarse = random.integers(0, 256, (_SIDE // 4, _SIDE // 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        image.save(folder / f"class {number % _CLASSES:03}" / f"{number:07}.png", compress_level=1)


def open_only(folder: str) -> Callable[[], object]:
    """What the command does before it starts a pipeline."""
    from dataset.source import open_source

    return lambda: open_source(folder)


def run_example_gen(folder: str, output: str) -> Callable[[], object]:
    """What ExampleGen's executor does, in one process."""
    from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
    from tfx.types import standard_artifacts

    from components.example_gen.component import ImageExampleGen
    from components.example_gen.executor import Executor

    component = ImageExampleGen(folder, dataset_name="benchmark", content_fingerprint="none")
    examples = standard_artifacts.Examples()
    examples.uri = output
    context = BaseBeamExecutor.Context(
        beam_pipeline_args=["--direct_running_mode=in_memory", "--direct_num_workers=1"],
        tmp_dir=f"{output}.tmp",
        unique_id="1",
    )
    executor = Executor(context)
    return lambda: executor.Do({}, {"examples": [examples]}, dict(component.exec_properties))


def measure(part: str, folder: str, output: str) -> dict[str, float]:
    """Runs a part in this process."""
    call = open_only(folder) if part == "open" else run_example_gen(folder, output)
    imported = _peak_mb()
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": _peak_mb(),
        "peak_mb_after_imports": imported,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_in_process(part: str, folder: Path, output: Path) -> dict[str, float]:
    """Runs a part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--folder", folder, "--output", output]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Generates the images, measures, prints, and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("open", "example_gen"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure(options.part, str(options.folder), str(options.output))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        generate(folder, options.images)
        parts = {
            part: measure_in_process(part, folder, Path(scratch, "examples"))
            for part in ("open", "example_gen")
        }
    for part, figures in parts.items():
        for name in ("", "cpu_"):
            figures[f"{name}us_per_image"] = figures[f"{name}seconds"] / options.images * 1e6
        print(
            f"{part:12} {figures['us_per_image']:7.0f} us per image, "
            f"{figures['cpu_us_per_image']:7.0f} us of a core   "
            f"peak {figures['peak_mb']:,.0f} MB "
            f"({figures['peak_mb_after_imports']:,.0f} MB after the imports)"
        )
    if options.output:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "commit": _commit(),
            "hardware": f"{os.cpu_count()} cores, {_processor()}",
            "load_average": os.getloadavg()[0],
            "seed": 0,
            "images": options.images,
            "parts": parts,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
