"""The text protos that flags name, checked: what is not supported is refused by name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from google.protobuf import text_format
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

PROMETHEUS_PATH = "/monitoring/prometheus/metrics"


class ConfigError(ValueError):
    """A configuration that cannot be served from; the message says what to change."""


class Batching(NamedTuple):
    """TF Serving's BatchingParameters, with its defaults.

    Attributes:
      max_batch_size: Rows in a batch, and in a request unless `split`.
      timeout: Seconds that the first request of a batch waits for others while a thread is free.
      max_enqueued_batches: Batches that may wait in a queue, for each signature.
      threads: Batches that run at a time.
      allowed_sizes: What a batch is padded up to; empty: any size.
      pad_inputs: Whether inputs of different lengths are padded to the longest.
      split: Whether a larger request is spread over several batches.
      max_execution_size: Rows in such a batch.
    """

    max_batch_size: int = 1000
    timeout: float = 0.0
    max_enqueued_batches: int = 10
    threads: int = 1
    allowed_sizes: tuple[int, ...] = ()
    pad_inputs: bool = False
    split: bool = False
    max_execution_size: int = 1000


class Model(NamedTuple):
    """One model to serve.

    Attributes:
      name: In requests.
      base_path: Folder whose numbered folders are versions.
      policy: "latest", "all" or "specific".
      num_latest: How many the policy "latest" serves.
      versions: Those that the policy "specific" serves.
      labels: Version labels and what they stand for.
    """

    name: str
    base_path: Path
    policy: str = "latest"
    num_latest: int = 1
    versions: frozenset[int] = frozenset()
    labels: Mapping[str, int] = {}


class Ssl(NamedTuple):
    """TF Serving's SSLConfig: PEM texts.

    Attributes:
      key: Of the server.
      certificate: Of the server, with its chain.
      client_ca: Who signs clients' certificates; None: clients are not asked for one.
    """

    key: bytes
    certificate: bytes
    client_ca: bytes | None


class Files(NamedTuple):
    """What the files ask for that flags name.

    Attributes:
      models: To serve.
      batching: None: requests are run one by one.
      ssl: None: no TLS.
      prometheus_path: Where on the HTTP port the metrics are; None: nowhere.
    """

    models: list[Model]
    batching: Batching | None
    ssl: Ssl | None
    prometheus_path: str | None


def read_files(options: argparse.Namespace) -> Files:
    """Reads all files that flags name; see `options.parse`.

    Raises:
      ConfigError: One of them cannot be used.
    """
    return Files(
        models=read_models(options.model_config_file)
        if options.model_config_file
        else [Model(options.model_name, options.model_base_path.absolute())],
        batching=read_batching(options.batching_parameters_file)
        if options.enable_batching
        else None,
        ssl=read_ssl(options.ssl_config_file) if options.ssl_config_file else None,
        prometheus_path=read_prometheus_path(options.monitoring_config_file)
        if options.monitoring_config_file
        else None,
    )


def read_text_proto(path: Path, message: M) -> M:
    """Parses a text proto into a message.

    Raises:
      ConfigError: The file cannot be read, or does not hold such a message.
    """
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), message)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file.") from error
    except text_format.ParseError as error:
        name = message.DESCRIPTOR.name
        raise ConfigError(f"{path} is not a text proto of {name}: {error}") from error


def read_batching(path: Path | None) -> Batching:
    """Reads --batching_parameters_file; None: TF Serving's defaults.

    Raises:
      ConfigError: See `read_text_proto`; or a value is out of range.
    """
    from serving.server.protos import BatchingParameters

    cores = len(os.sched_getaffinity(0))
    if path is None:
        return Batching(threads=cores)
    proto: Any = read_text_proto(path, BatchingParameters())

    def number(field: str, default: int, minimum: int) -> int:
        if not proto.HasField(field):
            return default
        value = getattr(proto, field).value
        if value < minimum:
            raise ConfigError(f"{path}: {field} is {value}, but must be at least {minimum}.")
        return int(value)

    max_batch_size = number("max_batch_size", 1000, 1)
    split = bool(proto.enable_large_batch_splitting.value)
    if proto.HasField("max_execution_batch_size") and not split:
        raise ConfigError(
            f"{path}: max_execution_batch_size needs enable_large_batch_splitting {{ value: true }}"
        )
    execution_size = number("max_execution_batch_size", max_batch_size, 1)
    if execution_size > max_batch_size:
        raise ConfigError(
            f"{path}: max_execution_batch_size is {execution_size}, more than max_batch_size "
            f"({max_batch_size})."
        )
    allowed = tuple(proto.allowed_batch_sizes)
    if allowed:
        if list(allowed) != sorted(set(allowed)) or allowed[0] < 1:
            raise ConfigError(f"{path}: allowed_batch_sizes must be positive and increasing.")
        if allowed[-1] != max_batch_size:
            raise ConfigError(
                f"{path}: the last of allowed_batch_sizes is {allowed[-1]}, but must be "
                f"max_batch_size ({max_batch_size})."
            )
    return Batching(
        max_batch_size=max_batch_size,
        timeout=number("batch_timeout_micros", 0, 0) / 1e6,
        max_enqueued_batches=number("max_enqueued_batches", 10, 1),
        threads=number("num_batch_threads", cores, 1),
        allowed_sizes=allowed,
        pad_inputs=bool(proto.pad_variable_length_inputs),
        split=split,
        max_execution_size=execution_size,
    )


def read_prometheus_path(path: Path | None) -> str | None:
    """Reads --monitoring_config_file: where Prometheus finds its page; None: nowhere.

    Raises:
      ConfigError: See `read_text_proto`; or the path is none.
    """
    from serving.server.protos import MonitoringConfig

    if path is None:
        return None
    proto: Any = read_text_proto(path, MonitoringConfig())
    prometheus = proto.prometheus_config
    if prometheus.path and not prometheus.path.startswith("/"):
        raise ConfigError(f"{path}: path is {prometheus.path!r}, but must begin with '/'.")
    return (prometheus.path or PROMETHEUS_PATH) if prometheus.enable else None


def read_ssl(path: Path) -> Ssl:
    """Reads --ssl_config_file.

    Raises:
      ConfigError: See `read_text_proto`; or key, certificate or CA are missing.
    """
    from serving.server.protos import SSLConfig

    proto: Any = read_text_proto(path, SSLConfig())
    for field in ("server_key", "server_cert", *(("custom_ca",) if proto.client_verify else ())):
        if "-----BEGIN " not in getattr(proto, field):
            raise ConfigError(f"{path}: {field} must hold PEM text (not the name of a file).")
    return Ssl(
        proto.server_key.encode(),
        proto.server_cert.encode(),
        proto.custom_ca.encode() if proto.client_verify else None,
    )


def read_models(path: Path) -> list[Model]:
    """Reads --model_config_file.

    Raises:
      ConfigError: See `read_text_proto`; or it asks for what cannot be served.
    """
    from tensorflow_serving.config import model_server_config_pb2

    proto = read_text_proto(path, model_server_config_pb2.ModelServerConfig())
    try:
        if proto.HasField("custom_model_config"):
            raise ConfigError("custom_model_config is not supported: give a model_config_list.")
        models = [_model(config) for config in proto.model_config_list.config]
        if not models:
            raise ConfigError("model_config_list names no model.")
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"Illegal to list model {name} multiple times in config list")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return models


def _model(config: Any) -> Model:
    name = config.name
    if not name:
        raise ConfigError("a model has no name.")
    # TF Serving's enum has TENSORFLOW = 1; both ways of naming the platform exclude each other.
    platform = config.model_platform or ("tensorflow" if config.model_type == 1 else "")
    if platform != "tensorflow" or (config.model_platform and config.model_type):
        raise ConfigError(f'model {name} needs model_platform: "tensorflow".')
    if not config.base_path.startswith("/"):
        raise ConfigError(
            f"Expected model {name} to have an absolute path or URI; got "
            f"base_path()={config.base_path}"
        )
    if config.HasField("logging_config"):
        raise ConfigError(f"model {name}: logging_config is not supported by this server.")
    policy = config.model_version_policy
    kind = policy.WhichOneof("policy_choice") or "latest"
    if kind == "specific" and not policy.specific.versions:
        raise ConfigError(f"model {name}: the policy `specific` names no versions.")
    return Model(
        name=name,
        base_path=Path(config.base_path),
        policy=kind,
        num_latest=max(policy.latest.num_versions, 1),
        versions=frozenset(policy.specific.versions),
        labels=dict(config.version_labels),
    )
