"""Checkpoints, read only if they are whole and written whole or not at all.

A file, or a folder that every rank wrote its shards into. What is being written has a hidden name.
"""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from runs.checkpoint_faults import (
    MANIFEST,
    REST,
    find_fault,
    first_line,
    load_file,
    older_whole_one,
)
from runs.folder import SAVED_AT, replacing, write_json


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
    """What a checkpoint says of itself, without reading its weights; None if it cannot be read."""
    try:
        content = load_file(path / REST if path.is_dir() else path)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError):
        return None
    return content if isinstance(content, dict) else None


def corpus_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the datamodule left in a checkpoint: its tokenizer and its order of samples."""
    states = (state for state in content.values() if isinstance(state, Mapping))
    return next((each for each in states if "tokenizer" in each or "sample_order" in each), {})


def saved_at(path: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970: as it says, or by its file's time."""
    content = find_content(path) or {}
    states = content.get("callbacks", {}).values()
    times = [state[SAVED_AT] for state in states if isinstance(state, dict) and SAVED_AT in state]
    return max(times, default=path.stat().st_mtime)


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by name, keyed as a plain optimizer does: by place in its groups."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: place for place, name in enumerate(names)}
    groups = [g | {"params": [number[name] for name in g["params"]]} for g in state["param_groups"]]
    return {"state": {number[k]: v for k, v in state["state"].items()}, "param_groups": groups}


# Writing


class WholeCheckpointIO(CheckpointIO):
    """Streams a checkpoint into a draft beside its place, and renames it once it is on the disk.

    Lightning's own keeps the whole file in memory, and moves it from another file system. A folder
    that `FSDP2Strategy` wrote is loaded and removed as well.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Raises NotWritten where it cannot be done; what was there before stays."""
        path = Path(path)
        try:
            write(checkpoint, path)
        except (OSError, RuntimeError) as error:
            raise NotWritten(not_written(path, reason(error))) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Always on the CPU, and plain values and tensors alone."""
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
    write_json(draft / MANIFEST, manifest)
    former = unnamed(folder)
    draft.rename(folder)
    shutil.rmtree(former, ignore_errors=True)  # what is left of it goes with the next save


def unnamed(folder: Path) -> Path:
    """Take a folder's name from it, if there is one; returns where it lies then."""
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
    """The system's message for a failed write: PyTorch hides it behind an error of its own."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__cause__ or first.__context__
    return str(first.strerror or first) if first else first_line(error)


def not_written(path: Path, why: str) -> str:
    """What to say where `path` could not be written."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free / 2**30
    return f"checkpoint {path} was not written: {why} ({free:.1f} GiB are free); " + (
        older_whole_one(path)
    )
