"""Puts the parts of a server together, and takes them apart in order."""

from __future__ import annotations

import argparse
import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from serving.server.config import ConfigError, Model
from serving.server.grpc_server import Admission, GrpcServer
from serving.server.manager import Manager
from serving.server.predictor import Limits, Predictor
from serving.server.servable import Servable
from serving.server.versions import Version

_log = logging.getLogger(__name__)

_M_ARENA_MAX = -8  # malloc.h


class Server:
    """A running server."""

    def __init__(self, manager: Manager, grpc_server: GrpcServer, drain_seconds: float):
        self._manager = manager
        self._grpc_server = grpc_server
        self._drain_seconds = drain_seconds

    def stop(self) -> None:
        """Refuses new requests, finishes accepted ones."""
        _log.info("draining: new requests are refused, accepted ones finished")
        self._grpc_server.drain(self._drain_seconds)
        _log.info("stopped")


def start(options: argparse.Namespace, models: Sequence[Model]) -> Server:
    """Starts a server: it listens at once, and is healthy when its models are loaded.

    Args:
      options: See `options.parse`.
      models: To serve.

    Raises:
      ConfigError: A flag's value is of no use.
      OSError: A port cannot be listened on.
    """
    _bound_arenas()
    tf.get_logger().setLevel("ERROR")
    session_config = _session_config(options)
    tags = options.saved_model_tags.split(",")
    arguments = _channel_arguments(options.grpc_channel_arguments)

    def load(name: str, version: Version) -> Servable:
        servable = Servable(name, version.number, version.path, tags, session_config)
        if options.enable_model_warmup:
            iterations = max(options.num_request_iterations_for_warmup, 1)
            try:
                count = servable.warm_up(version.path, predictor.predict_on, iterations)
            except BaseException:
                servable.close()
                raise
            if count:
                _log.info("model %s version %d: %d warm-up requests", name, version.number, count)
        return servable

    manager = Manager(
        models,
        load,
        poll_seconds=options.file_system_poll_wait_seconds,
        max_retries=options.max_num_load_retries,
        retry_seconds=max(options.load_retry_interval_micros, 0) / 1e6,
        labels_for_unavailable=options.allow_version_labels_for_unavailable_models,
        on_change=lambda: grpc_server.show_health(manager.is_ready),
    )
    limits = Limits(options.max_message_bytes, options.max_image_pixels)
    predictor = Predictor(manager, limits)
    admission = Admission(min(options.max_concurrent_requests, options.grpc_max_threads))
    grpc_server = GrpcServer(
        predictor,
        admission,
        threads=options.grpc_max_threads,
        max_message_bytes=options.max_message_bytes,
        arguments=arguments,
    )
    address = f"{options.host}:{options.port}"
    grpc_server.bind(address)
    grpc_server.start()
    manager.start()
    _log.info("gRPC on %s", address)
    return Server(manager, grpc_server, options.drain_seconds)


def _bound_arenas() -> None:
    """Keeps glibc from giving each of many threads a heap of its own, which only grow."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 4)


def _session_config(options: argparse.Namespace) -> Any:
    session = options.tensorflow_session_parallelism
    intra = options.tensorflow_intra_op_parallelism
    inter = options.tensorflow_inter_op_parallelism
    if session and (intra or inter):
        raise ConfigError(
            "--tensorflow_session_parallelism sets both --tensorflow_intra_op_parallelism and "
            "--tensorflow_inter_op_parallelism: give it, or them."
        )
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=intra or session,
        inter_op_parallelism_threads=inter or session,
    )
    config.gpu_options.per_process_gpu_memory_fraction = options.per_process_gpu_memory_fraction
    return config


def _channel_arguments(text: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--grpc_channel_arguments: {item!r} is not of the form key=value.")
        try:
            pairs.append((key, int(value)))
        except ValueError:
            pairs.append((key, value))
    return pairs
