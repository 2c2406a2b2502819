"""TLS and mutual TLS from TF Serving's SSLConfig, and what cannot be listened on."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from serving.server import config, lifecycle, options
from tests.serving.server.conftest import Client, Command, Start, free_port


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write_config(path: Path, authority: trustme.CA, client_verify: bool) -> Path:
    certificate = authority.issue_cert("127.0.0.1")

    def quote(blob: trustme.Blob) -> str:
        return blob.bytes().decode().replace("\n", "\\n")

    path.write_text(
        f'server_key: "{quote(certificate.private_key_pem)}"\n'
        f'server_cert: "{quote(certificate.cert_chain_pems[0])}"\n'
        f'custom_ca: "{quote(authority.cert_pem)}"\n'
        f"client_verify: {str(client_verify).lower()}\n"
    )
    return path


def credentials(authority: trustme.CA, own: trustme.LeafCert | None = None) -> Any:
    root = authority.cert_pem.bytes()
    if own is None:
        return grpc.ssl_channel_credentials(root)
    key, chain = own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
    return grpc.ssl_channel_credentials(root, key, chain)


def answers(client: Client) -> bool:
    try:
        return client.predict(x=np.zeros([1, 2], np.float32), timeout=3)["y"][0, 0] == 3
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return False


@pytest.mark.parametrize("client_verify", [False, True], ids=["tls", "mtls"])
def test_only_who_should_gets_an_answer(
    client_verify: bool, authority: trustme.CA, start_server: Start, pushed: Path, tmp_path: Path
):
    config = write_config(tmp_path / "ssl.config", authority, client_verify)
    with start_server(
        pushed,
        f"--ssl_config_file={config}",
        credentials=credentials(authority, authority.issue_cert("client@example.org")),
    ) as server:
        assert answers(server.client)
        address = f"127.0.0.1:{server.port}"
        assert answers(Client(address, credentials(authority))) is not client_verify
        stranger = trustme.CA()
        foreign = credentials(authority, stranger.issue_cert("client@example.org"))
        assert answers(Client(address, foreign)) is not client_verify
        assert not answers(Client(address, credentials(stranger)))
        assert not answers(Client(address))


@pytest.mark.parametrize("flag", ["--port", "--rest_api_port"])
def test_a_port_that_is_taken(flag: str, pushed: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        arguments = {"--port": free_port(), "--rest_api_port": free_port(), flag: port}
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}"):
            prepare(pushed, *(f"{key}={value}" for key, value in arguments.items()))


def test_a_key_that_is_none(pushed: Path, tmp_path: Path):
    pem = "-----BEGIN CERTIFICATE-----\\nbm9uc2Vuc2U=\\n-----END CERTIFICATE-----\\n"
    (tmp_path / "ssl").write_text(f'server_key: "{pem}" server_cert: "{pem}"')
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        prepare(pushed, f"--ssl_config_file={tmp_path}/ssl", f"--port={free_port()}")


def prepare(base_path: Path, *flags: str) -> lifecycle.Server:
    parsed = options.parse([f"--model_base_path={base_path}", *flags])
    return lifecycle.Server(parsed, config.read_files(parsed))


def test_a_file_that_is_wrong(pushed: Path, tmp_path: Path, run_module: Command):
    (tmp_path / "batching").write_text("max_batch_size { value: 0 }")
    arguments = ["--enable_batching", f"--batching_parameters_file={tmp_path}/batching"]
    process = run_module("serving.server", f"--model_base_path={pushed}", *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {tmp_path}/batching: max_batch_size is 0")
