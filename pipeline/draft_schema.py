"""Prints a schema inferred from data, to compare the curated one with.

`python -m pipeline.draft_schema --work_dir output > draft.pbtxt` reads the statistics of the
training split that the pipeline's last run computed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pipeline import console
from pipeline.config import ConfigError, PipelineConfig
from pipeline.metadata_file import MetadataError


def main(arguments: Sequence[str] | None = None) -> None:
    """Infers the schema and prints it as a text proto.

    Args:
      arguments: Flags; by default the process's.

    Raises:
      SystemExit: With code 1 when there are no statistics yet, or the metadata cannot be read.
    """
    defaults = PipelineConfig()
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.draft_schema", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--work_dir", default=defaults.work_dir, metavar="DIR")
    parser.add_argument("--pipeline_name", default=defaults.pipeline_name, metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        config = PipelineConfig(work_dir=options.work_dir, pipeline_name=options.pipeline_name)
    except ConfigError as error:
        parser.error(str(error))
    root = config.absolute().pipeline_root

    with console.importing("quiet"):
        import tensorflow_data_validation as tfdv
        from google.protobuf import text_format

        from pipeline.run_history import RunHistory

    try:
        runs = RunHistory(root).runs()
    except MetadataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    for run in runs:
        artifact = run.output("StatisticsGen", "statistics")
        path = os.path.join(artifact.uri, "Split-train", "FeatureStats.pb") if artifact else ""
        if os.path.exists(path):
            schema = tfdv.infer_schema(tfdv.load_stats_binary(path))
            print(text_format.MessageToString(schema), end="")
            return
    print(
        f"error: no run of the pipeline in {root} has computed statistics: run it first, or name "
        "its --work_dir.",
        file=sys.stderr,
    )
    raise SystemExit(1)


if __name__ == "__main__":
    main()
