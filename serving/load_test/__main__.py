"""Load test of a model server: TF Serving, or the one in `serving/server`.

python -m serving.load_test --server HOST:PORT                  # any server
python -m serving.load_test --start MODEL_DIR --in_process MODEL_DIR
                              # starts one, and compares with calling the model without it
python -m serving.load_test --start MODEL_DIR --soak 10         # ten minutes at saturation
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from serving.client import DEFAULT_MODEL, Client
from serving.connection import Tls
from serving.encoding import INPUTS, encode
from serving.images import ServingError
from serving.load_test.chart import draw
from serving.load_test.comparison import Comparison, compare
from serving.load_test.generator import Target, closed_loop, open_loop
from serving.load_test.results import Result, table
from serving.load_test.soak import Soak, soak
from serving.server_process import ModelServerError, serve

BATCHING_FILE = Path(__file__).parents[1] / "config" / "batching.config"
_LOAD_SECONDS = 300.0
_N = TypeVar("_N", int, float)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurements of a command line; prints a table, writes JSON and a chart.

    Raises:
      SystemExit: With code 1 and a message when the server or the model cannot be used, or when a
        soak found other errors than it should.
    """
    options = _parse(arguments)
    try:
        with _server(options) as (server, pid):
            failed = _run(options, server, pid)
    except (ServingError, ModelServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if failed:
        raise SystemExit(1)


def _run(options: argparse.Namespace, server: str, pid: int | None) -> bool:
    """Measures, prints and writes; returns whether a soak has failed."""
    targets = {batch: _target(options, server, batch) for batch in {1, *options.batch}}
    print(f"server {server}, model {options.model}, {os.cpu_count()} cores here", flush=True)
    compared: list[Result] = []
    comparison: Comparison | None = None
    if options.in_process:
        print("comparing with the model in a process ...", flush=True)
        comparison = compare(
            targets[1],
            options.in_process,
            rounds=options.rounds,
            seconds=options.seconds,
            warmup=options.warmup,
            report=compared.append,
        )
    results: list[Result] = []
    for batch in options.batch:
        print(f"requests of {batch} image{'s' if batch > 1 else ''} ...", flush=True)
        for concurrency in options.concurrency:
            results.append(
                closed_loop(targets[batch], concurrency, options.seconds, options.warmup)
            )
        for rate in options.rates:
            results.append(open_loop(targets[batch], rate, options.seconds, options.warmup))
    soaked: Soak | None = None
    if options.soak:
        print(f"{options.soak:g} minutes at saturation ...", flush=True)
        soaked = soak(
            targets[1], concurrency=options.soak_concurrency, minutes=options.soak, pid=pid
        )
    print(table([*compared, *results, *([soaked.result] if soaked else [])]))
    for finding in (comparison, soaked):
        if finding:
            print("\n".join(finding.describe()))
    _write(options, server, compared, results, comparison, soaked)
    return bool(soaked and soaked.failed)


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """The server to load and, where it is on this machine and known, its process."""
    if options.server:
        yield options.server, options.server_pid
        return
    with (
        tempfile.TemporaryDirectory(prefix="load-test-") as work,
        serve(
            options.start.absolute(),
            options.model,
            batching=options.batching,
            log=Path(work, "server.log"),
            timeout=_LOAD_SECONDS,
        ) as server,
    ):
        yield server.address, server.process.pid


def _target(options: argparse.Namespace, server: str, batch: int) -> Target:
    """Makes a request, and sees to it that the server answers it."""
    with Client(server, options.model, tls=options.tls, timeout=options.timeout) as client:
        inputs = {INPUTS[options.signature]: encode([_image()] * batch, options.signature)}
        client.predict(inputs, options.signature)
        request = client.request(inputs, options.signature).SerializeToString()
    return Target(server, request, batch, options.tls, options.timeout)


def _image() -> np.ndarray:
    """uint8 [32, 32, 3], a gradient with noise."""
    rows, columns = np.mgrid[0:32, 0:32]
    noise = np.random.default_rng(0).integers(0, 16, (32, 32, 3))
    pixels = np.stack([4 * rows, 4 * columns, 2 * (rows + columns)], axis=-1) + noise
    return pixels.astype(np.uint8)


def _write(
    options: argparse.Namespace,
    server: str,
    compared: Sequence[Result],
    results: Sequence[Result],
    comparison: Comparison | None,
    soaked: Soak | None,
) -> None:
    described: dict[str, Any] = {
        "server": server,
        "model": options.model,
        "signature": options.signature,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "results": [result.as_json() for result in results],
        "comparison": (
            {**comparison.as_json(), "results": [result.as_json() for result in compared]}
            if comparison
            else None
        ),
        "soak": soaked.as_json() if soaked else None,
    }
    data, chart = (options.output.with_suffix(suffix) for suffix in (".json", ".png"))
    # Whole or not at all, as far as a reader can see.
    part = data.with_suffix(".json.partial")
    part.write_text(json.dumps(described, indent=1) + "\n")
    part.replace(data)
    part = chart.with_suffix(".png.partial")
    drawn = draw(
        part,
        results,
        comparison.in_process_images_per_second if comparison else None,
        soaked.memory if soaked else None,
    )
    if drawn:
        part.replace(chart)
    print(f"written: {data}{f' and {chart}' if drawn else ''}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m serving.load_test",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="HOST:PORT", help="the server to load")
    where.add_argument(
        "--start", type=Path, metavar="MODEL_DIR", help="start a server for this, and end it after"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--signature", default="serving_default", choices=list(INPUTS))
    add = parser.add_argument
    add("--concurrency", type=_list(int), default=[1, 4, 16, 32], metavar="N,...", help="clients")
    add("--batch", type=_list(int), default=[1], metavar="N,...", help="images in a request")
    add(
        "--rates",
        type=_list(float),
        default=[],
        metavar="R,...",
        help="open loops: requests a second, whether or not earlier ones were answered",
    )
    add("--seconds", type=_positive(float), default=5.0, help="of each measurement")
    add("--warmup", type=_positive(float), default=1.0, help="seconds before each measurement")
    add("--timeout", type=_positive(float), default=30.0, help="seconds for a request")
    add(
        "--in_process",
        type=Path,
        metavar="MODEL_DIR",
        help="compare, by turns, with calling this model in a process of its own",
    )
    add("--rounds", type=_positive(int), default=3, help="of the comparison")
    add("--soak", type=_positive(float), metavar="MINUTES", help="at saturation")
    add(
        "--soak_concurrency",
        type=_positive(int),
        default=160,
        metavar="N",
        help="clients; more than the server admits, so that it refuses some (default: %(default)s)",
    )
    add("--server_pid", type=_positive(int), help="the process whose memory a soak watches")
    add("--batching", type=Path, default=BATCHING_FILE, help="of the server that is started")
    add(
        "--output",
        type=Path,
        default=Path("load_test"),
        metavar="NAME",
        help="write NAME.json and NAME.png",
    )
    add("--tls", action="store_true", help="encrypt; implied by the following")
    for flag, text in (("--ca", "authorities to trust"), ("--cert", "certificate"), ("--key", "")):
        add(flag, type=Path, metavar="PEM", help=text or "private key")
    options = parser.parse_args(arguments)
    tls = Tls(options.ca, options.cert, options.key)
    options.tls = tls if options.tls or tls != Tls() else None
    return options


def _positive(kind: Callable[[str], _N]) -> Callable[[str], _N]:
    def number(text: str) -> _N:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
        return value

    return number


def _list(kind: Callable[[str], _N]) -> Callable[[str], list[_N]]:
    def numbers(text: str) -> list[_N]:
        return [_positive(kind)(item) for item in text.split(",")]

    return numbers


if __name__ == "__main__":
    main()
