"""Token shards: flat files of unsigned integers, memory-mapped, beside a small JSON index.

    <folder>/index.json         source, vocabulary, dtype; per split: tokens, bytes, shards
    <folder>/train-00000.bin    the tokens, little-endian, without a header
    <folder>/train.documents    where each document begins, int64, little-endian; only of corpora
                                that have documents
    <folder>/tokenizer.json     only where tokens are not bytes

What is checked when: `prepare_shards` compares the sha256 of every file with the index, each time
a run prepares its data; `open_shards` compares sizes only, in every process that reads.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.token_split import TokenSplit
from runs.file_lock import held

FORMAT = "nsa-tokens-1"
INDEX = "index.json"
SHARD_TOKENS = 1 << 28
BLOCK = 1 << 20  # tokens converted at once


def cache_root() -> Path:
    """Where all that is downloaded or prepared goes: $NSA_DATA_DIR, or nsa in the user's cache."""
    given = next((v for v in ("NSA_DATA_DIR", "XDG_CACHE_HOME") if os.environ.get(v)), None)
    try:
        root = Path(os.environ[given] if given else "~/.cache").expanduser()
    except RuntimeError as error:  # HOME is not set, and the system knows no such user
        raise ValueError(f"{error}: name a folder for data, as in NSA_DATA_DIR=/data/nsa") from None
    return root if given == "NSA_DATA_DIR" else root / "nsa"


def make_cache(folder: Path) -> None:
    """Make the folder that prepared data go to.

    Raises:
        ValueError: there is a file in its place, or it may not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot hold prepared data ({error.strerror}): name a folder that can be "
            "written, as in NSA_DATA_DIR=/data/nsa"
        ) from error


def shard_folder(name: str, source: dict[str, Any]) -> Path:
    """Where the tokens made from `source` live: a readable name and a digest of the settings."""
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:12]
    return cache_root() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest}"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every id."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"verify {path.name}", delay=2)
    with path.open("rb") as file, bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


class ShardWriter:
    """Writes tokens into shards of at most `SHARD_TOKENS`, then the index that names them.

    A context manager: the index is written only where the block ends without an exception. Splits
    may be written in any order, in as many pieces as wanted.
    """

    def __init__(self, folder: Path, vocab_size: int, source: dict[str, Any]) -> None:
        self.folder = folder
        self.dtype = token_dtype(vocab_size)
        self.index: dict[str, Any] = {
            "format": FORMAT,
            "source": source,
            "vocab_size": vocab_size,
            "dtype": self.dtype.str,
            "splits": {},
        }
        self._open: dict[str, tuple[BinaryIO, Any]] = {}  # split -> file, sha256 so far
        self._documents: dict[str, tuple[BinaryIO, Any]] = {}  # likewise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for split in list(self._open):
            self._finish_shard(split)
        for split, (file, digest) in self._documents.items():
            file.close()
            self.index["splits"][split]["documents"]["sha256"] = digest.hexdigest()
        for entry in self.index["splits"].values():
            entry["bytes_per_token"] = entry["bytes"] / max(entry["tokens"], 1)
        if error is None:
            (self.folder / INDEX).write_text(json.dumps(self.index, indent=2) + "\n")

    def num_tokens(self, split: str) -> int:
        """Tokens written to a split so far."""
        return self.index["splits"].get(split, {}).get("tokens", 0)

    def append(self, split: str, tokens: NDArray[np.integer], num_bytes: int) -> None:
        """Add tokens [n] that stand for `num_bytes` bytes of text."""
        entry = self.index["splits"].setdefault(split, empty_split())
        entry["tokens"] += len(tokens)
        entry["bytes"] += num_bytes
        while len(tokens):
            if split not in self._open:
                self._start_shard(split)
            room = SHARD_TOKENS - entry["shards"][-1]["tokens"]
            self._write(split, tokens[:room])
            if len(tokens) >= room:
                self._finish_shard(split)
            tokens = tokens[room:]

    def begin_documents(self, split: str, starts: NDArray[np.integer]) -> None:
        """Say at which tokens of the split documents begin, in their order."""
        if split not in self._documents:
            entry = self.index["splits"].setdefault(split, empty_split())
            entry["documents"] = {"file": f"{split}.documents", "number": 0, "sha256": ""}
            file = (self.folder / f"{split}.documents").open("wb")
            self._documents[split] = (file, hashlib.sha256())
        file, digest = self._documents[split]
        block = starts.astype("<i8").tobytes()
        file.write(block)
        digest.update(block)
        self.index["splits"][split]["documents"]["number"] += len(starts)

    def _start_shard(self, split: str) -> None:
        shards = self.index["splits"][split]["shards"]
        shards.append({"file": f"{split}-{len(shards):05d}.bin", "tokens": 0, "sha256": ""})
        self._open[split] = ((self.folder / shards[-1]["file"]).open("wb"), hashlib.sha256())

    def _write(self, split: str, tokens: NDArray[np.integer]) -> None:
        file, digest = self._open[split]
        for start in range(0, len(tokens), BLOCK):
            block = tokens[start : start + BLOCK].astype(self.dtype).tobytes()
            file.write(block)
            digest.update(block)
        self.index["splits"][split]["shards"][-1]["tokens"] += len(tokens)

    def _finish_shard(self, split: str) -> None:
        file, digest = self._open.pop(split)
        file.close()
        self.index["splits"][split]["shards"][-1]["sha256"] = digest.hexdigest()


def empty_split() -> dict[str, Any]:
    """What the index says of a split of which nothing is written yet."""
    return {"tokens": 0, "bytes": 0, "shards": []}


def prepare_shards(
    folder: Path, source: dict[str, Any], build: Callable[[Path], None], verify: bool = True
) -> None:
    """Build the shards of `source` in `folder` once, or verify every byte of those that are there.

    Of several processes that come at once, one builds and the others wait, then verify.

    Raises:
        ValueError: a file of `folder` is missing, truncated or damaged, or of another source.
    """
    make_cache(folder.parent)
    if not folder.exists():
        with held(lock_of(folder)):
            if not folder.exists():
                build_whole(folder, build)
                return
    if verify:
        verify_shards(folder, source)


def lock_of(folder: Path) -> Path:
    """The lock of the process that writes into a prepared folder."""
    return Path(f"{folder}.lock")


def build_whole(folder: Path, build: Callable[[Path], object]) -> None:
    """Let `build` write into a folder aside, which gets its name when it is complete.

    Only for the process that has the lock.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed process: the lock is ours
    part.mkdir()
    try:
        build(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def verify_shards(folder: Path, source: dict[str, Any]) -> None:
    """Compare the source and the sha256 of every file with the index; so of chapters inside."""
    index = read_index(folder)
    if index["source"] != source:
        refuse(folder / INDEX, f"it was made from {index['source']}, this run asks for {source}")
    for entry in index["splits"].values():
        for shard in entry["shards"]:
            verify_file(folder / shard["file"], shard["sha256"])
        if documents := entry.get("documents"):
            verify_file(folder / documents["file"], documents["sha256"])
    if tokenizer := index.get("tokenizer"):
        verify_file(folder / tokenizer["file"], tokenizer["sha256"])
    for chapter in sorted(folder.glob("chapter-?????")):
        verify_shards(chapter, source)


def verify_file(path: Path, sha256: str) -> None:
    """Compare one file's sha256 with the index."""
    if not path.is_file():
        refuse(path, "it is missing")
    if (found := file_sha256(path)) != sha256:
        refuse(path, f"its sha256 is {found}, the index says {sha256}")


def open_shards(folder: Path) -> tuple[dict[str, Any], dict[str, TokenSplit]]:
    """The index and the splits of a prepared folder, every shard's size checked."""
    index = read_index(folder)
    width = np.dtype(index["dtype"]).itemsize
    for entry in index["splits"].values():
        for shard in entry["shards"]:
            check_size(folder / shard["file"], shard["tokens"] * width)
        if documents := entry.get("documents"):
            check_size(folder / documents["file"], 8 * documents["number"])
    splits = {name: TokenSplit(folder, index["dtype"], s) for name, s in index["splits"].items()}
    return index, splits


def check_size(path: Path, size: int) -> None:
    """Refuse a file that is not there, or not as many bytes long as the index says."""
    if not path.is_file():
        refuse(path, "it is missing")
    if path.stat().st_size != size:
        refuse(path, f"it has {path.stat().st_size} bytes, the index says {size}")


def identity(indices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What tells the training tokens of one corpus from those of another, whatever it is called.

    A digest of the tokens themselves: a corpus that was moved, or read again, stays the same.

    Args:
        indices: of the chapters (`data.chapters`), in their order; of most corpora one.
    """
    parts = [index["splits"]["train"] for index in indices]
    shards = [shard["sha256"] for part in parts for shard in part["shards"]]
    digest = hashlib.sha256("".join(shards).encode())
    first, tokenizer = indices[0], indices[0].get("tokenizer")
    size, sha256 = first["vocab_size"], tokenizer and tokenizer["sha256"][:12]
    return {
        "corpus": f"{first['source']['corpus']}, sha256 {digest.hexdigest()[:12]}",
        "train_tokens": sum(part["tokens"] for part in parts),
        "tokenizer": f"{size} tokens, sha256 {sha256}" if tokenizer else "bytes",
    }


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder, refused where it is none of ours."""
    path = folder / INDEX
    if not path.is_file():
        refuse(path, "it is missing")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        refuse(path, f"it is no JSON ({error})")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        refuse(path, f"it is not an index of format {FORMAT!r}")
    return index


def refuse(path: Path, reason: str) -> NoReturn:
    """Say which file of the cache cannot be used, why, and how to go on."""
    raise ValueError(
        f"{path} cannot be used: {reason}. "
        f"Delete the folder {path.parent} and run again: it is rebuilt"
    )
