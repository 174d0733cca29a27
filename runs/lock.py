"""One run folder, one run: the folder is taken before anything is written into it."""

import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

PATIENCE = 8  # seconds: loaders of a run that was killed hold on to it until they notice
LOCK = ".lock"  # stays behind when the run ends; only a running process holds it


class RunLock(Callback):
    """Makes the folder of a run, or of a sweep, and holds it until the process ends.

    Hydra calls it before it writes its own files. Ends the program where the folder is taken or
    cannot be written: by SystemExit, since Hydra only warns of other exceptions in a callback.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take(Path(config.hydra.sweep.dir))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # joblib copies it to processes that run a sweep's jobs: the lock stays here

    def _take(self, folder: Path) -> None:
        if not starts_the_run():
            return
        self._lock = FileLock(folder / LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            sys.exit(
                f"run folder {folder} is taken: another process is running in it. Wait until it "
                "ends, stop it, or name another folder with run_dir="
            )
        except OSError as error:
            sys.exit(
                f"run folder {folder} cannot be written ({error.strerror}): name another with "
                "run_dir="
            )


def starts_the_run() -> bool:
    """Whether this process is global rank zero, as far as the environment tells."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return all(rank == "0" for rank in ranks)
