import hashlib
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset import format as binary
from dataset import synthetic
from dataset.download import RemoteArchive
from dataset.files import StorageError
from dataset.format import DataError, LabelNames
from dataset.locate import Dataset, locate

NAMES = LabelNames(
    tuple(f"thing_{index}" for index in range(100)), tuple(f"group_{index}" for index in range(20))
)
NOWHERE = RemoteArchive("http://127.0.0.1:1/cifar-100-binary.tar.gz", "0" * 32)


def python_form(source: Path, target: Path) -> Path:
    """The binary folder as the pickles Python 3 would make of it."""
    target.mkdir()
    for file, name in (("train.bin", "train"), ("test.bin", "test")):
        records = np.fromfile(source / file, np.uint8).reshape(-1, 3074)
        content = {
            b"fine_labels": records[:, 1].tolist(),
            b"coarse_labels": records[:, 0].tolist(),
            b"data": np.ascontiguousarray(records[:, 2:]),
        }
        (target / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"fine_label_names": list(NAMES.fine), b"coarse_label_names": list(NAMES.coarse)}
    (target / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return target


def make_tar(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small data set in all four official forms, each alone in a folder."""
    root = tmp_path_factory.mktemp("forms")
    for name in ("a", "b", "c", "d"):
        (root / name).mkdir()
    folder = synthetic.generate(root / "a/cifar-100-binary", train=200, test=100)
    binary.write_label_names(folder, NAMES)
    python_form(folder, root / "b/cifar-100-python")
    make_tar(root / "c/cifar-100-binary.tar.gz", folder)
    make_tar(root / "d/cifar-100-python.tar.gz", root / "b/cifar-100-python")
    return root


class Run:
    """Calls `locate` where nothing is found unless a test puts it there."""

    def __init__(self, tmp_path: Path):
        self.root = tmp_path
        self.work_dir = tmp_path / "work"
        self.search_dir = tmp_path / "data"
        self.keras_cache = tmp_path / "keras"
        self.lines: list[str] = []

    def __call__(self, data: str | os.PathLike[str] | None = None, **options: Any) -> Dataset:
        self.lines.clear()
        return locate(
            None if data is None else str(data),
            self.work_dir,
            **{
                "search_dir": self.search_dir,
                "keras_cache": self.keras_cache,
                "remote": NOWHERE,
                "synthetic_records": (200, 100),
                "report": self.lines.append,
            }
            | options,
        )

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def kept(self) -> list[str]:
        """What is in the store, other than its lock and index."""
        store = self.work_dir / "data"
        hidden = {".lock", "unpacked.json"}
        return sorted(set(os.listdir(store)) - hidden) if store.is_dir() else []


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        "a/cifar-100-binary",
        "b/cifar-100-python",
        "c/cifar-100-binary.tar.gz",
        "d/cifar-100-python.tar.gz",
        "a",
        "b",
        "c",
        "d",
    ],
)
def test_every_form_gives_the_same_data(run: Run, forms: Path, data: str):
    dataset = run(forms / data)
    assert dataset.name == "cifar-100"
    assert dataset.source.startswith(str(forms / data))
    assert dataset.fingerprint == binary.fingerprint(forms / "a/cifar-100-binary")
    for name in binary.FILES:
        expected = (forms / "a/cifar-100-binary" / name).read_bytes()
        assert (dataset.folder / name).read_bytes() == expected
    assert "a subset: 200 train and 100 test records" in run.text
    assert dataset.subset
    assert ("not byte-identical" in run.text) == (data[0] in "cd")


def test_binary_folder_is_used_in_place(run: Run, forms: Path):
    assert run(forms / "a").folder == forms / "a/cifar-100-binary"
    assert not run.work_dir.exists()


@pytest.mark.parametrize("data", ["b", "d"])
def test_unpacked_once(run: Run, forms: Path, data: str):
    first = run(forms / data)
    assert "unpacking" in run.text
    assert run.kept() == [first.folder.name]
    assert sorted(os.listdir(first.folder)) == sorted(binary.FILES)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert run(forms / data) == first
    assert "unpacking" not in run.text
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_same_contents_are_in_the_same_folder(run: Run, forms: Path, tmp_path: Path):
    """TFX's cache goes by the folder's path: another one would have everything run again."""
    first = run(forms / "b")
    fingerprint = binary.fingerprint(forms / "a/cifar-100-binary")
    assert first.folder.name == f"cifar-100-{fingerprint[:12]}"
    for data in ("c", "d"):
        dataset = run(forms / data)
        assert (dataset.folder, dataset.fingerprint) == (first.folder, fingerprint)
    assert run.kept() == [first.folder.name]
    for data in ("b", "c", "d"):
        run(forms / data)
        assert "unpacking" not in run.text
    spaced = shutil.copytree(forms / "a/cifar-100-binary", tmp_path / "cifar-100-binary")
    with open(spaced / "fine_label_names.txt", "a") as file:
        file.write("\r\n\r\n")
    assert run(make_tar(tmp_path / "own.tar.gz", spaced)).folder == first.folder


@pytest.mark.parametrize("index", [None, "", "[]", '{"a": 1}', "name"])
def test_index_lost_or_damaged(run: Run, forms: Path, index: str | None):
    """As if killed before the index was written, or as if somebody had been at it."""
    first = run(forms / "c")
    path = run.work_dir / "data" / "unpacked.json"
    path.unlink()
    if index is not None:
        path.write_text(index)
    assert run(forms / "c") == first
    assert "unpacking" in run.text
    assert run.kept() == [first.folder.name]
    run(forms / "c")
    assert "unpacking" not in run.text


def test_copy_that_was_changed(run: Run, forms: Path):
    """Sound still, but its name says it has other contents."""
    folder = run(forms / "c").folder
    with open(folder / "test.bin", "r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    with pytest.raises(StorageError, match=f"{folder} has changed since .*: remove it"):
        run(forms / "c")
    shutil.rmtree(folder)
    assert run(forms / "c").folder == folder


def test_changed_archive_is_unpacked_anew(run: Run, forms: Path, tmp_path: Path):
    archive = tmp_path / "own.tgz"
    shutil.copy(forms / "c/cifar-100-binary.tar.gz", archive)
    first = run(archive)
    stamp = archive.stat()
    changed = shutil.copytree(forms / "a/cifar-100-binary", tmp_path / "cifar-100-binary")
    with open(changed / "test.bin", "r+b") as file:
        file.write(b"\0")
    make_tar(archive, changed)
    os.utime(archive, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = run(archive)
    assert second.folder != first.folder and second.fingerprint != first.fingerprint


def test_order_of_the_search(run: Run, forms: Path):
    run.keras_cache.mkdir()
    make_tar(run.keras_cache / "cifar-100-python-target_archive", forms / "b/cifar-100-python")
    assert run().source == str(run.keras_cache / "cifar-100-python-target_archive")
    # Keras 3's own layout of what it has unpacked comes before its archive.
    shutil.copytree(forms / "b", run.keras_cache / "cifar-100-python-target")
    assert run().source == str(run.keras_cache / "cifar-100-python-target/cifar-100-python")
    run.search_dir.mkdir()
    (run.search_dir / "notes.txt").touch()  # a data/ of another purpose is no hindrance
    assert run().source.startswith(str(run.keras_cache))
    shutil.copytree(forms / "c", run.search_dir, dirs_exist_ok=True)
    assert run().source == str(run.search_dir / "cifar-100-binary.tar.gz")
    assert run(forms / "a").source == str(forms / "a/cifar-100-binary")


def test_keras_home_is_followed(
    run: Run, forms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    shutil.copytree(forms / "a", tmp_path / "home/datasets")
    assert run(keras_cache=None).source == str(tmp_path / "home/datasets/cifar-100-binary")


def test_broken_download_of_keras_is_passed_over(run: Run):
    run.keras_cache.mkdir()
    (run.keras_cache / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b")
    assert run().name == "synthetic"
    assert "passing over what is in Keras's cache" in run.lines[1]
    assert not any("raw" in name or "partial" in name for name in run.kept())


def test_storage_error_is_no_reason_to_pass_over_the_cache_of_keras(run: Run, forms: Path):
    shutil.copytree(forms / "d", run.keras_cache)
    run.work_dir.mkdir()
    (run.work_dir / "data").write_text("a file in the way")
    with pytest.raises(StorageError, match="cannot write"):
        run()
    (run.work_dir / "data").unlink()
    folder = run().folder
    os.truncate(folder / "train.bin", 3000)  # the copy made of it, not what Keras has
    with pytest.raises(StorageError, match=f"truncated.*or remove {folder}"):
        run()


def test_wrong_data_in_the_search_folder_is_an_error(run: Run):
    run.search_dir.mkdir()
    (run.search_dir / "train.bin").write_bytes(bytes(3074))
    with pytest.raises(DataError, match="lacks test"):
        run()


def test_synthetic_on_demand(run: Run):
    dataset = run("synthetic")
    assert (dataset.name, dataset.folder.name) == ("synthetic", "synthetic-v1-seed0-200-100")
    assert "generating" in run.text and "***" not in run.text
    assert run("synthetic") == dataset
    assert "generating" not in run.text
    # And it is known for what it is under any other name.
    moved = shutil.copytree(dataset.folder, run.root / "cifar-100-binary")
    assert run(moved).name == "synthetic"


@pytest.mark.parametrize("download", [False, True])
def test_fallback_says_so_in_a_banner(run: Run, download: bool):
    dataset = run(download=download)
    assert dataset.name == "synthetic"
    banner = next(line for line in run.lines if "*****" in line)
    flat = " ".join(line.removeprefix("* ").strip() for line in banner.splitlines())
    assert "SYNTHETIC" in flat and "NOT results on CIFAR-100" in flat
    assert "make run DATA=/path/to/cifar-100-binary.tar.gz" in flat
    reason = f"cannot download {NOWHERE.url}: " if download else "downloading is switched off"
    assert reason in flat
    assert ("refused" in flat) == download
    assert all(len(line) <= 96 for line in banner.splitlines() if "/" not in line)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Serves a folder on the loopback interface."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(folder: Path) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any):
                super().__init__(*args, directory=str(folder))

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download(run: Run, forms: Path, serve: Callable[[Path], str]):
    archive = forms / "c/cifar-100-binary.tar.gz"
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    remote = RemoteArchive(f"{serve(archive.parent)}/{archive.name}", md5)
    dataset = run(remote=remote)
    assert (dataset.name, dataset.source) == ("cifar-100", remote.url)
    assert dataset.fingerprint == binary.fingerprint(forms / "a/cifar-100-binary")
    assert run.kept() == [dataset.folder.name]  # the archive is not kept
    # A later run finds it without asking anybody.
    assert run(remote=RemoteArchive(NOWHERE.url, md5)).folder == dataset.folder


def test_download_of_something_else(run: Run, forms: Path, serve: Callable[[Path], str]):
    remote = RemoteArchive(f"{serve(forms / 'c')}/cifar-100-binary.tar.gz", "0" * 32)
    with pytest.raises(DataError, match="wrong checksum"):
        run(remote=remote)
    assert run.kept() == []


def test_download_of_what_the_server_lacks(run: Run, forms: Path, serve: Callable[[Path], str]):
    remote = RemoteArchive(f"{serve(forms / 'c')}/gone.tar.gz", "0" * 32)
    assert run(remote=remote).name == "synthetic"
    assert "HTTP 404" in run.text
    assert run.kept() == ["synthetic-v1-seed0-200-100"]


@pytest.mark.parametrize("data", ["nowhere", "nowhere.tar.gz", ""])
def test_nonexistent_path(run: Run, data: str):
    with pytest.raises(DataError, match=f"data '.*{data}' does not exist"):
        run(run.root / data if data else "")
    assert not run.work_dir.exists()


def test_empty_folder(run: Run, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images in class folders: expected"):
        run(tmp_path / "empty")


def test_neither_folder_nor_file(run: Run, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a folder nor a file"):
        run(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_python_folder_that_is_not_whole(run: Run, forms: Path, tmp_path: Path, name: str):
    folder = shutil.copytree(forms / "b/cifar-100-python", tmp_path / "python")
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"python lacks {name}: unpack the whole"):
        run(folder)


def test_truncated_archive_leaves_nothing(run: Run, forms: Path, tmp_path: Path):
    archive = tmp_path / "cifar-100-binary.tar.gz"
    content = (forms / "c/cifar-100-binary.tar.gz").read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"binary\.tar\.gz .* is truncated or damaged"):
        run(archive)
    assert run.kept() == []


def test_archive_with_a_bad_label_is_named(run: Run, forms: Path, tmp_path: Path):
    folder = shutil.copytree(forms / "a/cifar-100-binary", tmp_path / "cifar-100-binary")
    with open(folder / "train.bin", "r+b") as file:
        file.seek(3074 * 9 + 1)
        file.write(b"\x64")
    archive = make_tar(tmp_path / "own.tar.gz", folder)
    with pytest.raises(DataError, match=r"own\.tar\.gz/train\.bin: record 9 has fine label 100"):
        run(archive)
    assert run.kept() == []


def test_malicious_archive_in_python_form(run: Run, forms: Path, tmp_path: Path):
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'victim'}",)

    folder = shutil.copytree(forms / "b/cifar-100-python", tmp_path / "cifar-100-python")
    (folder / "test").write_bytes(pickle.dumps(Attack(), protocol=2))
    archive = make_tar(tmp_path / "own.tar.gz", folder)
    with pytest.raises(DataError, match=r"own\.tar\.gz.*system"):
        run(archive)
    assert not (tmp_path / "victim").exists()
    assert run.kept() == []


def test_unwritable_work_dir(run: Run, forms: Path):
    run.work_dir.write_text("a file in the way")
    for data in (forms / "c", "synthetic", None):
        with pytest.raises(StorageError, match=r"cannot write .*work.*: choose a work folder"):
            run(data)
    assert run(forms / "a").name == "cifar-100"  # nothing to write: no work folder needed


def test_full_disk(run: Run, forms: Path, serve: Callable[[Path], str]):
    shutil.copytree(forms / "d", run.keras_cache)
    archive = forms / "c/cifar-100-binary.tar.gz"
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    remote = RemoteArchive(f"{serve(archive.parent)}/{archive.name}", md5)
    full = r"cannot write .*No space left.*free some space"
    run.work_dir.mkdir()
    size = ["-t", "tmpfs", "-o", "size=500k", "tmpfs", str(run.work_dir)]
    if os.geteuid() != 0 or subprocess.run(["mount", *size], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        for data in (forms / "b", forms / "c", forms / "d", "synthetic"):
            with pytest.raises(StorageError, match=full):
                run(data)
            assert run.kept() == []
        with pytest.raises(StorageError, match=full):  # the copy of Keras's
            run(remote=remote)
        shutil.rmtree(run.keras_cache)
        with pytest.raises(StorageError, match=full):
            run(remote=remote)
        assert run.kept() == ["cifar-100-binary.tar.gz.part"]
    finally:
        subprocess.run(["umount", str(run.work_dir)], check=True)


def test_damaged_copy_of_an_earlier_run(run: Run, forms: Path):
    folder = run(forms / "c").folder
    os.truncate(folder / "train.bin", 3000)
    with pytest.raises(DataError, match=f"truncated.*or remove {folder}"):
        run(forms / "c")


def test_leftovers_of_a_killed_run_are_cleared(run: Run, forms: Path):
    first = run(forms / "c")
    first.folder.rename(first.folder.with_name(f"{first.folder.name}.999.partial"))
    (first.folder.with_name(f"{first.folder.name}.999.partial") / "test.bin").unlink()
    assert run(forms / "c") == first
    assert run.kept() == [first.folder.name]


def test_two_runs_at_once(run: Run, forms: Path):
    """Both get the data, and only one of them unpacks."""
    code = (
        "import sys; from pathlib import Path; from dataset.locate import locate; "
        "print(locate(sys.argv[1], Path(sys.argv[2])).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(forms / "d"), str(run.work_dir)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    output = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    expected = binary.fingerprint(forms / "a/cifar-100-binary")
    assert [text.splitlines()[-1] for text in output] == [expected] * 2
    assert "".join(output).count("unpacking") == 1


def test_real_data(run: Run):
    """The author's own counts and names; the synthetic twin is every other test here."""
    data = os.environ.get("CIFAR100_DATA")
    if not data:
        pytest.skip("CIFAR100_DATA does not name the real data")
    dataset = run(data)
    assert dataset.name == "cifar-100"
    assert "subset" not in run.text
    assert binary.check_folder(dataset.folder) == (50_000, 10_000)
    images, fine, coarse = binary.read_records(dataset.folder / "train.bin")
    np.testing.assert_array_equal(np.bincount(fine), np.full(100, 500))
    np.testing.assert_array_equal(np.bincount(coarse), np.full(20, 2500))
    names = binary.read_label_names(dataset.folder)
    assert (names.fine[0], names.fine[99], names.coarse[0]) == ("apple", "worm", "aquatic_mammals")
    # Means of red, green and blue as published for the training images.
    means = images.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(means, [0.5070752, 0.4865489, 0.4409178], atol=5e-8)
