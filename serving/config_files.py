"""TF Serving's configuration files, read and written as the protos that they are.

The `tensorflow-serving-api` package has the messages of the models file alone. Those of the
batching, monitoring and TLS files are declared here, as `session_bundle_config.proto`,
`monitoring_config.proto` and `ssl_config.proto` of TF Serving 2.16 to 2.20 have them.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import (
    descriptor_pb2,
    message_factory,
    text_format,
    wrappers_pb2,
)
from google.protobuf.message import Message
from tensorflow_serving.config import model_server_config_pb2

_Field = descriptor_pb2.FieldDescriptorProto
_MessageT = TypeVar("_MessageT", bound=Message)

_WRAPPERS = wrappers_pb2.DESCRIPTOR.name
_INT64, _STRING, _BOOL = (f".google.protobuf.{name}Value" for name in ("Int64", "String", "Bool"))
# File → message → (number, name, type); a type with a dot is a message's, an int a scalar's.
_FILES: dict[str, dict[str, list[tuple[int, str, str | int]]]] = {
    "tensorflow_serving/servables/tensorflow/session_bundle_config.proto": {
        "BatchingParameters": [
            (1, "max_batch_size", _INT64),
            (2, "batch_timeout_micros", _INT64),
            (3, "max_enqueued_batches", _INT64),
            (4, "num_batch_threads", _INT64),
            (5, "thread_pool_name", _STRING),
            (6, "allowed_batch_sizes", _Field.TYPE_INT64),
            (7, "pad_variable_length_inputs", _Field.TYPE_BOOL),
            (8, "enable_large_batch_splitting", _BOOL),
            (9, "max_execution_batch_size", _INT64),
        ],
    },
    "tensorflow_serving/config/monitoring_config.proto": {
        "PrometheusConfig": [
            (1, "enable", _Field.TYPE_BOOL),
            (2, "path", _Field.TYPE_STRING),
        ],
        "MonitoringConfig": [
            (1, "prometheus_config", ".tensorflow.serving.PrometheusConfig"),
        ],
    },
    "tensorflow_serving/config/ssl_config.proto": {
        "SSLConfig": [
            (1, "server_key", _Field.TYPE_STRING),
            (2, "server_cert", _Field.TYPE_STRING),
            (3, "custom_ca", _Field.TYPE_STRING),
            (4, "client_verify", _Field.TYPE_BOOL),
        ],
    },
}
_REPEATED = {"allowed_batch_sizes"}


def _declare() -> dict[str, Any]:
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    files = [wrappers]
    for name, messages in _FILES.items():
        file = descriptor_pb2.FileDescriptorProto(
            name=name, package="tensorflow.serving", syntax="proto3", dependency=[_WRAPPERS]
        )
        for message_name, fields in messages.items():
            message = file.message_type.add(name=message_name)
            for number, field_name, kind in fields:
                field = message.field.add(name=field_name, number=number)
                repeated = field_name in _REPEATED
                field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
                if isinstance(kind, str):
                    field.type, field.type_name = _Field.TYPE_MESSAGE, kind
                else:
                    field.type = kind  # type: ignore[assignment]
        files.append(file)
    return message_factory.GetMessages(files)


_DECLARED = _declare()
ModelServerConfig = model_server_config_pb2.ModelServerConfig
BatchingParameters = _DECLARED["tensorflow.serving.BatchingParameters"]
MonitoringConfig = _DECLARED["tensorflow.serving.MonitoringConfig"]
SSLConfig = _DECLARED["tensorflow.serving.SSLConfig"]


class ConfigFileError(ValueError):
    """A configuration file cannot be used; the message says which, where and why."""


def read(path: str | os.PathLike[str], kind: type[_MessageT]) -> _MessageT:
    """Reads a text proto, as TF Serving does.

    Args:
      path: The file.
      kind: `ModelServerConfig`, `BatchingParameters`, `MonitoringConfig` or `SSLConfig`.

    Raises:
      ConfigFileError: The file cannot be read, or is no such text proto.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return text_format.Parse(text, kind())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{path} cannot be read: {error}.") from error
    except text_format.ParseError as error:
        raise ConfigFileError(
            f"{path} is no {kind.DESCRIPTOR.name} text proto (line:column: what): {error}"
        ) from error


def read_batching(path: str | os.PathLike[str]) -> Any:
    """Reads a batching file and checks what TF Serving checks when it loads a model.

    Raises:
      ConfigFileError: The file cannot be used; see `read`.
    """
    batching = read(path, BatchingParameters)
    sizes = list(batching.allowed_batch_sizes)
    for name in ("max_batch_size", "num_batch_threads", "max_enqueued_batches"):
        if batching.HasField(name) and getattr(batching, name).value < 1:
            raise ConfigFileError(
                f"{path}: {name} is {getattr(batching, name).value}: it must be 1 or more."
            )
    if batching.batch_timeout_micros.value < 0:
        raise ConfigFileError(
            f"{path}: batch_timeout_micros is {batching.batch_timeout_micros.value}: "
            "it must be 0 or more."
        )
    if sizes and (sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes))):
        raise ConfigFileError(
            f"{path}: allowed_batch_sizes are {sizes}: they must be 1 or more and increase."
        )
    # 1,000 is what TF Serving takes where the file does not say.
    largest = batching.max_batch_size.value if batching.HasField("max_batch_size") else 1000
    if sizes and sizes[-1] != largest:
        raise ConfigFileError(
            f"{path}: the last of allowed_batch_sizes is {sizes[-1]}: "
            f"it must equal max_batch_size, which is {largest}."
        )
    return batching


def write(
    message: Message, path: str | os.PathLike[str], *, comment: str = "", mode: int | None = None
) -> None:
    """Writes a text proto; a server that polls the file sees the old or the new one, whole.

    Args:
      message: What to write.
      path: The file, which is replaced.
      comment: Lines to put on top of it.
      mode: The file's permissions; default: those it has, 0644 for a new one.

    Raises:
      ConfigFileError: The file cannot be written.
    """
    target = Path(path)
    text = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    text += text_format.MessageToString(message)
    try:
        if mode is None:
            mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, mode)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ConfigFileError(f"{path} cannot be written: {error}.") from error
