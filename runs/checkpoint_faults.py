"""What is wrong with a checkpoint: whether every byte of it is as it was written.

A file, or a folder that every rank wrote its shards into.
"""

import hashlib
import io
import json
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from runs.folder import newest_first

ENTRIES = ("state_dict", "hyper_parameters", "optimizer_states", "loops", "global_step")
SHARDED = ("state_dict", "optimizer_states")  # those that lie in a folder's shards
REST = "meta.pt"  # of a folder: all but SHARDED, under the name that Lightning looks for
INDEX = ".metadata"  # of a folder: what lies where, under PyTorch's name
INDEX_NAMES = {  # what an index is made of, besides dtypes
    "pathlib": ("PosixPath", "WindowsPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}
MANIFEST = "manifest.json"  # of a folder: size and sha256 of every other file


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None; reads every byte once."""
    if path.is_dir():
        fault = find_folder_fault(path) or find_code(path)
        return fault or find_content_fault(path / REST, elsewhere=SHARDED)
    return find_file_fault(path) or find_content_fault(path)


def find_file_fault(path: Path) -> str | None:
    if not path.stat().st_size:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # compares the checksum of every record
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        return f"it is damaged or not a checkpoint ({first_line(error)})"
    return None if broken is None else f"its record {broken} is damaged"


def find_content_fault(path: Path, elsewhere: tuple[str, ...] = ()) -> str | None:
    """Whether it can be loaded and has all entries but those that are `elsewhere`."""
    try:
        content = load_file(path)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        return f"it is damaged or not a checkpoint ({first_line(error)})"
    here = content if isinstance(content, dict) else {}
    missing = [name for name in ENTRIES if name not in here and name not in elsewhere]
    return f"it is not a training checkpoint: no {', '.join(missing)}" if missing else None


def find_folder_fault(folder: Path) -> str | None:
    """How a folder differs from its manifest: in files, in sizes, in contents."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"it has no readable {MANIFEST}"
    here = {path.name for path in folder.iterdir()} - {MANIFEST}
    if missing := manifest.keys() - here:
        return f"its file {min(missing)} is missing"
    if foreign := here - manifest.keys():
        return f"{min(foreign)} is not one of its files"
    for name, written in manifest.items():
        if (size := (folder / name).stat().st_size) != written["bytes"]:
            return f"its file {name} has {size:,} bytes instead of {written['bytes']:,}"
    now = fingerprints([folder / name for name in manifest])
    damaged = [name for name in manifest if now[name] != manifest[name]]
    return f"its file {min(damaged)} is damaged" if damaged else None


class IndexReader(pickle.Unpickler):
    """Reads what lies where in a folder; refuses names that no such index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def find_code(folder: Path) -> str | None:
    """What in a folder is more than plain values, or None.

    PyTorch's own reader of folders unpickles whatever it finds, and so could run code. Call this
    before it.
    """
    try:
        with (folder / INDEX).open("rb") as file:
            index = IndexReader(file).load()
        for item, place in index.storage_data.items():
            if isinstance(index.state_dict_metadata[item.fqn], BytesStorageMetadata):
                with (folder / Path(place.relative_path).name).open("rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, KeyError) as error:
        return f"it holds more than plain values ({first_line(error)})"
    return None


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """None where it is missing or is not a manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        complete = all({"bytes", "sha256"} <= written.keys() for written in manifest.values())
    except (OSError, ValueError, AttributeError):
        return None
    return manifest if complete else None


def fingerprints(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file, by name."""

    def fingerprint(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": path.stat().st_size, "sha256": digest}

    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return dict(zip((path.name for path in files), pool.map(fingerprint, files), strict=True))


def older_whole_one(path: Path) -> str:
    """What to go on from in place of `path`."""
    siblings, real = newest_first(path.parent), path.resolve()
    older = siblings[siblings.index(real) + 1 :] if real in siblings else siblings
    whole = next((other for other in older if find_fault(other) is None), None)
    return f"the one before it is whole: ckpt_path={whole}" if whole else "no older one is whole"


def load_file(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
