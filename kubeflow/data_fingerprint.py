"""A task of the compiled pipeline: writes the fingerprint of the data into a file.

    python kubeflow/data_fingerprint.py LOCATION OPTIONS FILE

Location and options (JSON) are ExampleGen's. Exits with 1, and the cause, where there are no data.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dataset.files import make_folder, replace_text
from dataset.format import DataError
from dataset.interface import options_from_json
from dataset.source import open_source


def main() -> None:
    """Entry point; see the module's docstring."""
    location, options, output = sys.argv[1:]
    path = Path(output)
    try:
        text = open_source(location, options_from_json(options)).card.source.fingerprint
        make_folder(path.parent)
        replace_text(path, text)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
