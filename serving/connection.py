"""A connection to a model server: TLS, retries, deadlines, and errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from serving.images import ServingError, read
from serving.protos import model_service_pb2_grpc, prediction_service_pb2_grpc

# Within the deadline of a request; five attempts are the most that gRPC makes.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
_MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = [
    ("grpc.service_config", json.dumps(_RETRIES)),
    # A request that does not fit into this buffer is never sent again: 256 KB unless said.
    ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
]


class ServerError(ServingError):
    """A model server cannot be reached, or refuses a request.

    Attributes:
      code: gRPC's status code.
    """

    def __init__(self, message: str, code: grpc.StatusCode):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Tls:
    """How to encrypt, and whom to trust.

    Args:
      ca: PEM file of the authorities that may have signed the server's certificate; None for
        those that gRPC trusts anyway.
      cert: PEM file of this client's certificate, where the server asks for one.
      key: PEM file of its private key.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
          ServingError: One cannot be read, or a certificate and its key are not both there.
        """
        if (self.cert is None) != (self.key is None):
            raise ServingError("a client's certificate and its key go together: give both.")
        ca, key, cert = (path and read(path) for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


class Connection:
    """The stubs of one model server; opens the connection with the first request.

    Args:
      server: HOST:PORT.
      tls: None for an unencrypted connection.

    Raises:
      ServingError: See `Tls.credentials`.
    """

    def __init__(self, server: str, tls: Tls | None = None):
        self.server = server
        self._encrypted = tls is not None
        if tls:
            self._channel = grpc.secure_channel(server, tls.credentials(), CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(server, CHANNEL_OPTIONS)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self.model = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def call(self, method: Callable[..., Any], request: Any, timeout: float) -> Any:
        """Sends a request, again where the server is busy or away for a moment.

        Args:
          method: Of one of the stubs.
          request: Its message.
          timeout: Seconds for all attempts together.

        Raises:
          ServerError: What became of it.
        """
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            raise ServerError(self._explain(code, details, timeout), code) from error
        except ValueError as error:  # of the channel: the address, or it is closed
            raise ServingError(f"cannot use the server {self.server}: {error}.") from error

    def _explain(self, code: grpc.StatusCode, details: str, timeout: float) -> str:
        details = details.strip().rstrip(".")
        if code is grpc.StatusCode.UNAVAILABLE:
            if "DNS" in details or "resolution" in details:
                return f"there is no host {self.server.rpartition(':')[0]!r}: {details}."
            if self._encrypted and any(sign in details for sign in ("SSL", "handshake", "TLS")):
                return (
                    f"no TLS connection to {self.server}: {details}. Either it does not use TLS, "
                    "its certificate is not signed by --ca or not for that host name, or it wants "
                    "a client's certificate (--cert, --key)."
                )
            uses, flags = ("does not use", "leave out") if self._encrypted else ("uses", "give")
            return (
                f"no model server answers at {self.server} ({details}): start one, or correct "
                f"the address. If it {uses} TLS, {flags} --tls or --ca."
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{self.server} has not answered within {timeout:g} s."
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            if "larger than max" in details:
                return f"{self.server} refuses so large a request: {details}."
            return f"{self.server} is overloaded, try again later: {details}."
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return f"{self.server} is no TF Serving: {details}."
        return f"{self.server} answers {code.name}: {details}."
