"""A Beam source of fixed-length records."""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam
from apache_beam.io import filebasedsource, range_trackers

# 4 MB of records per bundle at least: a smaller one costs more in scheduling than in reading.
_MIN_BUNDLE_BYTES = 4 << 20
# Records are read in blocks, since one call of a file system for each 3 KB would dominate.
_RECORDS_PER_READ = 1024


class FixedLengthSource(filebasedsource.FileBasedSource):
    """Splits a file at any offset; a record belongs to the range in which it starts.

    Args:
      file_pattern: See `ReadFixedLengthRecords`.
      record_bytes: See `ReadFixedLengthRecords`.
    """

    def __init__(self, file_pattern: str, record_bytes: int):
        super().__init__(
            file_pattern, min_bundle_size=_MIN_BUNDLE_BYTES, splittable=True, validate=True
        )
        self._record_bytes = record_bytes

    def read_records(
        self, file_name: str, range_tracker: range_trackers.OffsetRangeTracker
    ) -> Iterator[tuple[int, bytes]]:
        """See base class; yields (index of the record in the file, record)."""
        size = self._record_bytes
        index = -(-range_tracker.start_position() // size)
        with self.open_file(file_name) as file:
            file.seek(index * size)
            while block := file.read(size * _RECORDS_PER_READ):
                for begin in range(0, len(block), size):
                    # The tracker refuses records that start beyond the range, which can shrink
                    # while it is read.
                    if not range_tracker.try_claim(index * size):
                        return
                    record = block[begin : begin + size]
                    if len(record) < size:
                        raise ValueError(
                            f"{file_name} ends within a record: {len(record)} of {size} bytes at "
                            f"offset {index * size}. The file is truncated; fetch it again."
                        )
                    yield index, record
                    index += 1


class ReadFixedLengthRecords(beam.PTransform):
    """Reads a file of records of one length.

    Args:
      file_pattern: A path or glob, on any file system that Beam knows.
      record_bytes: The length of each record in bytes.

    Returns (on expansion):
      PCollection of (index of the record in its file, record bytes).

    Raises:
      OSError: No file matches (when the pipeline is constructed).
      ValueError: A file's length is not a multiple of `record_bytes` (when it is read).
    """

    def __init__(self, file_pattern: str, record_bytes: int):
        super().__init__()
        self._source = FixedLengthSource(file_pattern, record_bytes)

    def expand(self, pbegin: beam.Pipeline) -> beam.PCollection:
        """See base class."""
        return pbegin | beam.io.Read(self._source)
