"""A limit for each start of a run, which then goes on with the same command line."""

import os
import re
import signal
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.preemption import Preemption


def seconds(limit: str) -> float:
    """Of DD:HH:MM:SS.

    Raises:
        ValueError: for another form.
    """
    if not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", str(limit)):
        raise ValueError(f"max_time_per_start={limit} must have the form DD:HH:MM:SS, in quotes")
    days, hours, minutes, rest = (int(part) for part in str(limit).split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


class StartLimit(Callback):
    """After so long of training, this process tells itself to save and end, as a cluster would.

    Args:
        limit: DD:HH:MM:SS.
    """

    def __init__(self, limit: str) -> None:
        self._timer = threading.Timer(seconds(limit), os.kill, (os.getpid(), signal.SIGUSR1))
        self._timer.daemon = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timer.start()  # callbacks.preemption listens from here on

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timer.cancel()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        self._timer.cancel()


def limit_start(limit: str | None, trainer: Any) -> None:
    """Add a `StartLimit`, last of all, if there is a limit.

    Raises:
        ValueError: if the limit has another form, or nobody would save the run.
    """
    if limit is None:
        return
    if not any(isinstance(callback, Preemption) for callback in trainer.callbacks):
        raise ValueError(
            f"max_time_per_start={limit} saves through callbacks.preemption: keep that callback"
        )
    trainer.callbacks.append(StartLimit(limit))
