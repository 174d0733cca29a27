"""Limits of time: of each start of a run, and of the waits in which Lightning does not look."""

import os
import re
import signal
import threading
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

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


class WaitLimit(Callback):
    """Has trainer.max_time end training while a step waits for its samples (`data.waiting`) too.

    Lightning asks for the time after a step alone.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wait: Any = getattr(trainer.datamodule, "step_wait", None)  # type: ignore[attr-defined]
        if self._wait is not None:
            self._wait.time_is_over = partial(time_is_over, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._wait is not None and self._wait.timed_out:
            trainer.should_stop = True  # or Lightning would begin another epoch


def time_is_over(trainer: Any) -> bool:
    """Whether trainer.max_time is, and training may end: trainer.min_steps are done."""
    timers = (c for c in trainer.callbacks if isinstance(c, Timer))
    left = [s for timer in timers if (s := timer.time_remaining()) is not None]
    return min(left, default=1.0) <= 0 and trainer.fit_loop._can_stop_early
