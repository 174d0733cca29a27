"""One run folder, one run: the folder is taken before anything is written into it."""

import shutil
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from runs import ranks
from runs.command_line import quoted
from runs.file_lock import NamedLock
from runs.folder import named_by_the_clock

PATIENCE = 8  # seconds: loaders of a run that was killed hold on to it until they notice
LOCK = ".lock"  # stays behind when the run ends; only a running process holds it
EMPTY = (LOCK, ".hydra", "train.log", "multirun.yaml")  # in a folder where nothing was done


class RunLock(Callback):
    """Makes the folder of a run, or of a sweep, and holds it until the process ends.

    A folder that the clock names is a new one: where another run began in the same second, this
    one gets the next free name. A named folder is waited for, for a moment. Hydra calls it before
    it writes its own files. Ends the program where the folder is taken or cannot be written: by
    SystemExit, since Hydra only warns of other exceptions in a callback.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take(config, "sweep")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # joblib copies it to processes that run a sweep's jobs: the lock stays here

    def _take(self, config: DictConfig, kind: str) -> None:
        if not ranks.is_zero():
            return
        place = config.hydra[kind]
        folder = Path(place.dir)
        is_new = named_by_the_clock(str(OmegaConf.to_container(place, resolve=False)["dir"]))  # type: ignore[index, call-overload]
        try:
            made = make_new(folder) if is_new else make(folder)
            self._lock = NamedLock((made or folder) / LOCK)
            self._lock.acquire(PATIENCE)
        except Timeout:
            sys.exit(
                f"run folder {folder} is taken: {self._lock.holder()} is running in it. Wait until "
                "it ends, stop it, or name another folder with run_dir="
            )
        except OSError as error:
            sys.exit(
                f"run folder {folder} cannot be written ({error.strerror}): name another with "
                "run_dir="
            )
        if made and made != folder:
            self._rename(config, kind, made)

    def _rename(self, config: DictConfig, kind: str, folder: Path) -> None:
        """Tell Hydra, which composes the config of each job of a sweep anew."""
        with read_write(config.hydra):
            config.hydra[kind].dir = str(folder)
            config.hydra.overrides.hydra.append(f"hydra.{kind}.dir={quoted(str(folder))}")


def make(folder: Path) -> Path | None:
    """Make a folder; None where it is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        folder.mkdir(exist_ok=True)  # refuses a file
        return None
    return folder


def make_new(folder: Path) -> Path:
    """Make a folder of this name, or of the next one that is free: name_2, name_3, …"""
    return next(made for name in names(folder) if (made := make(name)))


def names(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}_{number}") for number in count(2))


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that was refused, and the parents that are empty then."""
    if not folder.is_dir():
        return
    left = {path.name for path in folder.iterdir()} - set(EMPTY)
    if any(not name.startswith("train_rank_") for name in left):
        return
    shutil.rmtree(folder, ignore_errors=True)
    parent = folder.parent
    while parent != Path.cwd() and parent != parent.parent and not any(parent.iterdir()):
        parent.rmdir()
        parent = parent.parent
