"""Files as bytes: plain or compressed, named one by one or by globs, or the standard library's."""

import bz2
import ctypes
import glob
import gzip
import hashlib
import lzma
import mmap
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import zstandard
from numpy.typing import NDArray
from tqdm import tqdm

BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 17  # bytes of text tokenized as one
BROKEN = (
    *(EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, zstandard.ZstdError),
    RuntimeError,  # an encrypted zip, or one of another kind of compression
)
Watch = Callable[[Path, bytes], None]
PACKED = (".bz2", ".gz", ".xz", ".zst", ".zip")
UNPACKABLE = "plain, .gz, .bz2, .xz, .zst or .zip (of one file)"


# Not in the corpus `stdlib`: tests, generated tables, and packages that distributions split off.
LEFT_OUT = {
    *("test", "tests", "encodings", "pydoc_data"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
}


def unpacked(path: Path) -> Iterator[bytes]:
    """The contents of a file in blocks; packed ones (see `PACKED`) are unpacked.

    Raises:
        ValueError: the file is truncated or damaged, or is not what its suffix says.
    """
    try:
        if packing(path) == ".zst":
            yield from _unpack_zst(path)
        else:
            with _open(path) as file:
                while block := file.read(BLOCK):
                    yield block
    except BROKEN as error:
        kind = packing(path) or "a plain file"
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error


def packing(path: Path) -> str:
    """The suffix that says how a file is packed, in lower case; none: it is plain."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def _open(path: Path) -> BinaryIO:
    match packing(path):
        case ".bz2":
            return cast(BinaryIO, bz2.open(path))
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case ".zip":
            archive = zipfile.ZipFile(path)
            if len(archive.namelist()) != 1:
                raise zipfile.BadZipFile(f"it holds {len(archive.namelist())} files, not one")
            return cast(BinaryIO, archive.open(archive.namelist()[0]))
        case _:
            return path.open("rb")


def _unpack_zst(path: Path) -> Iterator[bytes]:
    # Frame by frame: the library's file object takes a truncated file for a short one.
    frame = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            while block:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data
    if not frame.eof:
        raise EOFError("it ends in the middle of a frame")


def expand(option: str, patterns: list[str]) -> list[Path]:
    """The files that paths and globs name: globs sorted, a file named twice taken once.

    Raises:
        ValueError: a file does not exist or a glob matches none, by name.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise ValueError(
                f"{option}: {pattern!r} is a folder: for all files in it, write {path}/**"
            )
        matches = [path] if path.is_file() else []
        if not matches and glob.has_magic(pattern):
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            matches = [p for p in matches if p.is_file()]
        if not matches:
            kind = (
                "the glob matches no file" if glob.has_magic(pattern) else "there is no such file"
            )
            raise ValueError(f"{option}: {pattern!r}: {kind} (looked from {Path.cwd()})")
        files |= dict.fromkeys(p.resolve() for p in matches)
    return list(files)


def local_files(names: Iterable[str]) -> list[Path]:
    """The files on this disk behind names of files, folders or globs; none behind other names."""
    found: set[Path] = set()
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found.update(path.rglob("*"))
        else:
            found.update(Path(p) for p in glob.glob(str(path), recursive=True))
    return sorted(p.resolve() for p in found if p.is_file())


def stamp(files: list[Path]) -> list[list[Any]]:
    """What tells that files have changed: path, size and time of each."""
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def join(
    files: list[Path], target: Path, watch: Callable[[Path, bytes], None] | None = None
) -> NDArray[np.uint8]:
    """The unpacked contents of files, one after the other, written to `target` and mapped.

    `watch` is shown every block with its file.
    """
    with target.open("wb") as joined:
        for file in tqdm(files, desc="read", unit=" files", delay=1):
            for block in unpacked(file):
                joined.write(block)
                if watch:
                    watch(file, block)
        size = joined.tell()
    return np.memmap(target, np.uint8, mode="r") if size else np.empty(0, np.uint8)


def release(files: Collection[str]) -> int:
    """Give back the memory that read-only mappings of files take: it is read again where needed.

    Linux only; elsewhere the system takes it back when it is short. Returns 0, bytes held since.
    """
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if files and maps.exists() else ():
        addresses, mode, *_, path = line.split(maxsplit=5)
        if mode.startswith("r--") and path in files:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            length = ctypes.c_size_t(stop - start)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, mmap.MADV_DONTNEED)
    return 0


def character_start(text: NDArray[np.uint8], position: int) -> int:
    """The first position from here on at which a UTF-8 character begins, or the text ends."""
    while position < len(text) and text[position] & 0xC0 == 0x80:
        position += 1
    return position


def pieces(text: NDArray[np.uint8], size: int = PIECE) -> Iterator[bytes]:
    """The text cut into pieces of about `size` bytes, between characters."""
    start = 0
    while start < len(text):
        stop = character_start(text, min(start + size, len(text)))
        yield text[start:stop].tobytes()
        start = stop


def decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    """Blocks of text as strings; what is no UTF-8 reads as U+FFFD."""
    return (block.decode("utf-8", "replace") for block in blocks)


def stdlib_files() -> dict[str, Path]:
    """The sources of the running Python's standard library, path inside it -> file, in order.

    Choice and order hang on the paths only: a Python version gives the same corpus on any machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for top in root.iterdir():
        if top.name.removesuffix(".py") in sys.stdlib_module_names - LEFT_OUT:
            for path in [top] if top.suffix == ".py" else top.rglob("*.py"):
                name = path.relative_to(root)
                if LEFT_OUT.isdisjoint(name.parts):
                    files[name.as_posix()] = path
    if not files:
        raise ValueError(
            f"data=stdlib: {root} holds no Python sources: use data=text or data=enwik8"
        )
    return dict(sorted(files.items()))


def split_files(sizes: dict[str, int], val: float, test: float) -> dict[str, str]:
    """Name -> split, by whole files, for names with their sizes in bytes.

    In the order of their names' hashes, files go to val until it has its fraction of the bytes,
    then to test, then to train.
    """
    total, before, splits = sum(sizes.values()), 0, {}
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        share = before / max(total, 1)
        splits[name] = "val" if share < val else "test" if share < val + test else "train"
        before += sizes[name]
    return {name: splits[name] for name in sizes}
