"""Downloads from a real server on the loopback interface."""

import contextlib
import hashlib
import http.server
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset.download import UnreachableError, fetch
from dataset.files import StorageError
from dataset.format import DataError

CONTENT = bytes(range(256)) * 5000  # 1.28 MB: several blocks
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, with the faults asked for.

    Attributes:
      content: the file.
      ranges: whether Range is honoured.
      cuts: for each request to come, after how many bytes the connection breaks.
      gone: an error to answer with once no cut is left to come; 0 for none.
      statuses: for each request to come, an error to answer with.
      requested: the Range headers seen, None where there was none.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.cuts: list[int] = []
        self.gone = 0
        self.statuses: list[int] = []
        self.requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/a.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        header = self.headers.get("Range")
        self.server.requested.append(header)
        if self.server.gone and not self.server.cuts:
            self.send_error(self.server.gone)
            return
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
            return
        content, start = self.server.content, 0
        if header and self.server.ranges:
            match = re.fullmatch(r"bytes=(\d+)-", header)
            assert match
            start = int(match[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cuts:
            self.wfile.write(body[: self.server.cuts.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: Server, target: Path, md5: str = MD5) -> Path:
    return fetch(server.url, target, md5, progress=False, timeout=5, backoff=0.01)


def test_whole_file_in_one_go(server: Server, tmp_path: Path):
    target = tmp_path / "new" / "a.tar.gz"
    assert get(server, target) == target
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["a.tar.gz"]
    get(server, target)
    assert server.requested == [None]  # the second call had nothing to do


def test_goes_on_after_breaks(server: Server, tmp_path: Path):
    server.cuts = [300_000, 500_000]
    assert get(server, tmp_path / "a.tar.gz").read_bytes() == CONTENT
    assert server.requested == [None, "bytes=300000-", "bytes=800000-"]


def test_goes_on_from_an_earlier_call(server: Server, tmp_path: Path):
    server.cuts = [100_000] * 4
    with pytest.raises(
        DataError, match=r"broke off 4 times .*; 400,000 bytes are kept in .*\.part"
    ) as raised:
        get(server, tmp_path / "a.tar.gz")
    assert not isinstance(raised.value, UnreachableError)
    assert os.listdir(tmp_path) == ["a.tar.gz.part"]
    assert get(server, tmp_path / "a.tar.gz").read_bytes() == CONTENT
    assert server.requested[-1] == "bytes=400000-"
    assert os.listdir(tmp_path) == ["a.tar.gz"]


@pytest.mark.parametrize("status", [503, 404])
def test_server_that_vanishes_in_the_middle(server: Server, tmp_path: Path, status: int):
    """Not the same as one that was never reached: what has come is worth going on with."""
    server.cuts, server.gone = [300_000], status
    with pytest.raises(
        DataError, match=rf"broke off 4 times .*HTTP {status}.*; 300,000 bytes"
    ) as raised:
        get(server, tmp_path / "a.tar.gz")
    assert not isinstance(raised.value, UnreachableError)
    assert len(server.requested) == 4
    server.gone = 0
    assert get(server, tmp_path / "a.tar.gz").read_bytes() == CONTENT


def test_server_without_ranges(server: Server, tmp_path: Path):
    server.ranges = False
    server.cuts = [300_000]
    assert get(server, tmp_path / "a.tar.gz").read_bytes() == CONTENT
    assert server.requested == [None, "bytes=300000-"]


def test_part_that_is_whole_already(server: Server, tmp_path: Path):
    (tmp_path / "a.tar.gz.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "a.tar.gz").read_bytes() == CONTENT


def test_part_that_is_longer_than_the_file(server: Server, tmp_path: Path):
    (tmp_path / "a.tar.gz.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path / "a.tar.gz").read_bytes() == CONTENT
    assert server.requested == [f"bytes={len(CONTENT) + 4}-", None]


def test_wrong_checksum(server: Server, tmp_path: Path):
    server.content = b"<html>Log in to this network</html>"
    actual = hashlib.md5(server.content).hexdigest()
    with pytest.raises(
        DataError, match=f"wrong checksum.* 35 bytes with md5 {actual}.*{MD5}"
    ) as raised:
        get(server, tmp_path / "a.tar.gz")
    assert not isinstance(raised.value, UnreachableError)
    assert os.listdir(tmp_path) == []


def test_busy_server_is_asked_again(server: Server, tmp_path: Path):
    server.statuses = [503, 429]
    assert get(server, tmp_path / "a.tar.gz").read_bytes() == CONTENT


def test_server_that_stays_busy(server: Server, tmp_path: Path):
    server.statuses = [503] * 4
    with pytest.raises(UnreachableError, match=r"cannot download .*HTTP 503 Service Unavailable"):
        get(server, tmp_path / "a.tar.gz")
    assert len(server.requested) == 4


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_is_not_asked_about_again(server: Server, tmp_path: Path, status: int):
    server.statuses = [status]
    with pytest.raises(UnreachableError, match=f"HTTP {status}"):
        get(server, tmp_path / "a.tar.gz")
    assert len(server.requested) == 1


def test_refused_connection(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar.gz"
        with pytest.raises(UnreachableError, match=r"cannot download .*refused"):
            fetch(url, tmp_path / "a.tar.gz", MD5, progress=False)
    assert os.listdir(tmp_path) == []


def test_name_that_does_not_resolve(tmp_path: Path):
    with pytest.raises(UnreachableError, match=r"cannot download http://nowhere\.invalid"):
        fetch("http://nowhere.invalid/a.tar.gz", tmp_path / "a.tar.gz", MD5, progress=False)


def test_silent_server(tmp_path: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar.gz"
        with pytest.raises(UnreachableError, match="timed out"):
            fetch(url, tmp_path / "a.tar.gz", MD5, progress=False, timeout=0.2)


def test_file_in_the_way_of_the_folder(server: Server, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        get(server, tmp_path / "file" / "a.tar.gz")


def test_full_disk(server: Server, tmp_path: Path):
    size = ["-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(["mount", *size], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(StorageError, match=r"a\.tar\.gz\.part: No space left.*free some space"):
            get(server, tmp_path / "a.tar.gz")
        assert not (tmp_path / "a.tar.gz").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
