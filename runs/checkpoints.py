"""What a checkpoint is, how it comes into being whole, and whether it still is.

A file, or a folder that every rank wrote its shards into. What is being written has a hidden name.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from runs.folder import SAVED_AT, newest_first, replacing, write_text

PARTS = ("state_dict", "hyper_parameters", "optimizer_states", "loops", "global_step")
SHARDED = ("state_dict", "optimizer_states")  # of them, what lies in a folder's shards
REST = "meta.pt"  # of a folder: all but SHARDED, under the name that Lightning looks for
INDEX = ".metadata"  # of a folder: what lies where, under PyTorch's name
INDEX_NAMES = {  # what an index is made of, beside dtypes
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


class NotWritten(OSError):
    """A checkpoint could not be written; says why, and which older one is whole."""


# Reading


def check(path: Path) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, if every byte of it is as it was written.

    Raises:
        ValueError: if it is damaged or not of this project; names the newest older one that is
            whole.
    """
    refuse_faults(path)
    return load(path)


def check_metadata(path: Path) -> dict[str, Any]:
    """As `check`, but a folder's weights and optimizer states stay on disk."""
    refuse_faults(path)
    return load_file(path / REST if path.is_dir() else path)


def refuse_faults(path: Path) -> None:
    """Raises the ValueError of `check`."""
    fault = find_fault(path)
    if fault is not None:
        raise ValueError(f"checkpoint {path} cannot be used: {fault}; {older_whole_one(path)}")


def load(path: Path) -> dict[str, Any]:
    """The content of a whole checkpoint; that of a folder as if one process had written it."""
    if not path.is_dir():
        return load_file(path)
    content = _load_distributed_checkpoint(path)
    named = [content.pop(key) for key in sorted(content) if key.startswith("optimizer_")]
    return content | {"optimizer_states": [numbered(state) for state in named]}


def find_content(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, no more than that read of it; None if it cannot be read."""
    try:
        content = load_file(path / REST if path.is_dir() else path)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError):
        return None
    return content if isinstance(content, dict) else None


def corpus_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the datamodule left in a checkpoint: its tokenizer and its order of samples."""
    parts = (part for part in content.values() if isinstance(part, Mapping))
    return next((part for part in parts if "tokenizer" in part or "sample_order" in part), {})


def saved_at(path: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970: as it says, or by its file's time."""
    content = find_content(path) or {}
    states = content.get("callbacks", {}).values()
    times = [state[SAVED_AT] for state in states if isinstance(state, dict) and SAVED_AT in state]
    return max(times, default=path.stat().st_mtime)


def load_file(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by name, keyed as a plain optimizer does: by place in its groups."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: place for place, name in enumerate(names)}
    groups = [g | {"params": [number[name] for name in g["params"]]} for g in state["param_groups"]]
    return {"state": {number[k]: v for k, v in state["state"].items()}, "param_groups": groups}


# Faults


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
    """Whether it can be loaded and has all parts but those that are `elsewhere`."""
    try:
        content = load_file(path)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        return f"it is damaged or not a checkpoint ({first_line(error)})"
    here = content if isinstance(content, dict) else {}
    missing = [part for part in PARTS if part not in here and part not in elsewhere]
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
        return f"{min(foreign)} is no file of it"
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

    PyTorch's own reader of folders unpickles whatever there is, and so would run it: this goes
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
    """None where it is missing or no manifest."""
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


# Writing


class WholeCheckpointIO(CheckpointIO):
    """Streams a checkpoint into a draft beside its place, and renames it once it is on the disk.

    Lightning's own keeps the whole file in memory, and moves it from another file system. A folder
    that `FSDP2Strategy` wrote is loaded and removed as well.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Raises NotWritten where it cannot be done; what was there before is there still."""
        path = Path(path)
        try:
            write(checkpoint, path)
        except (OSError, RuntimeError) as error:
            raise NotWritten(not_written(path, reason(error))) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """On the CPU, plain values and tensors alone, whatever is asked for."""
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file, whole or not at all."""
    remove_drafts(path.parent)
    with replacing(path) as draft:
        write_through(checkpoint, draft)
        if path.is_dir():
            remove(path)


def write_through(content: dict[str, Any], path: Path) -> None:
    """Write `content` and wait until it is on the disk."""
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def draft_of(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    return folder.with_name(f".{folder.name}.part")


def publish(folder: Path, manifest: dict[str, dict[str, Any]]) -> None:
    """Give a folder that is written, and whose files are `manifest`, its name."""
    draft = draft_of(folder)
    write_text(draft / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    former = unnamed(folder)
    draft.rename(folder)
    shutil.rmtree(former, ignore_errors=True)  # what is left of it goes with the next save


def unnamed(folder: Path) -> Path:
    """Where a folder lies, if there is one, that has lost its name."""
    hidden = folder.with_name(f".{folder.name}.old")
    if folder.is_dir():
        folder.rename(hidden)
    return hidden


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one; a folder loses its name first."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(unnamed(path))
    else:
        path.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Remove what a killed process left half written, or half removed."""
    for draft in folder.glob(".*.ckpt*"):
        remove(draft)


def reason(error: BaseException) -> str:
    """The system's word for a failed write: PyTorch hides it behind an error of its own."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__cause__ or first.__context__
    return str(first.strerror or first) if first else first_line(error)


def first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def not_written(path: Path, why: str) -> str:
    """What to say where `path` could not be written."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free / 2**30
    return f"checkpoint {path} was not written: {why} ({free:.1f} GiB are free); " + (
        older_whole_one(path)
    )
