import os
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.io import source_test_utils
from apache_beam.testing.util import assert_that, equal_to

from components.example_gen.records import FixedLengthSource, ReadFixedLengthRecords

SIZE = 7


def write(path: Path, count: int, size: int = SIZE) -> list[tuple[int, bytes]]:
    """Writes records whose bytes tell them apart; returns what reading must give."""
    records = [(index.to_bytes(4, "big") * size)[:size] for index in range(count)]
    path.write_bytes(b"".join(records))
    return list(enumerate(records))


def test_large_file_is_cut_into_bundles_that_hold_every_record_once(tmp_path: Path):
    # 13 MB: three bundles of at least 4 MB, whose borders fall within records.
    size = 3074
    expected = write(tmp_path / "train.bin", 4300, size)
    source = FixedLengthSource(str(tmp_path / "train.bin"), size)
    bundles = list(source.split(desired_bundle_size=1))
    assert len(bundles) == 3
    assert any(bundle.start_position % size for bundle in bundles)
    parts = [
        source_test_utils.read_from_source(
            bundle.source, bundle.start_position, bundle.stop_position
        )
        for bundle in bundles
    ]
    assert all(parts)
    assert [record for part in parts for record in part] == expected


def test_a_record_belongs_to_the_range_in_which_it_starts(tmp_path: Path):
    expected = write(tmp_path / "a.bin", 4)
    (bundle,) = FixedLengthSource(str(tmp_path / "a.bin"), SIZE).split(1)
    end = 4 * SIZE
    for start in range(end):
        for stop in range(start + 1, end + 1):
            assert source_test_utils.read_from_source(bundle.source, start, stop) == [
                (index, record) for index, record in expected if start <= index * SIZE < stop
            ]


def test_splitting_while_reading_loses_and_repeats_nothing(tmp_path: Path):
    write(tmp_path / "a.bin", 8)
    source = FixedLengthSource(str(tmp_path / "a.bin"), SIZE)
    (bundle,) = source.split(1)
    # At every fraction, after every number of records read, and from a second thread.
    source_test_utils.assert_split_at_fraction_exhaustive(bundle.source)


def test_records_beyond_one_read_of_the_file(tmp_path: Path):
    expected = write(tmp_path / "a.bin", 2500)  # a read takes 1,024
    assert (
        source_test_utils.read_from_source(FixedLengthSource(str(tmp_path / "a.bin"), SIZE))
        == expected
    )


def test_in_a_pipeline(tmp_path: Path):
    expected = write(tmp_path / "a.bin", 20)
    with beam.Pipeline() as pipeline:
        records = pipeline | ReadFixedLengthRecords(str(tmp_path / "a.bin"), SIZE)
        assert_that(records, equal_to(expected))


def test_truncated_file(tmp_path: Path):
    write(tmp_path / "cut.bin", 20)
    os.truncate(tmp_path / "cut.bin", 19 * SIZE + 3)
    with (
        pytest.raises(
            ValueError, match=r"cut\.bin ends within a record: 3 of 7 bytes at offset 133"
        ),
        beam.Pipeline() as pipeline,
    ):
        pipeline | ReadFixedLengthRecords(str(tmp_path / "cut.bin"), SIZE)


def test_missing_file(tmp_path: Path):
    with pytest.raises(OSError, match=r"nowhere\.bin"):
        ReadFixedLengthRecords(str(tmp_path / "nowhere.bin"), SIZE)
