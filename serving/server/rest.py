"""TF Serving's HTTP paths, readiness, and the page for Prometheus."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
)

from serving.server import json_tensors, metrics
from serving.server.admission import Admission
from serving.server.errors import (
    HttpError,
    RequestError,
    deadline_exceeded,
    invalid_argument,
    memory_bounded,
)
from serving.server.http_bodies import Bodies
from serving.server.http_server import IS_OPEN, HttpServer
from serving.server.json_workers import Workers
from serving.server.predictor import Call, Predictor

_log = logging.getLogger(__name__)

_MODEL = r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_PREDICT = re.compile(rf"(?i){_MODEL}:(?P<method>predict|classify|regress)")
_STATUS = re.compile(rf"(?i){_MODEL}(?P<metadata>/metadata)?")
READY_PATH = "/readyz"
_METHODS = ("GET", "HEAD", "POST")

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
_RETRY_SECONDS = "1"  # After 429 and 503
# All bodies together may take as much as so many of the largest.
_BODIES = 4
_JSON_PROCESSES = 2
_STATUS_THREADS = 2


class RestSettings(NamedTuple):
    """How HTTP is spoken.

    Attributes:
      threads: Predictions that are worked on at a time.
      timeout: Seconds for a request.
      max_body_bytes: Of a request.
      max_connections: At a time.
      prometheus_path: Of the metrics; None: nowhere.
      allow_cors: Whether pages from elsewhere may ask.
    """

    threads: int
    timeout: float
    max_body_bytes: int
    max_connections: int
    prometheus_path: str | None
    allow_cors: bool


class RestServer:
    """Answers over HTTP."""

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
        size = settings.max_body_bytes
        self._bodies = Bodies(size, _BODIES * size, settings.timeout)
        app: Any = self._serve
        if settings.allow_cors:
            app = CORSMiddleware(app, allow_origins=["*"], allow_methods=["GET", "POST"])
        self._server = HttpServer(
            app,
            address,
            settings.max_connections,
            measured.count_refusal,
            self._bodies.drop_stalled,
        )
        self._workers = Workers(_JSON_PROCESSES, size)
        # Made in the event loop; status does not wait for predictions.
        self._prediction_threads: anyio.CapacityLimiter | None = None
        self._status_threads: anyio.CapacityLimiter | None = None
        self._is_draining = False

    def start(self) -> None:
        """Begins to answer."""
        self._server.start()

    def show_drain(self) -> None:
        """Is not ready any more, but goes on answering."""
        self._is_draining = True

    def drain(self, seconds: float) -> None:
        """Refuses new connections and waits for accepted requests."""
        self._server.drain(seconds)
        self._workers.close()

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        try:
            response = await self._respond(request, scope, receive)
        except RequestError as error:
            if isinstance(error, HttpError) and error.reason:
                self._metrics.count_refusal(error.reason, error.message)
            response = _error_response(error)
        await response(scope, receive, send)

    async def _respond(self, request: Request, scope: Any, receive: Any) -> Response:
        path, method = scope["path"], request.method
        if method not in _METHODS:
            raise HttpError(405, f"the method {method} is not supported")
        if method == "POST" and (match := _PREDICT.fullmatch(path)):
            return await self._respond_from_model(match, request, receive)
        if method == "POST":
            raise invalid_argument(f"Malformed request: POST {path}")
        if path == READY_PATH:
            return self._ready()
        if self._status_threads is None:
            self._status_threads = anyio.CapacityLimiter(_STATUS_THREADS)
        return await _in_thread(lambda: self._get(path), self._status_threads)

    def _ready(self) -> Response:
        if self._is_draining:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        if not self._predictor.manager.is_ready:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "not every model is loaded")
        return _json_response(b'{"ready": true}')

    def _get(self, path: str) -> Response:
        if path == self._settings.prometheus_path:
            return Response(self._metrics.page(), media_type=metrics.CONTENT_TYPE)
        match = _STATUS.fullmatch(path)
        if match is None:
            raise invalid_argument(f"Malformed request: GET {path}")
        answer = self._metadata if match["metadata"] else self._status
        return _json_response(json.dumps(answer(_model_spec(match)), indent=1).encode())

    async def _respond_from_model(
        self, match: re.Match[str], request: Request, receive: Any
    ) -> Response:
        deadline = time.monotonic() + self._settings.timeout
        encoding = request.headers.get("content-encoding", "")
        is_wanted = request.scope["extensions"][IS_OPEN]
        async with self._bodies.read(receive, request.headers) as body:
            if self._prediction_threads is None:
                self._prediction_threads = anyio.CapacityLimiter(self._settings.threads)
            with anyio.move_on_after(deadline - time.monotonic()):
                return await _in_thread(
                    lambda: self._answer(match, body, encoding, deadline, is_wanted),
                    self._prediction_threads,
                )
        raise deadline_exceeded("the deadline passed while the request was waiting")

    def _answer(
        self,
        match: re.Match[str],
        body: list[bytes],
        encoding: str,
        deadline: float,
        is_wanted: Callable[[], bool],
    ) -> Response:
        if match["method"].lower() != "predict":
            raise RequestError(grpc.StatusCode.UNIMPLEMENTED, f"{match['method']} is not supported")
        spec = _model_spec(match)
        name = self._predictor.known_name(spec.name)
        with self._metrics.count(name, "REST"), memory_bounded():
            with (
                self._admission,
                self._predictor.manager.servable(spec) as servable,
                self._bodies.inflate(body, encoding) as plain,
            ):
                known = json_tensors.signatures(servable)
                inputs = self._workers.parse(plain, known, deadline, is_wanted)
                signature = servable.signatures[inputs.signature]
                outputs = tuple(signature.outputs)
                call = Call(servable, signature, inputs.arrays, outputs, deadline, is_wanted)
                results = self._predictor.run(call)
            return _json_response(json_tensors.to_json(results, signature, inputs.by_row))

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
        digits = match["version"].lstrip("0") or "0"
        if len(digits) > 19 or int(digits) >= 2**63:
            raise invalid_argument(f"Failed to convert version: {digits[:99]} to numeric.")
        spec.version.value = int(digits)
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


async def _in_thread(function: Callable[[], Response], threads: anyio.CapacityLimiter) -> Response:
    """Calls a function in one of so many threads, and makes a RequestError of what it raises."""
    try:
        return await anyio.to_thread.run_sync(function, limiter=threads)
    except RequestError:
        raise
    except MemoryError:
        code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, "there is not enough memory now"
    except Exception as error:
        code, message = grpc.StatusCode.INTERNAL, "internal error, see the server's log"
        if "can't start new thread" in str(error):
            code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, "there are too many threads now"
        else:
            _log.exception("a request failed")
    raise RequestError(code, message)


def _json_response(content: bytes, status: int = 200) -> Response:
    return Response(content + b"\n", status, media_type="application/json")


def _error_response(error: RequestError) -> Response:
    content = json.dumps({"error": error.message}).encode()
    status = _HTTP_STATUS.get(error.code, 500)
    if isinstance(error, HttpError):
        status = error.status
    response = _json_response(content, status)
    if status in (429, 503):
        response.headers["retry-after"] = _RETRY_SECONDS
    if status == 405:
        response.headers["allow"] = ", ".join(_METHODS)
    return response
