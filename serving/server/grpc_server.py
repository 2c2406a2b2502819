"""TF Serving's gRPC services, health and reflection."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.server.admission import Admission
from serving.server.config import Ssl
from serving.server.errors import RequestError, memory_bounded
from serving.server.metrics import Metrics
from serving.server.predictor import Predictor

_log = logging.getLogger(__name__)

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"
# TF Serving's health service knows them without their package; the empty name is the server.
_HEALTH_NAMES = ("", PREDICTION_SERVICE, MODEL_SERVICE, "PredictionService", "ModelService")

_LINGER_SECONDS = 0.1

T = TypeVar("T")


class _Accepted:
    """Counts RPCs from when they are let in until their answers are sent.

    gRPC's own graceful stop would lose some: those that have arrived when it begins, but have no
    thread yet, end as CANCELLED, which no client takes for a reason to ask another server.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._is_closed = False

    def add(self, context: grpc.ServicerContext) -> None:
        """Lets an RPC in.

        Raises:
          RequestError: UNAVAILABLE, none are let in any more.
        """
        with self._changed:
            if self._is_closed:
                raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            self._count += 1
        if not context.add_callback(self._remove):
            self._remove()  # It has ended already: the client has gone

    def _remove(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Lets none in any more, and waits for those that are in, for a while."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._count, seconds)


class _Deserializing(grpc.ServerInterceptor):
    """Parses requests in the threads of RPCs, and refuses what is none as INVALID_ARGUMENT.

    gRPC would do it in the one thread that serves all, which a MemoryError ends, answer INTERNAL,
    and write a traceback for each.
    """

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        method = details.method

        def parse(content: bytes, context: grpc.ServicerContext) -> Any:
            try:
                return handler.request_deserializer(content)
            except MemoryError:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not enough memory now")
            except Exception:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no request for {method}")

        def parse_each(contents: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            for content in contents:
                yield parse(content, context)

        def wrap(behavior: Any) -> Any:
            prepare = parse_each if handler.request_streaming else parse
            return behavior and (lambda content, ctx: behavior(prepare(content, ctx), ctx))

        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        wrapped = {kind: wrap(getattr(handler, kind)) for kind in kinds}
        return handler._replace(request_deserializer=None, **wrapped)


def _answer(accepted: _Accepted, context: grpc.ServicerContext, function: Callable[[], T]) -> T:
    """Calls a function and turns what it raises into a status."""
    try:
        accepted.add(context)
        with memory_bounded():
            return function()
    except RequestError as error:
        code, message = error.code, error.message
    except Exception:
        _log.exception("a request failed")
        code, message = grpc.StatusCode.INTERNAL, "internal error, see the server's log"
    context.abort(code, message)
    raise AssertionError("abort raises")


class _PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Classify, Regress and MultiInference stay UNIMPLEMENTED: models here have no such methods."""

    def __init__(
        self, predictor: Predictor, admission: Admission, metrics: Metrics, accepted: _Accepted
    ):
        self._predictor = predictor
        self._accepted = accepted
        self._admission = admission
        self._metrics = metrics

    def Predict(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        """Answers from a model."""

        def predict() -> predict_pb2.PredictResponse:
            remaining = context.time_remaining()
            deadline = math.inf if remaining is None else time.monotonic() + remaining
            name = self._predictor.known_name(request.model_spec.name)
            with self._metrics.count(name, "GRPC"), memory_bounded(), self._admission:
                return self._predictor.predict(request, deadline, context.is_active)

        return _answer(self._accepted, context, predict)

    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Tells a model's signatures."""
        return _answer(self._accepted, context, lambda: self._predictor.metadata(request))


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, predictor: Predictor, accepted: _Accepted):
        self._predictor = predictor
        self._accepted = accepted

    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Tells the states of a model's versions."""
        return _answer(self._accepted, context, lambda: self._predictor.status(request))


class GrpcServer:
    """The gRPC server; every RPC has a thread, and RPCs beyond the threads are refused."""

    def __init__(
        self,
        predictor: Predictor,
        admission: Admission,
        metrics: Metrics,
        *,
        threads: int,
        max_message_bytes: int,
        arguments: Sequence[tuple[str, Any]] = (),
    ):
        """Sets up.

        Args:
          predictor: Answers.
          admission: Bounds predictions.
          metrics: Counts them.
          threads: RPCs of any kind at a time.
          max_message_bytes: Of a request.
          arguments: gRPC's channel arguments.
        """
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="rpc"),
            interceptors=[_Deserializing()],
            maximum_concurrent_rpcs=threads,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # A second server on the same port is a mistake, not a way to share it.
                ("grpc.so_reuseport", 0),
                *arguments,
            ],
        )
        self._accepted = _Accepted()
        self._health = health.HealthServicer()
        self.show_health(False)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            _PredictionService(predictor, admission, metrics, self._accepted), self._server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            _ModelService(predictor, self._accepted), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (PREDICTION_SERVICE, MODEL_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME),
            self._server,
        )

    def bind(self, address: str, ssl: Ssl | None) -> None:
        """Takes a port.

        Args:
          address: `host:port` or `unix:path`.
          ssl: For TLS; None: without.

        Raises:
          OSError: It is taken, the address is not this machine's, or TLS cannot be set up.
        """
        try:
            if ssl is None:
                port = self._server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(ssl.key, ssl.certificate)],
                    root_certificates=ssl.client_ca,
                    require_client_auth=ssl.client_ca is not None,
                )
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        if not port:  # How other versions of gRPC tell
            raise OSError(f"{address} cannot be listened on")

    def start(self) -> None:
        """Begins to answer."""
        self._server.start()

    def show_health(self, is_serving: bool) -> None:
        """Tells clients of the health service whether to send requests."""
        status = health_pb2.HealthCheckResponse
        for name in _HEALTH_NAMES:
            self._health.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    def drain(self, seconds: float) -> None:
        """Refuses new RPCs, as UNAVAILABLE, and waits for the accepted ones, for a while."""
        self._health.enter_graceful_shutdown()
        self._accepted.close(seconds)
        # What was sent last is to arrive before the process ends, which may reset connections.
        time.sleep(_LINGER_SECONDS)

    def close(self) -> None:
        """Gives the ports back and cuts off every RPC."""
        self._server.stop(None).wait()
