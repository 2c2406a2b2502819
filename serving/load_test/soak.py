"""Minutes at saturation: what fails, and whether the server's memory grows."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from serving.images import ServingError
from serving.load_test.generator import Target, closed_loop
from serving.load_test.results import Result

EXPECTED_ERROR = "RESOURCE_EXHAUSTED"
# Until caches and allocators have what they want.
_SETTLING = 0.2
# Growth, over the length of the soak, that is within what allocators do by themselves.
_FLAT_FRACTION = 0.02
_FLAT_MB = 8.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """The resident memory of the server.

    Attributes:
      seconds: When it was looked at, from the beginning of the load.
      megabytes: How much it was, in units of 2^20 bytes.
    """

    seconds: list[float]
    megabytes: list[float]

    @property
    def slope(self) -> float:
        """MB a minute, by least squares over all but the first fifth of the time."""
        times, sizes = np.array(self.seconds), np.array(self.megabytes)
        settled = times >= _SETTLING * times[-1]
        if settled.sum() < 2:
            return 0.0
        return float(60 * np.polyfit(times[settled], sizes[settled], 1)[0])

    @property
    def growth(self) -> float:
        """MB that this slope adds in the length of the soak."""
        return self.slope * self.seconds[-1] / 60

    @property
    def flat(self) -> bool:
        """Whether that is no more than allocators need to settle."""
        return self.growth <= max(_FLAT_MB, _FLAT_FRACTION * float(np.median(self.megabytes)))


@dataclasses.dataclass(frozen=True)
class Soak:
    """The result of a soak; `memory` is None where the server's process is not known."""

    result: Result
    memory: Memory | None

    @property
    def unexpected(self) -> dict[str, int]:
        """Errors other than that the server is overloaded, which it is meant to be."""
        return {c: n for c, n in self.result.errors.items() if c != EXPECTED_ERROR}

    @property
    def failed(self) -> bool:
        """Whether there were such errors, or memory grew."""
        return bool(self.unexpected) or (self.memory is not None and not self.memory.flat)

    def as_json(self) -> dict[str, Any]:
        """A JSON-serializable dictionary."""
        described: dict[str, Any] = {"result": self.result.as_json()}
        if self.memory:
            described["memory"] = {
                **dataclasses.asdict(self.memory),
                "slope_mb_per_minute": self.memory.slope,
                "flat": self.memory.flat,
            }
        return described

    def describe(self) -> list[str]:
        """A line for the errors and one for the memory, each with a verdict."""
        refused = self.result.codes.get(EXPECTED_ERROR, 0)
        lines = [
            f"errors other than {EXPECTED_ERROR} ({refused}): "
            + (", ".join(f"{n} {c}" for c, n in self.unexpected.items()) or "none")
        ]
        if self.memory:
            sizes = self.memory.megabytes
            verdict = "flat" if self.memory.flat else "GROWS"
            lines.append(
                f"resident memory: {sizes[0]:.0f} MB at first, {sizes[-1]:.0f} MB at last, "
                f"{self.memory.slope:+.2f} MB a minute: {verdict}"
            )
        return lines


def soak(target: Target, *, concurrency: int, minutes: float, pid: int | None) -> Soak:
    """Keeps a server busy and watches it.

    Args:
      target: What to send.
      concurrency: Clients, more than the server admits at a time.
      minutes: For how long.
      pid: The server's process on this machine; None where it is elsewhere.

    Raises:
      ServingError: There is no such process, or it has ended.
    """
    began = time.monotonic()
    seconds: list[float] = []
    megabytes: list[float] = []

    def look() -> None:
        if pid is not None:
            megabytes.append(resident_megabytes(pid))
            seconds.append(round(time.monotonic() - began, 1))

    look()
    result = closed_loop(target, concurrency, 60 * minutes, 0.0, tick=look)
    return Soak(result, Memory(seconds, megabytes) if pid is not None else None)


def resident_megabytes(pid: int) -> float:
    """Reads a process's resident memory in MB.

    Raises:
      ServingError: There is no such process.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    except (OSError, StopIteration) as error:
        raise ServingError(f"the server's process {pid} is not there (any more).") from error
    return int(kilobytes.split()[1]) / 1024
