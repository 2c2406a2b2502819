"""What a request can be answered with instead of a prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc

# Bytes. gRPC carries a status message in a header, which has to stay small (and takes three bytes
# for each that is not ASCII); TF Serving cuts at this, too.
_MESSAGE_LIMIT = 1024


class RequestError(Exception):
    """A request that is refused or failed.

    Attributes:
      code: A canonical status code, a member of grpc.StatusCode.
      message: What was wrong, as TF Serving says it where it has a message for it.
    """

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code
        encoded = message.encode(errors="replace")
        self.message = encoded[:_MESSAGE_LIMIT].decode(errors="ignore")
        if len(encoded) > _MESSAGE_LIMIT:
            self.message += "...TRUNCATED"


_CODES_OF_HTTP = {
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class HttpError(RequestError):
    """What HTTP alone can be refused for.

    Attributes:
      status: Of the answer.
      reason: A word to count it under; empty: it is not.
    """

    def __init__(self, status: int, message: str, reason: str = ""):
        super().__init__(_CODES_OF_HTTP.get(status, grpc.StatusCode.INVALID_ARGUMENT), message)
        self.status = status
        self.reason = reason


@contextlib.contextmanager
def memory_bounded() -> Iterator[None]:
    """Makes RESOURCE_EXHAUSTED of a MemoryError in the block."""
    try:
        yield
    except MemoryError:
        raise resource_exhausted("there is not enough memory for this request now") from None


def invalid_argument(message: str) -> RequestError:
    """The request itself is wrong: sent again it fails again."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


def resource_exhausted(message: str) -> RequestError:
    """A bound of this server is reached: sent again later it may pass."""
    return RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


def deadline_exceeded(message: str) -> RequestError:
    """The client's deadline has passed, nobody waits for the answer."""
    return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, message)


# By the numbers of google.rpc.Code, which TensorFlow's errors carry.
CODES = {code.value[0]: code for code in grpc.StatusCode}
