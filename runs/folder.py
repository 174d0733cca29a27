"""Where a run keeps its files, and how a file comes into being whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"  # inside a run folder


def run_folder(trainer: Any) -> Path:
    """The folder of this run: the trainer's `default_root_dir`."""
    return Path(trainer.default_root_dir)


def leaves_files(trainer: Any) -> bool:
    """Whether this process writes the run's files: rank zero does, but not in a `fast_dev_run`."""
    return trainer.is_global_zero and not trainer.fast_dev_run


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, without drafts and without links, such as last.ckpt."""
    named = [path for path in folder.glob("*.ckpt") if path.name[0] != "."]
    own = [path for path in named if not path.is_symlink()]
    return sorted(own, key=lambda path: path.stat().st_mtime_ns, reverse=True)


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
