"""A task of the compiled pipeline: writes the fingerprint of a folder of data into a file.

    python kubeflow/data_fingerprint.py /data/cifar-100 /tmp/kfp/outputs/fingerprint

Exits with 1, and the cause, where the folder does not hold the data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dataset.format import FILES, fingerprint


def main() -> None:
    """Entry point; see the module's docstring."""
    folder, output = sys.argv[1:]
    if not folder.startswith("/"):
        sys.exit(f"error: data is {folder}: this task reads a path on a mounted volume.")
    try:
        text = fingerprint(folder)
    except OSError as error:
        sys.exit(
            f"error: {error.filename}: {error.strerror}; the data folder must hold "
            f"{', '.join(FILES)}."
        )
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
