"""The whole graph on damaged data: nothing runs behind the gate."""

from pathlib import Path

import pytest
from ml_metadata import metadata_store
from tfx import v1 as tfx
from tfx.orchestration.local.local_dag_runner import LocalDagRunner

from dataset import synthetic
from dataset.format import RECORD_BYTES, DataError
from pipeline.execution import beam_arguments
from pipeline.gate import TOP_1, TOP_5, Gate
from pipeline.graph import DataSource, create_pipeline
from trainer.presets import get_preset


def test_transform_does_not_run_on_a_label_out_of_range(tmp_path: Path):
    folder = synthetic.generate(tmp_path / "set", train=400, test=100)
    records = bytearray((folder / "train.bin").read_bytes())
    records[370 * RECORD_BYTES + 1] = 123  # fine label of a record of the validation split
    (folder / "train.bin").write_bytes(records)
    metadata = tfx.orchestration.metadata.sqlite_metadata_connection_config(
        str(tmp_path / "metadata.sqlite")
    )
    pipeline = create_pipeline(
        pipeline_name="gated",
        pipeline_root=str(tmp_path / "root"),
        # Past the checks that come before a run, as on Kubeflow.
        data=DataSource(folder=str(folder), name="synthetic", fingerprint="damaged"),
        preset=get_preset("notebook"),
        engine="tensorflow",
        seed=0,
        gate=Gate({TOP_1: 0.1, TOP_5: 0.3}, max_accuracy_drop=0.01),
        serving_dir=str(tmp_path / "serving"),
        checkpoint_dir=str(tmp_path / "checkpoints"),
        enable_cache=True,
        metadata_connection_config=metadata,
        beam_pipeline_args=beam_arguments(workers=1),
    )
    with pytest.raises(DataError) as raised:
        LocalDagRunner().run(pipeline)
    assert (
        "  - split 'validation', feature 'label': Unexpectedly large value: 123 "
        "(seen: values from 0 to 123)\n"
    ) in str(raised.value)
    # What the gate says, alone: the splits without a fault are not in it.
    assert str(raised.value).count("  - ") == 1

    store = metadata_store.MetadataStore(metadata)
    names = {kind.id: kind.name.rpartition(".")[2] for kind in store.get_execution_types()}
    ran = {names[execution.type_id] for execution in store.get_executions()}
    assert {"ImageExampleGen", "StatisticsGen", "ExampleValidator", "DataGate"} <= ran
    assert not ran & {"Transform", "Trainer", "Evaluator", "Pusher"}
    assert not (tmp_path / "root" / "Transform").exists()
