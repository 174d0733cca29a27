"""Stops a run whose numbers broke, before a checkpoint of broken weights replaces a good one."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.every_n_steps import EveryNSteps
from nsa.parallel import full


class Guard(EveryNSteps):
    """Raises FloatingPointError on a non-finite training loss, with the step and the value.

    Every micro-batch's loss is looked at, but on the device: the first non-finite one is kept
    there with its step, and read every n steps and before any checkpoint is written. So nothing
    waits for a GPU in between, and the error comes at most n steps after the step it names. All
    ranks raise it, whichever found it.
    Before a checkpoint the weights must be finite as well: a finite loss does not show that the
    last update broke them.

    Args:
        every_n_steps: None reads at every step on a CPU, where it costs nothing, and at the
            trainer's `log_every_n_steps` elsewhere.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self._every_n_steps = every_n_steps
        self._step = 0  # the optimizer step that the micro-batch belongs to, from 1
        self._first: Tensor | None = None  # [step, loss] of the first non-finite loss; step 0: none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = torch.zeros(2, device=pl_module.device)
        if self._every_n_steps is None:
            self.every_n_steps = 1 if pl_module.device.type == "cpu" else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs is not None and self._first is not None:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            loss = loss.detach().float()
            broken = ~torch.isfinite(loss) & (self._first[0] == 0)
            this = torch.stack([torch.full_like(loss, self._step), loss])
            self._first = torch.where(broken, this, self._first)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._check_loss(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check_loss(trainer, pl_module)
        names, parameters = zip(*pl_module.named_parameters(), strict=True)
        finite = full(torch.stack([torch.isfinite(parameter).all() for parameter in parameters]))
        if not finite.all():
            broken = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
            raise FloatingPointError(
                f"{len(broken)} of {len(names)} weights are not finite after step "
                f"{trainer.global_step}, {broken[0]} first: no checkpoint is written. "
                + _advice(trainer)
            )

    def _check_loss(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first is None:
            return
        ranks = torch.as_tensor(pl_module.all_gather(self._first)).view(-1, 2).tolist()
        broken = [(step, loss) for step, loss in ranks if step]
        if broken:
            step, loss = min(broken, key=lambda found: found[0])
            raise FloatingPointError(f"the loss is {loss} at step {int(step)}. " + _advice(trainer))


def _advice(trainer: Trainer) -> str:
    saved = [getattr(saver, "last_model_path", "") for saver in trainer.checkpoint_callbacks]
    last = next((path for path in saved if path), None)
    where = f"go on from ckpt_path={last}" if last else "start again: no checkpoint was written yet"
    return f"Lower optimizer.lr or lengthen scheduler.warmup_steps, and {where}"
