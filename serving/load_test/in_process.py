"""The SavedModel in a process of its own, called without any server: what a server costs more.

The process measures when it is told to and sleeps otherwise, so that it can take turns with a
server on the same machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from serving.encoding import IMAGES, INPUTS
from serving.images import ServingError
from serving.load_test.results import OK, Result, summarize


class InProcess:
    """Runs the measuring process for as long as a `with` block lasts.

    Args:
      model_dir: A TF Serving model base path, or a version in it.

    Raises:
      ServingError: The model cannot be loaded.
    """

    def __init__(self, model_dir: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(model_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which it takes for the end
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def measure(self, batch: int, seconds: float) -> list[float]:
        """Calls the model for some time, one call after the other.

        Args:
          batch: Images in a call.
          seconds: For how long.

        Returns:
          The seconds that each call took.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"batch": batch, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return [float(value) for value in self._read()["seconds"]]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServingError(
                f"the model cannot be called in a process (exit code {self._process.wait()})."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ServingError(answer["error"])
        return answer


def as_result(batch: int, seconds: list[float]) -> Result:
    """The figures of calls one after the other."""
    outcomes = [(OK, value) for value in seconds]
    return summarize("in process", batch=batch, seconds=sum(seconds), outcomes=outcomes)


def main() -> None:
    """The measuring process: commands on its standard input, figures on its standard output."""
    from serving.predict import find_version
    from serving.quiet import quiet_tensorflow

    try:
        version = find_version(Path(sys.argv[1]))
        with quiet_tensorflow():
            import tensorflow as tf

        signature = tf.saved_model.load(str(version)).signatures[IMAGES]
    except (ServingError, OSError, KeyError) as error:
        print(json.dumps({"error": f"{sys.argv[1]} cannot be loaded: {error}"}))
        return
    print(json.dumps({"loaded": str(version)}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps({"seconds": _measure(tf, signature, **command)}), flush=True)


def _measure(tf: Any, signature: Any, batch: int, seconds: float) -> list[float]:
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)

    def call() -> float:
        start = time.perf_counter()
        for value in signature(**{INPUTS[IMAGES]: tf.constant(pixels)}).values():
            value.numpy()  # as the answer to a client has it
        return time.perf_counter() - start

    call()  # the first one of a shape prepares it
    end = time.perf_counter() + seconds
    times = [call()]
    while time.perf_counter() < end:
        times.append(call())
    return times


if __name__ == "__main__":
    main()
