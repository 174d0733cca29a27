"""Where a run keeps its files, and how a file comes into being whole."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"  # inside a run folder
SAVED_AT = "saved_at"  # in the state that callbacks leave in a checkpoint: seconds since 1970


def run_folder(trainer: Any) -> Path:
    """The folder of this run: the trainer's `default_root_dir`."""
    return Path(trainer.default_root_dir)


def leaves_files(trainer: Any) -> bool:
    """Whether this process writes the run's files: rank zero does, but not in a `fast_dev_run`."""
    return trainer.is_global_zero and not trainer.fast_dev_run


def named_by_the_clock(folder: str) -> bool:
    """Whether a folder of the config is meant to be a new one at every start."""
    return "${now:" in folder


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, without drafts and without links, such as last.ckpt.

    The times of files decide nothing but between two of one step: a copy has none of its own.
    """
    named = [path for path in folder.glob("*.ckpt") if path.name[0] != "."]
    own = [path for path in named if not path.is_symlink()]
    return sorted(own, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint: by its name, or, if it was renamed, as it says."""
    if found := re.search(r"step[_=](\d+)", checkpoint.name):
        return int(found[1])
    import torch  # which a name spares

    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"])
    except Exception:  # however it is broken: the next one to read it says so
        return -1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place when the block ends without an error.

    Whoever reads `path`, even after a kill, finds the old file or the new one, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as lines of a CSV without its head; a column that a row lacks is empty."""
    buffer = io.StringIO(newline="")
    csv.DictWriter(buffer, columns, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def csv_head(columns: Sequence[str]) -> str:
    """The first line of a CSV."""
    return csv_text(columns, [dict(zip(columns, columns, strict=True))])
