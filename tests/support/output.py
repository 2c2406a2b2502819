"""What processes print, without what TensorFlow says of a machine on which it finds no GPU."""

from __future__ import annotations


def without_cuda(text: str) -> str:
    """Leaves out the lines of TensorFlow 2.21 on CUDA's start, which no log level silences."""
    return "".join(line for line in text.splitlines(keepends=True) if "cuInit" not in line)
