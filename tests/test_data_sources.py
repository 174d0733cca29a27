"""Files, globs, compression and the standard library as sources of bytes."""

import bz2
import gzip
import lzma
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data import plain_text, sources

TEXT = "grüße, 世界 🌍\n".encode() * 5000


def compressed(folder: Path, suffix: str, data: bytes = TEXT) -> Path:
    path = folder / f"text{suffix}"
    match suffix:
        case ".gz":
            path.write_bytes(gzip.compress(data))
        case ".xz":
            path.write_bytes(lzma.compress(data))
        case ".bz2":
            path.write_bytes(bz2.compress(data))
        case ".zst":
            path.write_bytes(zstandard.compress(data))
        case ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("text", data)
        case _:
            path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ["", ".txt", ".gz", ".bz2", ".xz", ".zst", ".zip"])
def test_every_kind_of_file_unpacks(tmp_path: Path, suffix: str) -> None:
    path = compressed(tmp_path, suffix)
    assert b"".join(sources.unpacked(path)) == TEXT
    loud = path.rename(path.with_name(path.name.upper()))
    assert b"".join(sources.unpacked(loud)) == TEXT


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".zip"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, suffix: str, keep: float) -> None:
    path = compressed(tmp_path, suffix, np.random.default_rng(0).bytes(100_000))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    if (suffix, keep) == (".gz", 0):  # to gzip, nothing at all is the empty file
        assert b"".join(sources.unpacked(path)) == b""
        return
    with pytest.raises(ValueError, match=rf"text{suffix} cannot be read as {suffix}"):
        list(sources.unpacked(path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".zip"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(TEXT)
    with pytest.raises(ValueError, match=rf"text{suffix} cannot be read as {suffix}"):
        list(sources.unpacked(path))


def test_frames_of_zst_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "text.zst"
    path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert b"".join(sources.unpacked(path)) == b"one two"


def test_an_archive_of_several_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", "a")
        archive.writestr("b", "b")
    with pytest.raises(ValueError, match=r"two\.zip .* holds 2 files"):
        list(sources.unpacked(tmp_path / "two.zip"))


def test_globs_are_sorted_and_files_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt", "e[1].txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)

    def names(*patterns: str) -> list[str]:
        found = sources.expand("data.paths", list(patterns))
        return [f.relative_to(tmp_path.resolve()).as_posix() for f in found]

    assert names("?.txt") == ["a.txt", "b.txt"]
    assert names("c.md", "?.txt", str(tmp_path / "a.txt")) == ["c.md", "a.txt", "b.txt"]
    assert names("**/d.txt") == ["deep/d.txt"]
    assert names("e[1].txt") == ["e[1].txt"]
    with pytest.raises(ValueError, match=r"data\.paths: 'z\.txt': there is no such file"):
        names("a.txt", "z.txt")
    with pytest.raises(ValueError, match=r"data\.paths: '\*\.csv': the glob matches no file"):
        names("a.txt", "*.csv")
    with pytest.raises(ValueError, match=r"'deep' is a folder: .* write deep/\*\*"):
        names("deep")


def test_pieces_are_cut_between_characters() -> None:
    text = np.frombuffer(TEXT, np.uint8)
    for size in (1, 2, 3, 100, len(TEXT), len(TEXT) + 1):
        parts = list(sources.pieces(text[:2000] if size < 100 else text, size))
        whole = b"".join(parts)
        assert TEXT.startswith(whole) and len(whole) >= min(2000, len(TEXT))
        assert all(part.decode() for part in parts[:-1])


def test_stdlib_is_the_library_without_tests_in_order_of_paths() -> None:
    files = sources.stdlib_files()
    assert list(files) == sorted(files)
    assert {"abc.py", "json/decoder.py", "asyncio/base_events.py"} <= set(files)
    tops = {name.split("/")[0].removesuffix(".py") for name in files}
    assert tops <= sys.stdlib_module_names - {"test", "idlelib", "encodings"}
    assert not any("site-packages" in name or "/tests/" in name for name in files)


def test_files_are_split_by_name_into_the_shares_asked_for() -> None:
    sizes = {f"module_{i}.py": 100 + i for i in range(400)}
    splits = sources.split_files(sizes, val=0.05, test=0.1)
    total = sum(sizes.values())
    share = {
        split: sum(sizes[n] for n in sizes if splits[n] == split) / total
        for split in ("train", "val", "test")
    }
    assert share == pytest.approx({"train": 0.85, "val": 0.05, "test": 0.1}, abs=0.005)
    assert list(splits) == list(sizes)
    assert sources.split_files(dict(reversed(sizes.items())), val=0.05, test=0.1) == splits


def encrypt(path: Path) -> None:
    """Set the bit that says so in the headers of a zip."""
    data = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + flags] |= 1
    path.write_bytes(data)


def test_an_encrypted_zip_is_refused_by_name(tmp_path: Path) -> None:
    path = compressed(tmp_path, ".zip")
    encrypt(path)
    with pytest.raises(ValueError, match=r"text\.zip cannot be read as \.zip: .*encrypted"):
        list(sources.unpacked(path))


@pytest.mark.parametrize(
    ("name", "content", "way"),
    [
        ("rows.jsonl", b"{}", r"data=hf data\.name=json data\.data_files=.*rows\.jsonl"),
        ("ROWS.JSONL.GZ", gzip.compress(b"{}", mtime=0), r"data=hf data\.name=json"),
        ("rows.parquet", b"PAR1", r"data\.name=parquet"),
        ("rows.txt", b"PAR1....", r"data\.name=parquet"),
        ("book.tar.gz", gzip.compress(b"x", mtime=0), "unpack it first"),
        ("book.pdf", b"%PDF-1.7", "convert it to text"),
        ("book", b"%PDF-1.7", "convert it to text"),
        ("book.txt", gzip.compress(b"text", mtime=0), r"give its name the suffix \.gz"),
        ("book.txt", b"PK\x03\x04....", r"the suffix \.zip"),
    ],
)
def test_a_container_is_no_text(tmp_path: Path, name: str, content: bytes, way: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.paths: .*{name} is not a text file: .*{way}"):
        plain_text.check_text("data.paths", tmp_path / name)


GERMAN = "Der Bär läuft über die Straße, größer als möglich. " * 400


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (GERMAN.encode("utf-16"), "UTF-16"),
        (b"plain words ".decode().encode("utf-16-le") * 99, "UTF-16"),
        (GERMAN.encode("utf-32"), "UTF-32"),
        (GERMAN.encode("latin-1"), "probably (cp|latin|iso)"),
        (np.random.default_rng(0).bytes(20_000), "binary data"),
    ],
)
def test_bytes_that_are_no_utf_8_are_refused_with_a_guess(
    tmp_path: Path, content: bytes, guess: str
) -> None:
    decoding = plain_text.Decoding()
    decoding.count(tmp_path / "good.txt", GERMAN.encode())
    decoding.check()
    decoding.count(tmp_path / "odd.txt", content)
    with pytest.raises(ValueError, match=rf"odd\.txt is not UTF-8 text.*{guess}"):
        decoding.check()


def test_a_character_between_two_blocks_is_text(tmp_path: Path) -> None:
    decoding, text = plain_text.Decoding(), TEXT[:3000]
    for start in range(0, len(text), 5):
        decoding.count(tmp_path / "a", text[start : start + 5])
    assert decoding.wrong == 0


def test_mapped_files_give_back_their_memory(tmp_path: Path) -> None:
    path = compressed(tmp_path, "", bytes(range(256)) * (1 << 15))
    mapped = np.memmap(path, np.uint8, mode="r")
    total = int(mapped.sum())
    before = resident(path)
    sources.release([str(path)])
    assert before > 8000 and resident(path) < 100
    assert int(mapped.sum()) == total


def resident(path: Path) -> int:
    """The kB of a mapped file that lie in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return next(int(line.split()[1]) for line in lines_after(lines, str(path)) if "Rss:" in line)


def lines_after(lines, name: str):
    for line in lines:
        if line.endswith(name):
            return lines
    return iter(())
