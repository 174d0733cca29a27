"""How long a run still takes: its steps, its validations and its test."""

import math
import time
from typing import Any

FORWARD = 1 / 3  # of the time of a training micro-batch


class TimeLeft:
    """Estimates the rest of a run from the pace of this process.

    A step takes as long as those so far, without the first one and without validations. A batch of
    a validation or of the test takes as long as those of the validations so far; before the first
    validation, as long as the forward pass of a training micro-batch.

    Args:
        test: whether a test follows training.
    """

    def __init__(self, *, test: bool) -> None:
        self._test = test
        self._test_batches = 0
        self._first: tuple[int, float] | None = None  # the first finished step, and when
        self._validated = 0  # the step of the last validation, or at which this process began
        self._began = 0.0
        self._validating = 0.0  # seconds, in all
        self._val_batches = 0  # done, in all

    def begin(self, trainer: Any) -> None:
        """Training begins, or goes on from a checkpoint."""
        self._test_batches = num_test_batches(trainer) if self._test else 0
        self._first, self._validated = None, trainer.global_step
        self._validating, self._val_batches = 0.0, 0

    def step_done(self, trainer: Any) -> None:
        if self._first is None:
            self._first = (trainer.global_step, self._training_clock())

    def validation_begins(self) -> None:
        self._began = time.perf_counter()

    def validation_done(self, trainer: Any) -> None:
        self._validating += time.perf_counter() - self._began
        self._val_batches += sum(trainer.num_val_batches)
        self._validated = trainer.global_step

    def seconds(self, trainer: Any) -> float | None:
        """Until the run ends; None where its end or its pace is not known."""
        if self._first is None or trainer.max_steps < 0:
            return None
        step, then = self._first
        done = trainer.global_step - step
        if done < 1:
            return None
        a_step = (self._training_clock() - then) / done
        a_batch = a_step / trainer.accumulate_grad_batches * FORWARD
        if self._val_batches:
            a_batch = self._validating / self._val_batches
        batches = self._validations_left(trainer) * sum(trainer.num_val_batches)
        batches += self._test_batches
        return a_step * (trainer.max_steps - trainer.global_step) + a_batch * batches

    def _training_clock(self) -> float:
        return time.perf_counter() - self._validating

    def _validations_left(self, trainer: Any) -> int:
        """Those that are due, and one at the end where none is due there."""
        if not trainer.enable_validation or trainer.check_val_every_n_epoch is not None:
            return 0
        every = trainer.val_check_batch / trainer.accumulate_grad_batches
        return math.ceil(trainer.max_steps / every) - math.floor(self._validated / every)


def num_test_batches(trainer: Any) -> int:
    """Of this rank, before a test has begun."""
    available, limit = len(trainer.datamodule.test_dataloader()), trainer.limit_test_batches
    return min(available, limit) if isinstance(limit, int) else int(available * limit)
