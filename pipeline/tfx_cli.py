"""TFX's command line with the history of local runs: the `tfx` command of this package.

TFX answers `tfx run list`, `status`, `delete` and `terminate` with "Not supported" for the local
engine, although ML Metadata have all it takes. This adds them and leaves everything else to TFX.
"""

from __future__ import annotations

import os
import sys

from pipeline import console


def main() -> None:
    """Runs TFX's command line."""
    with console.importing("quiet"):
        from tfx.tools.cli import cli_main
        from tfx.tools.cli.handler import local_handler

        from pipeline import tfx_history

    # Where TFX's factory of handlers looks for it.
    local_handler.LocalHandler = tfx_history.HistoryHandler
    # TFX's command line calls `pip`; it must be the one of this environment, active or not.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    cli_main.cli_group()


if __name__ == "__main__":
    main()
