"""A run that is told to end: a signal to any of its processes saves it and ends it."""

import signal
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.step_checkpoint import StepCheckpoint

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # and SIGINT, in training
EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Preempted(BaseException):
    """The run was told to end, and is saved.

    Like KeyboardInterrupt, it is not an error: a sweep does not go on with its next job.
    """


class Preemption(Callback):
    """Saves at the next optimizer step after a signal, then raises `Preempted`.

    The signals are SIGTERM, SIGUSR1, SIGHUP (the terminal was closed) and SIGINT (Ctrl-C). A second
    Ctrl-C ends the run at once, without saving.

    The signal may reach any rank: at every step the ranks tell one another, over a group of their
    own on the CPU, so that no device waits. A step is never cut in two: gradients that are being
    accumulated are not lost. Where a validation is due at that step, or under way, it is finished
    first; the run is saved before it as well, in case the time is too short. The last step of a
    run ends it as always.

    In place of Lightning's own handling, which waits for the device in every micro-batch, hangs
    when a signal reaches one rank alone, and elsewhere ends a run as if it were finished. Outside
    training, where there is nothing to save, the handlers of `leave_on_signals` stand.
    """

    def __init__(self) -> None:
        self._told = False  # this rank; one rank is enough
        self._saved = False  # or about to be, because some rank was told
        self._step = 0
        self._group: Any = None  # of all ranks, on the CPU; None for one process
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        signals: Any = trainer._signal_connector
        signals.register_signal_handlers = lambda: None  # Lightning's, of every stage
        if stage == "fit" and not savers(trainer):
            raise ValueError(
                "callbacks.preemption saves through callbacks.checkpoint_last: keep that one too, "
                "or drop both"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):  # Lightning's, in every micro-batch
            loop._broadcast_sigterm_tensor = lambda: None
        for which in heard(*SIGNALS, signal.SIGINT):
            self._handlers[which] = signal.signal(which, self._hear)

    def _hear(self, which: int, frame: FrameType | None) -> None:
        self._told = True
        if which == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # of the next Ctrl-C

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._ask_all_ranks()
        if self._saved:
            for saver in savers(trainer):
                saver.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._ask_all_ranks()
            for saver in savers(trainer):  # it comes last: the others have noted the result then
                saver.asked = self._saved

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._saved:  # only now have the loggers what there is to say of the last step
            raise Preempted(f"told to end: saved after step {trainer.global_step}")

    def _ask_all_ranks(self) -> None:
        told = torch.tensor([int(self._told)])
        if self._group is not None:
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        self._saved = bool(told)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for which, handler in self._handlers.items():
            signal.signal(which, handler)
        self._handlers = {}


def leave_on_signals() -> None:
    """End the program with EXIT_CODE on a signal, so that a cluster starts it again."""

    def leave(which: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_CODE)

    for which in heard(*SIGNALS):
        signal.signal(which, leave)


def heard(*signals: signal.Signals) -> list[signal.Signals]:
    """Those that this program was not started to ignore, as it is by nohup, which hides SIGHUP."""
    return [which for which in signals if signal.getsignal(which) != signal.SIG_IGN]


def savers(trainer: Trainer) -> list[StepCheckpoint]:
    """The callbacks that keep the run's checkpoints."""
    return [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, StepCheckpoint)]
