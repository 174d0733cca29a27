"""Counts the steps that were skipped for a broken number, and stops a run that has too many."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.tensor import DTensor

from callbacks.every_n_steps import log_metrics
from callbacks.every_step import EveryStep, Step, span
from callbacks.step_checkpoint import StepCheckpoint

log = logging.getLogger(__name__)

SHOWN = 10  # of the skipped steps, in the error that ends a run
START_AGAIN = "start again with a lower optimizer.lr or a longer scheduler.warmup_steps"


class Guard(EveryStep):
    """Lets a run go on past steps whose loss or gradient is not finite, within a budget.

    The module has skipped such a step: nothing was updated, on any rank. The guard warns of each,
    with its value and its samples, and logs `optim/skipped_steps`, how many there were so far,
    whenever that grows. Once they are more than the budget it has `StepCheckpoint` save and raises
    FloatingPointError, on all ranks. A step that a loss scaler (16-mixed) skips, to go on with half
    the scale, does not count, unless a loss is not finite or the scale is below 1.

    Before a checkpoint the weights must be finite as well: the last update may have broken them
    although its gradient was finite.

    Args:
        skip_budget: steps that may be skipped, over the whole run, however often it goes on; 0
            stops at the first.
        every_n_steps: as in `EveryStep`.

    Raises:
        ValueError: if the budget is below 0.
    """

    def __init__(self, skip_budget: int = 10, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self.check_at_least(0, skip_budget=skip_budget)
        self.skip_budget = skip_budget
        self._found: list[str] = []  # what broke, since this process started

    def on_steps(self, trainer: Trainer, pl_module: LightningModule, steps: list[Step]) -> None:
        broken = [step for step in steps if step.broken]
        for step in broken:
            self.count += 1
            self._found.append(what_broke(trainer, step))
            budget = f"{self.count} skipped so far, of {self.skip_budget} at most"
            if trainer.is_global_zero:
                log.warning("skipped %s; %s", self._found[-1], budget)
        if broken:
            log_metrics(trainer, {"optim/skipped_steps": float(self.count)})

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        super().on_nth_step(trainer, pl_module, batch)
        self._stop_beyond_budget(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._stop_beyond_budget(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if broken := broken_weights(pl_module):
            raise FloatingPointError(
                f"weights are not finite after step {trainer.global_step}, {len(broken)} of "
                f"{len(list(pl_module.parameters()))}, {broken[0]} first, and no checkpoint is "
                f"written: {START_AGAIN}; {newest_checkpoint(trainer)}"
            )

    def _stop_beyond_budget(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._found or self.count <= self.skip_budget:
            return
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, StepCheckpoint):
                saver.on_train_end(trainer, pl_module)
        steps = "".join(f"  {what}\n" for what in self._found[-SHOWN:])
        raise FloatingPointError(
            f"the number of skipped steps, {self.count}, is above callbacks.guard.skip_budget="
            f"{self.skip_budget}. The last of them:\n{steps}"
            f"If they follow one another, the weights have diverged: {START_AGAIN}. "
            f"If not, go on behind these samples with a larger budget; {newest_checkpoint(trainer)}"
        )


def what_broke(trainer: Any, step: Step) -> str:
    """The step, the value, and where in the data it comes from."""
    samples_of = trainer.datamodule.samples_of
    rank, micro_batch = step.worst()
    loss = step.losses[rank][micro_batch]
    if not math.isfinite(loss):
        samples = span(samples_of(step.number, rank, micro_batch))
        where = f"rank {rank}, micro-batch {micro_batch}: samples {samples}"
        return f"step {step.number}, whose loss is {loss} ({where})"
    last = samples_of(step.number, len(step.losses) - 1, len(step.losses[0]) - 1)
    samples = span([*samples_of(step.number, 0, 0), *last])
    return (
        f"step {step.number}, whose gradient norm is {step.grad_norm}, every loss being finite "
        f"(samples {samples})"
    )


def broken_weights(pl_module: LightningModule) -> list[str]:
    """The names of the parameters that are not finite; of a sharded one, on any rank."""
    names, parameters = zip(*pl_module.named_parameters(), strict=True)
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    broken = torch.stack([~torch.isfinite(part).all() for part in parts]).int()
    ranks = torch.as_tensor(pl_module.all_gather(broken)).view(-1, len(names))
    return [name for name, bad in zip(names, ranks.any(dim=0).tolist(), strict=True) if bad]


def newest_checkpoint(trainer: Trainer) -> str:
    """What an error says of last.ckpt, or else of what a checkpoint callback saved."""
    savers, kinds = trainer.checkpoint_callbacks, ("last_model_path", "best_model_path")
    paths = [getattr(saver, kind, "") for kind in kinds for saver in savers]
    newest = next((path for path in paths if path and Path(path).exists()), None)
    return f"the newest checkpoint is {newest}" if newest else "no checkpoint was written yet"
