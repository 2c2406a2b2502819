"""Driver of Baseline: what is being served is part of the cache key."""

from __future__ import annotations

from tfx.dsl.components.base import base_driver
from tfx.orchestration import metadata
from tfx.orchestration.portable import base_driver as portable_base_driver
from tfx.orchestration.portable import data_types
from tfx.proto.orchestration import driver_output_pb2

from components.baseline import executor


class Driver(base_driver.BaseDriver, portable_base_driver.BaseDriver):
    """Resolves the baseline's version before the cache is asked.

    Without it, a candidate that was compared with one baseline would be taken for as good as
    another that was pushed since, and training that starts from the baseline would not see that
    there is a newer one. Orchestrators that run no drivers must not cache Baseline.
    """

    def __init__(self, metadata_handle: metadata.Metadata):
        base_driver.BaseDriver.__init__(self, metadata_handle)
        portable_base_driver.BaseDriver.__init__(self, metadata_handle)

    def run(self, execution_info: data_types.ExecutionInfo) -> driver_output_pb2.DriverOutput:
        """See base class."""
        properties = execution_info.exec_properties
        serving_dir = properties[executor.SERVING_DIR_KEY]
        candidates = execution_info.input_dict.get(executor.MODEL_KEY, [])
        found = {executor.VERSION_KEY: executor.find_baseline(serving_dir, candidates)}
        if candidates:  # what training starts from does not depend on it
            found[executor.MEASURED_KEY] = executor.find_measured(serving_dir, candidates)
        result = driver_output_pb2.DriverOutput()
        for key, value in {**properties, **found}.items():
            result.exec_properties[key].string_value = value
        return result
