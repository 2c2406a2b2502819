"""Executor of AtomicPusher."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from absl import logging
from tfx import types
from tfx.components.pusher import executor as pusher_executor
from tfx.dsl.io import fileio
from tfx.proto import pusher_pb2
from tfx.types import artifact_utils, standard_component_specs
from tfx.utils import io_utils, proto_utils

from components import models
from components.converter import formats
from components.evaluator.drop import COMPARED_PROPERTY, MEASURED_PROPERTY
from components.serving_validator.warmup import WARMUP_FILE

EXPORTS_KEY = "exports"

# Not a number, so TF Serving does not take it for a version.
_STAGING_PREFIX = ".incoming-"
_DESTINATION_PROPERTY = "pushed_destination"
_VERSION_PROPERTY = "pushed_version"


class PushError(RuntimeError):
    """The model could not be written to where it is served from."""


class Executor(pusher_executor.Executor):
    """Pushes into a staging folder beside the versions, then renames.

    TFX's own executor copies straight into the version folder: a full disk or a killed process
    leaves a version that model servers try to load.
    """

    def CheckBlessing(self, input_dict: dict[str, list[types.Artifact]]) -> bool:
        """See base class, which would do with either blessing, and even without any."""
        keys = (
            standard_component_specs.MODEL_BLESSING_KEY,
            standard_component_specs.INFRA_BLESSING_KEY,
        )
        missing = [key for key in keys if not input_dict.get(key)]
        if missing:
            logging.error("Nothing is pushed without %s.", " and ".join(missing))
            return False
        return bool(super().CheckBlessing(input_dict))

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class.

        Raises:
          PushError: The disk is full, the destination cannot be written, or another model is
            served from there than the one that this was compared with.
        """
        destination = pusher_pb2.PushDestination()
        key = standard_component_specs.PUSH_DESTINATION_KEY
        proto_utils.json_to_proto(exec_properties[key], destination)
        base = destination.filesystem.base_directory
        pushed = artifact_utils.get_single_instance(
            output_dict[standard_component_specs.PUSHED_MODEL_KEY]
        )
        staging = staging_folder(base, pushed.uri)
        destination.filesystem.base_directory = staging
        staged_properties = {**exec_properties, key: proto_utils.proto_to_json(destination)}
        try:
            _remove(staging)  # what a killed push has left
            super().Do(input_dict, output_dict, staged_properties)
            staged = pushed.get_string_custom_property(_DESTINATION_PROPERTY)
            if staged:
                for exports in input_dict.get(EXPORTS_KEY, []):
                    io_utils.copy_dir(exports.uri, os.path.join(staged, formats.EXPORTS_FOLDER))
                blessing = artifact_utils.get_single_instance(
                    input_dict[standard_component_specs.MODEL_BLESSING_KEY]
                )
                if measured := blessing.get_string_custom_property(MEASURED_PROPERTY):
                    path = os.path.join(staged, models.MEASURED_FILE)
                    fileio.makedirs(os.path.dirname(path))
                    io_utils.write_string_file(path, measured)
                with _locked(base):
                    version = _publish(staged, base, blessing)
                final = os.path.join(base, version)
                pushed.set_string_custom_property(_DESTINATION_PROPERTY, final)
                pushed.set_string_custom_property(_VERSION_PROPERTY, version)
        except (OSError, tf.errors.OpError) as error:
            raise PushError(
                f"the model could not be pushed to {base}: {error}. "
                "Free space on that disk or make the folder writable, and run again."
            ) from error
        finally:
            _remove(staging)


def staging_folder(serving_dir: str, pushed_uri: str) -> str:
    """Names a pipeline's staging folder: always the same, and another for each pipeline.

    Args:
      serving_dir: Where versions are pushed, maybe by several pipelines.
      pushed_uri: Where this pipeline keeps its copy of the pushed model.
    """
    pipeline = hashlib.sha256(os.path.dirname(pushed_uri).encode()).hexdigest()[:8]
    return os.path.join(serving_dir, f"{_STAGING_PREFIX}{pipeline}")


def _publish(staged: str, base: str, blessing: types.Artifact) -> str:
    """Turns a staged model into the newest version, which it must have been compared with.

    Returns:
      The version's name.
    """
    taken = models.versions(base)
    if taken and _is_copy(os.path.join(base, taken[-1]), staged):
        # It is being served already: where orchestrators retry a component, or have no cache for
        # this one, the same model comes again.
        return taken[-1]
    if blessing.has_custom_property(COMPARED_PROPERTY):
        compared = blessing.get_string_custom_property(COMPARED_PROPERTY)
        others = [
            version
            for version in taken
            if not models.has_same_file(os.path.join(base, version), staged, models.IDENTITY_FILE)
        ]
        newest = others[-1] if others else ""
        if newest != compared:
            raise PushError(
                f"{base} has changed since this model was compared with "
                f"{f'its version {compared}' if compared else 'nothing, as it was empty'}: the "
                f"newest is now {newest or 'none'}, of another pipeline perhaps. Nothing was "
                "pushed. Give the same command again: the comparison is made anew."
            )
    # Model servers serve the largest number, whatever clocks say.
    version = str(max([int(os.path.basename(staged)), *(int(name) + 1 for name in taken)]))
    fileio.rename(staged, os.path.join(base, version))
    return version


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Holds a folder against other pipelines' pushes, where its file system has locks."""
    with contextlib.ExitStack() as stack:
        if os.path.isdir(folder):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                logging.warning("%s cannot be locked: %s.", folder, error.strerror)
        yield


def _is_copy(folder: str, other: str) -> bool:
    """Whether two SavedModels are the same one, with the same warm-up requests and exports."""
    exports = os.path.join(formats.EXPORTS_FOLDER, formats.REPORT_FILE)
    files = [models.IDENTITY_FILE, WARMUP_FILE]
    if any(fileio.exists(os.path.join(model, exports)) for model in (folder, other)):
        files.append(exports)
    return all(models.has_same_file(folder, other, file) for file in files)


def _remove(folder: str) -> None:
    if fileio.exists(folder):
        fileio.rmtree(folder)
