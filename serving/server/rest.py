"""TF Serving's HTTP paths, and the page for Prometheus."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import grpc
import uvicorn
from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
)

from serving.server import json_tensors, metrics
from serving.server.admission import Admission
from serving.server.errors import RequestError, invalid_argument, resource_exhausted
from serving.server.predictor import Call, Predictor, find_signature

_log = logging.getLogger(__name__)

_MODEL = r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_PREDICT = re.compile(rf"(?i){_MODEL}:(?P<method>predict|classify|regress)")
_STATUS = re.compile(rf"(?i){_MODEL}(?P<metadata>/metadata)?")

# As TF Serving translates them; what is missing here is 500.
_HTTP_STATUS = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}


class RestSettings(NamedTuple):
    """How HTTP is spoken.

    Attributes:
      threads: Requests that are worked on at a time.
      timeout: Seconds for a request.
      max_body_bytes: Of a request.
      prometheus_path: Of the metrics; None: nowhere.
      allow_cors: Whether pages from elsewhere may ask.
    """

    threads: int
    timeout: float
    max_body_bytes: int
    prometheus_path: str | None
    allow_cors: bool


class RestServer:
    """The HTTP server, in a thread."""

    def __init__(
        self,
        predictor: Predictor,
        admission: Admission,
        measured: metrics.Metrics,
        settings: RestSettings,
        address: tuple[str, int],
    ):
        """Takes the port.

        Raises:
          OSError: It is taken, or the address is not this machine's.
        """
        self._predictor = predictor
        self._admission = admission
        self._metrics = measured
        self._settings = settings
        self._limiter: anyio.CapacityLimiter | None = None  # Made in the thread's event loop
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            self._socket = socket.create_server(address, family=family, backlog=128)
        except OSError as error:
            raise OSError(f"{address[0]}:{address[1]} cannot be listened on: {error}") from error
        config = uvicorn.Config(
            self._app(),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=4 * settings.threads,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="rest", daemon=True
        )

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def drain(self, seconds: float) -> None:
        """Refuses new connections and waits for accepted requests."""
        self._server.config.timeout_graceful_shutdown = math.ceil(seconds)
        self._server.should_exit = True
        self._thread.join(seconds + 1)

    def _app(self) -> Starlette:
        routes = [Route("/{path:path}", self._handle, methods=["GET", "POST"])]
        if self._settings.prometheus_path is not None:
            routes.insert(0, Route(self._settings.prometheus_path, self._show_metrics))
        cors = Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["GET", "POST"])
        app = Starlette(routes=routes, middleware=[cors] if self._settings.allow_cors else [])
        return app

    async def _show_metrics(self, request: Request) -> Response:
        page = await anyio.to_thread.run_sync(self._metrics.page)
        return Response(page, media_type=metrics.CONTENT_TYPE)

    async def _handle(self, request: Request) -> Response:
        begin = time.monotonic()
        try:
            body = await self._read(request)
        except RequestError as error:
            return _error_response(error, 413)
        except ClientDisconnect:
            return Response(status_code=499)
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(self._settings.threads)
        deadline = begin + self._settings.timeout
        return await anyio.to_thread.run_sync(
            lambda: self._answer(request.method, request.scope["path"], body, deadline),
            limiter=self._limiter,
        )

    async def _read(self, request: Request) -> bytes:
        chunks = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self._settings.max_body_bytes:
                raise resource_exhausted(
                    f"the body is larger than {self._settings.max_body_bytes} bytes"
                )
            chunks.append(chunk)
        return b"".join(chunks)

    def _answer(self, method: str, path: str, body: bytes, deadline: float) -> Response:
        try:
            return self._dispatch(method, path, body, deadline)
        except RequestError as error:
            return _error_response(error)
        except Exception:
            _log.exception("a request failed")
            return _error_response(
                RequestError(grpc.StatusCode.INTERNAL, "internal error, see the server's log")
            )

    def _dispatch(self, method: str, path: str, body: bytes, deadline: float) -> Response:
        if method == "POST" and (match := _PREDICT.fullmatch(path)):
            if match["method"].lower() != "predict":
                raise RequestError(
                    grpc.StatusCode.UNIMPLEMENTED, f"{match['method']} is not supported"
                )
            spec = _model_spec(match)
            with self._metrics.count(self._predictor.known_name(spec.name), "REST"):
                return _json_response(self._predict(spec, body, deadline))
        if method == "GET" and (match := _STATUS.fullmatch(path)):
            answer = self._metadata if match["metadata"] else self._status
            return _json_response(json.dumps(answer(_model_spec(match)), indent=1).encode())
        raise invalid_argument(f"Malformed request: {method} {path}")

    def _predict(self, spec: Any, body: bytes, deadline: float) -> bytes:
        with self._admission:
            document = json_tensors.parse(body)
            with self._predictor.manager.servable(spec) as servable:
                signature = find_signature(servable, document.get("signature_name", ""))
                inputs = json_tensors.to_arrays(document, signature)
                call = Call(servable, signature, inputs, tuple(signature.outputs), deadline)
                results = self._predictor.run(call)
        return json_tensors.to_json(results, signature, "instances" in document)

    def _metadata(self, spec: Any) -> dict[str, Any]:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=spec, metadata_field=["signature_def"]
        )
        response = self._predictor.metadata(request)
        definitions = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(definitions)
        return {
            "model_spec": _to_dict(response.model_spec),
            "metadata": {"signature_def": _to_dict(definitions)},
        }

    def _status(self, spec: Any) -> dict[str, Any]:
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=spec)
        return _to_dict(self._predictor.status(request))


def _model_spec(match: re.Match[str]) -> Any:
    spec = model_pb2.ModelSpec(name=match["name"])
    if match["version"]:
        number = int(match["version"])
        if number >= 2**63:
            raise invalid_argument(f"Failed to convert version: {number} to numeric.")
        spec.version.value = number
    elif match["label"]:
        spec.version_label = match["label"]
    return spec


def _to_dict(message: Message) -> dict[str, Any]:
    """As TF Serving prints it: fields by their names, with those that have their default value."""
    convert: Callable[..., dict[str, Any]] = json_format.MessageToDict
    try:
        return convert(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    except TypeError:  # Before protobuf 5
        return convert(
            message, preserving_proto_field_name=True, including_default_value_fields=True
        )


def _json_response(content: bytes, status: int = 200) -> Response:
    return Response(content + b"\n", status, media_type="application/json")


def _error_response(error: RequestError, status: int | None = None) -> Response:
    content = json.dumps({"error": error.message}).encode()
    return _json_response(content, status or _HTTP_STATUS.get(error.code, 500))
