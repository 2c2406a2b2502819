"""ExampleGen in local pipelines with real ML Metadata: when it is taken from the cache."""

from pathlib import Path

import pytest
from ml_metadata import metadata_store
from ml_metadata.proto.metadata_store_pb2 import ConnectionConfig, Execution
from tfx import v1 as tfx
from tfx.orchestration.local.local_dag_runner import LocalDagRunner

from components.example_gen.component import ImageExampleGen
from dataset import format as binary
from dataset import synthetic
from pipeline.execution import beam_arguments


class LocalPipeline:
    """ExampleGen alone, in a local pipeline that remembers its runs."""

    def __init__(self, root: Path, folder: Path):
        self._root, self._folder = root, folder
        self.metadata: ConnectionConfig = (
            tfx.orchestration.metadata.sqlite_metadata_connection_config(str(root / "db.sqlite"))
        )

    def run(self, fingerprint: str | None = None, limit: int | None = None) -> Execution:
        """Runs it; returns the new execution."""
        example_gen = ImageExampleGen(
            str(self._folder),
            dataset_name="synthetic",
            content_fingerprint=fingerprint or binary.fingerprint(self._folder),
            limit=limit,
        )
        LocalDagRunner().run(
            tfx.dsl.Pipeline(
                pipeline_name="ingestion",
                pipeline_root=str(self._root / "root"),
                components=[example_gen],
                enable_cache=True,
                metadata_connection_config=self.metadata,
                beam_pipeline_args=beam_arguments(workers=1),
            )
        )
        executions = metadata_store.MetadataStore(self.metadata).get_executions()
        return max(executions, key=lambda execution: execution.id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return synthetic.generate(tmp_path / "set", train=20, test=5)


def test_runs_again_when_the_data_changed_and_only_then(folder: Path, tmp_path: Path):
    pipeline = LocalPipeline(tmp_path, folder)
    assert pipeline.run().last_known_state == Execution.COMPLETE
    # The same contents under new modification times, which FileBasedExampleGen would run again for.
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes())
    assert pipeline.run().last_known_state == Execution.CACHED
    # One pixel of one image, in a file of the same size.
    pixels = bytearray((folder / "train.bin").read_bytes())
    pixels[100] ^= 1
    (folder / "train.bin").write_bytes(pixels)
    assert pipeline.run().last_known_state == Execution.COMPLETE
    # Another limit gives other examples.
    assert pipeline.run(limit=100).last_known_state == Execution.COMPLETE
    assert pipeline.run(limit=100).last_known_state == Execution.CACHED


def test_a_failed_run_is_not_taken_from_the_cache(folder: Path, tmp_path: Path):
    pipeline = LocalPipeline(tmp_path, folder)
    sound = (folder / "test.bin").read_bytes()
    (folder / "test.bin").write_bytes(sound[:-1])
    with pytest.raises(Exception, match="4 records of 3,074 bytes and 3,073 bytes over"):
        pipeline.run("f1")
    (folder / "test.bin").write_bytes(sound)
    assert pipeline.run("f1").last_known_state == Execution.COMPLETE
