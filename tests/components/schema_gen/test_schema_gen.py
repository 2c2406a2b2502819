from pathlib import Path

from google.protobuf import text_format
from ml_metadata import metadata_store
from ml_metadata.proto.metadata_store_pb2 import Execution
from tensorflow_metadata.proto.v0 import schema_pb2
from tfx import v1 as tfx
from tfx.orchestration.local.local_dag_runner import LocalDagRunner

from components.schema_gen.component import CuratedSchemaGen
from pipeline.graph import SCHEMA_FILE


def test_edited_schema_is_imported_again_and_an_unchanged_one_is_not(tmp_path: Path):
    schema_file = tmp_path / "schema.pbtxt"
    metadata = tfx.orchestration.metadata.sqlite_metadata_connection_config(
        str(tmp_path / "metadata.sqlite")
    )

    def run() -> tuple[int, schema_pb2.Schema]:
        """Runs a pipeline of this component; returns its state and the schema that it gave."""
        LocalDagRunner().run(
            tfx.dsl.Pipeline(
                pipeline_name="schema",
                pipeline_root=str(tmp_path / "root"),
                components=[CuratedSchemaGen(str(schema_file))],
                enable_cache=True,
                metadata_connection_config=metadata,
            )
        )
        store = metadata_store.MetadataStore(metadata)
        execution = max(store.get_executions(), key=lambda execution: execution.id)
        (event,) = store.get_events_by_execution_ids([execution.id])
        (artifact,) = store.get_artifacts_by_id([event.artifact_id])
        text = Path(artifact.uri, "schema.pbtxt").read_text()
        return execution.last_known_state, text_format.Parse(text, schema_pb2.Schema())

    def parsed(text: str) -> schema_pb2.Schema:
        return text_format.Parse(text, schema_pb2.Schema())

    original = Path(SCHEMA_FILE).read_text()
    edited = original.replace("max: 99", "max: 9")
    assert edited != original
    schema_file.write_text(original)
    assert run() == (Execution.COMPLETE, parsed(original))
    schema_file.write_text(original + "# another comment\n")
    assert run() == (Execution.CACHED, parsed(original))
    schema_file.write_text(edited)
    assert run() == (Execution.COMPLETE, parsed(edited))
