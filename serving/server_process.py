"""A model server in a process of its own, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from serving.client import Client
from serving.connection import ServerError

TF_SERVING = "tensorflow_model_server"
EMBEDDED = "serving.server"

_PORT_TRIALS = 5
_PORT_TAKEN = ("already in use", "failed to bind", "could not bind", "failed to add port")
_POLL_SECONDS = 0.05
_STOP_SECONDS = 10.0
_AVAILABLE, _END = "AVAILABLE", "END"


class ModelServerError(RuntimeError):
    """The model server ended, or has not loaded the model; the message says why."""


class ModelLoadError(ModelServerError):
    """The server says that the model cannot be loaded, as it would say the next time."""


class _PortTakenError(ModelServerError):
    """Another process was faster."""


@dataclass(frozen=True)
class ModelServer:
    """A running server that has loaded the model.

    Attributes:
      kind: `tensorflow_model_server` or `serving.server`.
      address: HOST:PORT of its gRPC API.
      load_seconds: From its start until it had loaded the model, warm-up included.
      process: The process.
      log: What it has written to its standard output and error.
    """

    kind: str
    address: str
    load_seconds: float
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raises ModelServerError if the server has ended."""
        _check(self.process, self.log)


def find_server() -> tuple[str, list[str]]:
    """Chooses the server: TF Serving's binary where it is on PATH, else the embedded server.

    Returns:
      (kind, command line without flags).
    """
    binary = shutil.which(TF_SERVING)
    return (TF_SERVING, [binary]) if binary else (EMBEDDED, [sys.executable, "-m", EMBEDDED])


@contextlib.contextmanager
def serve(
    base_path: Path,
    model_name: str,
    *,
    batching: Path,
    log: Path,
    timeout: float,
) -> Iterator[ModelServer]:
    """Starts a server on a free loopback port, waits for the model, and ends it in any case.

    Args:
      base_path: A TF Serving model base path with one version.
      model_name: What requests call the model.
      batching: The batching parameters file.
      log: File for the server's output.
      timeout: Seconds that it may take until the model is available.

    Raises:
      ModelLoadError: The server could not load the model.
      ModelServerError: The server ended, or did not get ready in time.
      OSError: It cannot be executed.
    """
    kind, command = find_server()
    flags = [
        f"--model_name={model_name}",
        f"--model_base_path={base_path}",
        # It loads or it does not; servers try for minutes otherwise.
        "--max_num_load_retries=0",
        "--enable_batching=true",
        f"--batching_parameters_file={batching}",
    ]
    with contextlib.ExitStack() as stack:
        for trial in range(1, _PORT_TRIALS + 1):
            port = _free_port()
            process = stack.enter_context(_process([*command, f"--port={port}", *flags], log))
            began = time.monotonic()
            try:
                _wait(process, port, model_name, log, began + timeout)
                break
            except _PortTakenError:
                if trial == _PORT_TRIALS:
                    raise
        seconds = time.monotonic() - began
        yield ModelServer(kind, f"127.0.0.1:{port}", seconds, process, log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # Not on a GPU: whoever has trained on it in this process still holds its memory.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    with log.open("wb") as output:
        # A session of its own: it is ended with all that it has started, and by nobody else.
        process = subprocess.Popen(
            [*_tied_to_this_process(), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tied_to_this_process() -> list[str]:
    """A prefix for commands that ends them if this process is killed, which cleans up nothing."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _wait(
    process: subprocess.Popen[bytes], port: int, model_name: str, log: Path, deadline: float
) -> None:
    state = "it does not answer"
    with Client(f"127.0.0.1:{port}", model_name, timeout=5.0) as client:
        while time.monotonic() < deadline:
            _check(process, log)
            time.sleep(_POLL_SECONDS)
            if not _listens(port):
                continue
            try:
                versions = client.status()
            except ServerError as error:
                state = str(error)
                if error.code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL):
                    raise ModelServerError(state) from error
                continue
            for version in versions:
                state = f"version {version.version} is {version.state}"
                if version.state == _AVAILABLE:
                    return
                if version.state == _END and version.error:
                    raise ModelLoadError(f"the model does not load: {version.error}")
    raise ModelServerError(f"the model was not available in time: {state}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _check(process: subprocess.Popen[bytes], log: Path) -> None:
    code = process.poll()
    if code is None:
        return
    text = log.read_text(errors="replace")
    if code > 0 and any(sign in text.lower() for sign in _PORT_TAKEN):
        raise _PortTakenError(f"no free port was found in {_PORT_TRIALS} trials")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = text.strip().rpartition("\n")[2] or "it has written nothing"
    raise ModelServerError(f"the model server ended with {how}: {last}")
