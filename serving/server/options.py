"""The flags: tensorflow_model_server's where it has them, so that either starts the same way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Flags of tensorflow_model_server that would be accepted and do nothing here.
_UNSUPPORTED = {
    "enable_per_model_batching_parameters": "give --batching_parameters_file",
    "enable_profiler": "there is no profiler service",
    "enable_serialization_as_tensor_content": "it is always so",
    "enable_signature_method_name_check": "method names are not looked at",
    "flush_filesystem_caches": "caches are left alone",
    "mixed_precision": "export the model in the precision that it is to have",
    "num_load_threads": "versions are loaded one at a time, beside the requests",
    "num_tflite_interpreters_per_pool": "TensorFlow Lite models are not served",
    "num_tflite_pools": "TensorFlow Lite models are not served",
    "num_unload_threads": "versions are unloaded one at a time, beside the requests",
    "platform_config_file": "only the platform `tensorflow` is served",
    "prefer_tflite_model": "TensorFlow Lite models are not served",
    "remove_unused_fields_from_bundle_metagraph": "the graph is not kept twice",
    "skip_initialize_tpu": "there is no TPU support",
    "thread_pool_factory_config_file": "there is one thread pool",
    "use_alts_credentials": "give --ssl_config_file",
    "xla_cpu_compilation_enabled": "export the model with jit_compile",
    "xla_gpu_compilation_enabled": "export the model with jit_compile",
}


class _Unsupported(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(
            f"--{self.dest} of tensorflow_model_server is not supported by this server: "
            f"{_UNSUPPORTED[self.dest]}"
        )


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [item.partition("=") for item in text.split(",") if item]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value,...")
    return [(key, value) for key, _, value in pairs]


def _at_least(minimum: int) -> type[int]:
    class Number(int):
        def __new__(cls, text: str) -> Number:
            number = super().__new__(cls, text)
            if number < minimum:
                raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
            return number

    Number.__name__ = "whole number"
    return Number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line.

    Raises:
      SystemExit: With code 2 and a message when it cannot be served so.
    """
    parser = argparse.ArgumentParser(
        prog="vit-server",
        description="Serves models over TF Serving's gRPC and REST protocols.",
        allow_abbrev=False,
    )
    whole, positive = _at_least(0), _at_least(1)
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    switch: dict[str, Any] = {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}

    models = parser.add_argument_group("models")
    models.add_argument("--model_name", default="default", help="name in requests (%(default)s)")
    models.add_argument(
        "--model_base_path", type=Path, help="folder whose numbered folders are its versions"
    )
    models.add_argument(
        "--model_config_file",
        type=Path,
        help="ModelServerConfig: several models, version policies, labels (instead of the two)",
    )
    models.add_argument(
        "--model_config_file_poll_wait_seconds",
        **{**seconds, "default": 0.0},
        help="between looks for changes of that file; 0: never (%(default)s)",
    )
    models.add_argument(
        "--file_system_poll_wait_seconds",
        **{**seconds, "default": 1.0},
        help="between looks for new versions; 0: one look (%(default)s)",
    )
    models.add_argument("--max_num_load_retries", type=whole, default=5, help="(%(default)s)")
    models.add_argument(
        "--load_retry_interval_micros", type=int, default=60_000_000, help="(%(default)s)"
    )
    models.add_argument(
        "--allow_version_labels_for_unavailable_models",
        default=False,
        **switch,
        help="let a label stand for a version that is not there",
    )
    models.add_argument(
        "--no_fallback",
        action="store_true",
        help="serve nothing in place of a version that cannot be loaded, as TF Serving does; else "
        "the newest one that can, until it can",
    )
    models.add_argument("--saved_model_tags", default="serve", help="comma-separated (%(default)s)")
    models.add_argument(
        "--enable_model_warmup",
        default=True,
        **switch,
        help="replay assets.extra/tf_serving_warmup_requests before answering (%(default)s)",
    )
    models.add_argument(
        "--num_request_iterations_for_warmup", type=whole, default=0, help="0 means once"
    )

    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    network.add_argument("--port", type=positive, default=8500, help="of gRPC (%(default)s)")
    network.add_argument(
        "--rest_api_port", type=whole, default=0, help="of HTTP; 0: no HTTP (%(default)s)"
    )
    network.add_argument(
        "--ssl_config_file",
        type=Path,
        help="SSLConfig: TLS on the gRPC port, with client_verify mTLS",
    )
    network.add_argument("--grpc_socket_path", help="Unix socket to listen on for gRPC, too")
    network.add_argument(
        "--grpc_max_threads",
        type=positive,
        help="RPCs of any kind at a time (16 more than --max_concurrent_requests)",
    )
    network.add_argument(
        "--grpc_channel_arguments",
        type=_pairs,
        default=[],
        metavar="KEY=VALUE,...",
        help="gRPC's own settings",
    )
    network.add_argument("--rest_api_num_threads", type=positive, default=16, help="(%(default)s)")
    network.add_argument(
        "--rest_api_timeout_in_ms", type=positive, default=30_000, help="(%(default)s)"
    )
    network.add_argument(
        "--rest_api_max_connections",
        type=positive,
        default=2048,
        help="at a time; of more, the one that has been idle for the longest is closed "
        "(%(default)s)",
    )
    network.add_argument(
        "--rest_api_enable_cors_support",
        default=False,
        **switch,
        help="let pages from elsewhere ask over HTTP",
    )
    network.add_argument(
        "--monitoring_config_file", type=Path, help="MonitoringConfig: metrics on the HTTP port"
    )
    network.add_argument(
        "--enable_grpc_healthcheck_service", default=True, **switch, help=argparse.SUPPRESS
    )

    batching = parser.add_argument_group("batching")
    batching.add_argument(
        "--enable_batching",
        default=False,
        **switch,
        help="run requests together that arrive at about the same time",
    )
    batching.add_argument(
        "--batching_parameters_file", type=Path, help="BatchingParameters: sizes, timeout, queue"
    )

    bounds = parser.add_argument_group("bounds: what is beyond them is answered RESOURCE_EXHAUSTED")
    bounds.add_argument(
        "--max_concurrent_requests", type=positive, default=128, help="(%(default)s)"
    )
    bounds.add_argument(
        "--max_message_bytes",
        type=positive,
        default=64 << 20,
        help="of a request, and of an input once it is unpacked (%(default)s)",
    )
    bounds.add_argument(
        "--max_image_pixels",
        type=positive,
        default=25_000_000,
        help="of an encoded image; a larger one is answered INVALID_ARGUMENT (%(default)s)",
    )
    bounds.add_argument(
        "--drain_seconds",
        **{**seconds, "default": 30.0},
        help="for accepted requests to end after SIGTERM, SIGINT or SIGHUP (%(default)s)",
    )
    bounds.add_argument(
        "--drain_pause_seconds",
        **{**seconds, "default": 0.0},
        help="after SIGTERM in which it is not ready, but still lets requests in: as long as a "
        "cluster needs to send no more (%(default)s)",
    )

    runtime = parser.add_argument_group("TensorFlow")
    for flag in ("session", "intra_op", "inter_op"):
        runtime.add_argument(
            f"--tensorflow_{flag}_parallelism", type=whole, default=0, help="threads; 0: automatic"
        )
    runtime.add_argument(
        "--per_process_gpu_memory_fraction", type=float, default=0.0, help="0.0: automatic"
    )
    for flag in _UNSUPPORTED:
        parser.add_argument(f"--{flag}", nargs="?", action=_Unsupported, help=argparse.SUPPRESS)

    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.model_base_path is None and options.model_config_file is None:
        parser.error(
            "give --model_base_path (the folder that was pushed to) or --model_config_file"
        )
    if not options.model_name:
        parser.error("--model_name is empty")
    for flag in (
        "file_system_poll_wait_seconds",
        "model_config_file_poll_wait_seconds",
        "drain_seconds",
        "drain_pause_seconds",
    ):
        if getattr(options, flag) < 0:
            parser.error(f"--{flag} is negative")
    if options.batching_parameters_file is not None and not options.enable_batching:
        parser.error("--batching_parameters_file is set without --enable_batching")
    if options.monitoring_config_file is not None and not options.rest_api_port:
        parser.error("--monitoring_config_file needs --rest_api_port, where the metrics are shown")
    if options.rest_api_port == options.port:
        parser.error("--rest_api_port must not be the same as --port")
    if not options.enable_grpc_healthcheck_service:
        parser.error("--enable_grpc_healthcheck_service=false: the health service is always there")
    if options.tensorflow_session_parallelism and (
        options.tensorflow_intra_op_parallelism or options.tensorflow_inter_op_parallelism
    ):
        parser.error(
            "--tensorflow_session_parallelism sets both --tensorflow_intra_op_parallelism and "
            "--tensorflow_inter_op_parallelism: give it, or them"
        )
    if options.grpc_max_threads is None:
        options.grpc_max_threads = options.max_concurrent_requests + 16
