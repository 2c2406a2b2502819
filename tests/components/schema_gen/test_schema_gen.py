"""The schema of data sets of different sizes, and the component in a real run."""

from pathlib import Path

import pytest
import tensorflow_data_validation as tfdv
from tfx import v1 as tfx
from tfx.types import standard_artifacts

from components.schema_gen.component import CardSchemaGen
from components.schema_gen.executor import Executor, make_schema
from dataset.card import CARD_FILE
from dataset.format import DataError
from tests.support.cards import SYNTHETIC_CARD, make_card


def test_the_schema_follows_from_the_card():
    schema = make_schema(SYNTHETIC_CARD)
    assert [feature.name for feature in schema.feature] == ["image", "label", "superclass"]
    assert schema.feature[0].image_domain.max_image_byte_size == 32 * 32 * 3
    domains = [(feature.int_domain.min, feature.int_domain.max) for feature in schema.feature[1:]]
    assert domains == [(0, 99), (0, 19)]
    # All are dense: Transform and Trainer get tensors without missing values.
    assert all(feature.HasField("shape") for feature in schema.feature)


def test_data_without_superclasses_and_of_another_size():
    schema = make_schema(make_card(["cat", "dog", "hen"], image_size=(48, 64)))
    assert [feature.name for feature in schema.feature] == ["image", "label"]
    assert schema.feature[0].image_domain.max_image_byte_size == 48 * 64 * 3
    assert (schema.feature[1].int_domain.min, schema.feature[1].int_domain.max) == (0, 2)


def run(tmp_path: Path, card: str) -> Path:
    examples, schema = standard_artifacts.Examples(), standard_artifacts.Schema()
    examples.uri, schema.uri = str(tmp_path / "examples"), str(tmp_path / "schema")
    Path(examples.uri).mkdir()
    Path(examples.uri, CARD_FILE).write_text(card)
    Executor().Do({"examples": [examples]}, {"schema": [schema]}, {"code": ""})
    return Path(schema.uri, "schema.pbtxt")


def test_the_executor_writes_it_where_tfx_reads_it(tmp_path: Path):
    written = run(tmp_path, SYNTHETIC_CARD.to_json())
    assert tfdv.load_schema_text(str(written)) == make_schema(SYNTHETIC_CARD)


def test_a_card_of_another_version_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"dataset\.json is not the data card .*classes: Field req"):
        run(tmp_path, SYNTHETIC_CARD.to_json().replace('"classes"', '"labels"'))


def test_the_component_takes_the_examples():
    component = CardSchemaGen(tfx.dsl.Channel(type=standard_artifacts.Examples))
    assert set(component.inputs) == {"examples"} and set(component.outputs) == {"schema"}
