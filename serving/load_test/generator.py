"""Sends load to a model server, in closed and open loops, and records what becomes of it.

One process and one thread: the requests are serialized before, the answers are not decoded, so
that the generator takes as little as possible of the cores that the server may be running on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from serving.connection import Tls
from serving.load_test.results import OK, Result, summarize

_METHOD = "/tensorflow.serving.PredictionService/Predict"
_CHANNEL_OPTIONS = [
    # A request that fails is to be seen, not sent again.
    ("grpc.enable_retries", 0),
    # Or all channels to one server would share a connection, with its 100 requests at a time.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]
_CLIENTS_PER_CHANNEL = 32
# What a client does that is told that the server is overloaded.
_PAUSE_AFTER_REFUSAL = 0.05

_Call = Callable[[], Awaitable[str]]


@dataclasses.dataclass(frozen=True)
class Target:
    """What to send, and where.

    Args:
      server: HOST:PORT.
      request: A serialized PredictRequest.
      batch: Images in it.
      tls: None for unencrypted connections.
      timeout: Seconds after which a request is given up.
    """

    server: str
    request: bytes
    batch: int
    tls: Tls | None = None
    timeout: float = 30.0


def closed_loop(
    target: Target,
    concurrency: int,
    seconds: float,
    warmup: float,
    tick: Callable[[], None] | None = None,
) -> Result:
    """Measures clients each of which sends its next request when it has the answer.

    Args:
      target: What to send.
      concurrency: Number of clients.
      seconds: Length of the measurement.
      warmup: Seconds of the same load before it, which do not count.
      tick: Called each second.
    """
    return asyncio.run(_closed_loop(target, concurrency, seconds, warmup, tick))


def open_loop(target: Target, rate: float, seconds: float, warmup: float, seed: int = 0) -> Result:
    """Measures requests that arrive when they do, whether or not earlier ones were answered.

    The times between them are drawn from an exponential distribution (a Poisson process). A
    latency counts from when the request was meant to be sent: where the server, or this generator,
    falls behind, the waiting is in the figures, rather than left out with the requests that a
    waiting client would not have sent ("coordinated omission").

    Args:
      target: What to send.
      rate: Requests a second.
      seconds: Length of the measurement.
      warmup: Seconds of the same load before it, which do not count.
      seed: Fixes the arrival times.
    """
    return asyncio.run(_open_loop(target, rate, seconds, warmup, seed))


async def _closed_loop(
    target: Target,
    concurrency: int,
    seconds: float,
    warmup: float,
    tick: Callable[[], None] | None,
) -> Result:
    outcomes: list[tuple[str, float]] = []
    begin = time.perf_counter() + warmup
    end = begin + seconds

    async def client(call: _Call) -> None:
        while (start := time.perf_counter()) < end:
            code = await call()
            if begin <= start:
                outcomes.append((code, time.perf_counter() - start))
            if code == grpc.StatusCode.RESOURCE_EXHAUSTED.name:
                await asyncio.sleep(_PAUSE_AFTER_REFUSAL)

    async with _calls(target, concurrency) as calls:
        clients = [asyncio.create_task(client(calls[i % len(calls)])) for i in range(concurrency)]
        await asyncio.sleep(max(0.0, begin - time.perf_counter()))
        cpu = time.process_time()
        while (left := end - time.perf_counter()) > 0:
            await asyncio.sleep(min(1.0, left))
            if tick:
                tick()
        await asyncio.gather(*clients)
        # Up to the last answer: its request counts, and so does the time that it took.
        elapsed = time.perf_counter() - begin
        cpu = (time.process_time() - cpu) / elapsed
    return summarize(
        "closed",
        batch=target.batch,
        seconds=elapsed,
        outcomes=outcomes,
        concurrency=concurrency,
        client_cpu=cpu,
    )


async def _open_loop(
    target: Target, rate: float, seconds: float, warmup: float, seed: int
) -> Result:
    outcomes: list[tuple[str, float]] = []
    under_way: set[asyncio.Task[None]] = set()
    most = 0
    draw = random.Random(seed)
    begin = time.perf_counter() + warmup
    end = begin + seconds
    intended = time.perf_counter()

    async def send(call: _Call, intended: float) -> None:
        code = await call()
        if intended >= begin:
            outcomes.append((code, time.perf_counter() - intended))

    # Connections for all that may be under way at a time, were each to take a second.
    async with _calls(target, max(1, round(rate))) as calls:
        number = 0
        cpu = time.process_time()
        while (intended := intended + draw.expovariate(rate)) < end:
            if (wait := intended - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            elif number % 16 == 0:
                await asyncio.sleep(0)  # behind time: answers must be read nevertheless
            task = asyncio.create_task(send(calls[number % len(calls)], intended))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            most = max(most, len(under_way))
            number += 1
        await asyncio.gather(*under_way)
        elapsed = max(time.perf_counter() - begin, seconds)
        cpu = (time.process_time() - cpu) / (elapsed + warmup)
    return summarize(
        "open",
        batch=target.batch,
        seconds=elapsed,
        outcomes=outcomes,
        concurrency=most,
        rate=rate,
        client_cpu=cpu,
    )


@contextlib.asynccontextmanager
async def _calls(target: Target, concurrency: int) -> AsyncIterator[list[_Call]]:
    """Opens enough connections; yields for each a function that sends the request once."""
    async with contextlib.AsyncExitStack() as stack:
        calls = []
        for _ in range(-(-concurrency // _CLIENTS_PER_CHANNEL)):
            channel = await stack.enter_async_context(_channel(target))
            calls.append(_call(channel, target))
        yield calls


def _channel(target: Target) -> grpc.aio.Channel:
    if target.tls:
        return grpc.aio.secure_channel(target.server, target.tls.credentials(), _CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(target.server, _CHANNEL_OPTIONS)


def _call(channel: grpc.aio.Channel, target: Target) -> _Call:
    predict = channel.unary_unary(_METHOD)  # without serializers: bytes as they are

    async def call() -> str:
        try:
            await predict(target.request, timeout=target.timeout)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return OK

    return call
