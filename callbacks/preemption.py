"""A run that is told to end: a signal to any of its processes saves it and ends it."""

import signal
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.signals import SIGNALS, exit_code, first_interrupt, heard
from callbacks.step_checkpoint import StepCheckpoint

INTERRUPTED = "saving at the end of this step; Ctrl-C again ends at once, without saving"


class Preempted(BaseException):
    """The run was told to end, and is saved; `exit_code` is what the program ends with.

    Like KeyboardInterrupt, it is not an error: a sweep does not go on with its next job.
    """

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


class Preemption(Callback):
    """Saves at the next optimizer step after a signal, then raises `Preempted`.

    The signals are SIGTERM, SIGUSR1, SIGHUP (the terminal was closed) and SIGINT (Ctrl-C). A second
    Ctrl-C ends the process at once, whatever it is doing and without saving.

    The signal may reach any rank: at every step the ranks tell one another, over a group of their
    own on the CPU, so that no device waits. A step is never cut in two: gradients that are being
    accumulated are not lost. Where a validation is due at that step, or under way, it is finished
    first; the run is saved before it as well, in case the time is too short. The last step of a
    run ends it as always.

    Where ranks wait for data between two steps (`data.waiting`), a signal ends the wait.
    If the data will not come, the run is saved as well before it ends with that error.

    In place of Lightning's own handling, which waits for the device in every micro-batch, hangs
    when a signal reaches one rank alone, and elsewhere ends a run as if it were finished. Outside
    training, where there is nothing to save, the handlers of `leave_on_signals` stand.
    """

    def __init__(self) -> None:
        self._told = 0  # the signal that this rank was told by; one rank is enough
        self._saved = 0  # or about to be, because some rank was told by this signal
        self._step = 0
        self._leads = False  # rank zero speaks
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
        self._step, self._leads = trainer.global_step, trainer.is_global_zero
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):  # Lightning's, in every micro-batch
            loop._broadcast_sigterm_tensor = lambda: None
        for which in heard(*SIGNALS):
            self._handlers[which] = signal.signal(which, self._hear)
        wait: Any = getattr(trainer.datamodule, "step_wait", None)  # type: ignore[attr-defined]
        if wait is not None:
            wait.meet = partial(self._meet, trainer)
            wait.before_giving_up = partial(save_between_steps, trainer)

    def _hear(self, which: int, frame: FrameType | None) -> None:
        self._told = max(which, self._told)
        if which == signal.SIGINT:
            first_interrupt(INTERRUPTED if self._leads else None)

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
                saver.asked = bool(self._saved)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._saved:  # only now have the loggers what there is to say of the last step
            raise told_to_end(trainer, self._saved)

    def _meet(self, trainer: Trainer, own: Any) -> list[Any]:
        """The standings of all ranks, unless one lacks data and one has been told to end."""
        said = [(own, self._told)]
        if self._group is not None:
            said = [said[0]] * trainer.world_size
            dist.all_gather_object(said, said[0], group=self._group)
        standings, told = zip(*said, strict=True)
        if any(told) and any(standing.lacks for standing in standings):
            save_between_steps(trainer)
            raise told_to_end(trainer, max(told))
        return list(standings)

    def _ask_all_ranks(self) -> None:
        told = torch.tensor([self._told])
        if self._group is not None:
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        self._saved = int(told)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for which, handler in self._handlers.items():
            if signal.getsignal(which) != signal.SIG_DFL:  # a second Ctrl-C stays the system's
                signal.signal(which, handler)
        self._handlers = {}


def told_to_end(trainer: Trainer, which: int) -> Preempted:
    step = trainer.global_step
    what = f"saved after step {step}" if step else "before its first step was done"
    return Preempted(f"told to end: {what}", exit_code(which))


def save_between_steps(trainer: Trainer) -> None:
    """Save the last step, where that has not been done."""
    for saver in savers(trainer):
        saver.save_between_steps(trainer)


def savers(trainer: Trainer) -> list[StepCheckpoint]:
    """The callbacks that keep the run's checkpoints."""
    return [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, StepCheckpoint)]
