"""What a checkpoint is, and whether every byte of it is as it was written."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

FOLDER = "checkpoints"  # inside a run folder
PARTS = ("state_dict", "hyper_parameters", "optimizer_states", "loops", "global_step")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder; links to them, such as last.ckpt, are not told apart."""
    files = [path for path in folder.glob("*.ckpt") if path.is_file() and not path.is_symlink()]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def check(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, if every byte of it is as it was written.

    Raises:
        ValueError: if it is damaged or not of this project; names the newest older one that is
            whole.
    """
    fault = find_fault(path)
    if fault is None:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    siblings = newest_first(path.parent)
    real = path.resolve()
    older = siblings[siblings.index(real) + 1 :] if real in siblings else siblings
    whole = next((other for other in older if find_fault(other) is None), None)
    offer = f"the one before it is whole: ckpt_path={whole}" if whole else "no older one is whole"
    raise ValueError(f"checkpoint {path} cannot be used: {fault}; {offer}")


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None."""
    if not path.stat().st_size:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # compares the checksum of every record
        if broken is not None:
            return f"its record {broken} is damaged"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        return f"it is damaged or not a checkpoint ({str(error).splitlines()[0]})"
    missing = [part for part in PARTS if not isinstance(content, dict) or part not in content]
    return f"it is not a training checkpoint: no {', '.join(missing)}" if missing else None
