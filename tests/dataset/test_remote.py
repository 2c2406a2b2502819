"""Manifests, Parquet files and CIFAR by URI: fsspec's memory, and a web server on this machine."""

import http.server
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataset import storage, synthetic
from dataset.card import SPLITS
from dataset.export import export
from dataset.format import DataError
from dataset.interface import Options
from dataset.locate import locate
from dataset.source import open_source
from tests.support.pictures import read

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set in the binary layout, as CSV and as Parquet."""
    root = tmp_path_factory.mktemp("forms")
    source = open_source(str(synthetic.generate(root / "binary", train=600, test=100)))
    for form in ("csv", "parquet"):
        export(source, root / form, form)
    return root


@pytest.fixture
def served(forms: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(forms))

        def do_GET(self) -> None:
            """Ranges, too, which Parquet files are read by, and Python's own server cannot."""
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            size = len(content)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            self.send_response(206 if asked else 200)
            if asked:
                first, last = int(asked[1]), min(int(asked[2]), size - 1)
                content = content[first : last + 1]
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_memory(forms: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(forms), "/bucket", recursive=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def contents(location: str) -> list[set[tuple[bytes, int]]]:
    source = open_source(location)
    return [{(bytes(item.image), item.label) for item in read(source, split)} for split in SPLITS]


@pytest.mark.parametrize(
    "path", ["csv/manifest.csv", "parquet", "parquet/data/train-00000-of-00001.parquet", "binary"]
)
def test_memory(forms: Path, in_memory: str, path: str):
    assert contents(f"{in_memory}/{path}") == contents(str(forms / path))


@pytest.mark.parametrize("path", ["csv/manifest.csv", "parquet/data/train-00000-of-00001.parquet"])
def test_web(forms: Path, served: str, path: str):
    assert contents(f"{served}/{path}") == contents(str(forms / path))


def test_named_and_told(forms: Path, in_memory: str, tmp_path: Path):
    lines: list[str] = []
    uri = f"{in_memory}/csv/manifest.csv"
    dataset = locate(uri, tmp_path / "work", report=lines.append)
    assert (dataset.location, dataset.source) == (uri, uri)
    assert lines[0] == f"data: a manifest (CSV, TSV or JSON lines), from {uri}"


def test_what_is_not_there(in_memory: str, served: str):
    for base in (in_memory, served):
        with pytest.raises(DataError, match=r"gone\.csv does not exist"):
            open_source(f"{base}/csv/gone.csv")
        with pytest.raises(DataError, match=r"gone\.parquet does not exist"):
            open_source(f"{base}/parquet/gone.parquet")
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket/csv/images/test/000000.png")
    with pytest.raises(DataError, match=r"test/000000\.png, which .*manifest\.csv names, does not"):
        open_source(f"{in_memory}/csv/manifest.csv")
    with pytest.raises(DataError, match="is no data set that is read here"):
        open_source(f"{in_memory}/csv/images")


def test_an_unknown_kind_of_uri():
    with pytest.raises(DataError, match=r"nosuch://a\.csv: Protocol not known: nosuch"):
        open_source("nosuch://a.csv")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match="install the extra `remote`"):
        storage.open_file("memory://a")


def test_options_reach_the_source(in_memory: str):
    source = open_source(f"{in_memory}/csv/manifest.csv", Options(limit=100))
    assert source.card.splits["train"].examples == 100
