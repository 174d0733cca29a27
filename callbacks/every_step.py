"""The base of callbacks that look at what every optimizer step left behind, some steps late."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.every_n_steps import EveryNSteps


@dataclass(frozen=True)
class Step:
    """An optimizer step in numbers.

    Args:
        number: from 1.
        losses: of each rank, and of each of its micro-batches, in nats a token.
        grad_norm: over all parameters, before clipping.
        broken: whether a loss or the gradient is not finite and a smaller loss scale cannot help.
    """

    number: int
    losses: list[list[float]]
    grad_norm: float
    broken: bool

    @property
    def loss(self) -> float:
        """The mean over all ranks and micro-batches."""
        return sum(map(sum, self.losses)) / (len(self.losses) * len(self.losses[0]))

    def worst(self) -> tuple[int, int]:
        """Rank and micro-batch of the first loss that is not finite, or of the highest one."""
        places = [(r, m) for r, losses in enumerate(self.losses) for m in range(len(losses))]
        finite = [math.isfinite(self.losses[r][m]) for r, m in places]
        if not all(finite):
            return places[finite.index(False)]
        return max(places, key=lambda place: self.losses[place[0]][place[1]])


class EveryStep(EveryNSteps):
    """Gives every optimizer step to `on_steps`, on all ranks, and idles under `fast_dev_run`.

    What a step leaves behind (`step_losses` and `grad_norm` of the module) stays on its device and
    its rank until it is read: every n steps, before any checkpoint, and at the end. So nothing
    waits for a GPU in between. A subclass's `count` is saved in checkpoints.

    Args:
        every_n_steps: None reads at every step on a CPU, where it costs nothing, and at the
            trainer's `log_every_n_steps` elsewhere.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self._every_n_steps = every_n_steps
        self._unread: list[tuple[int, Tensor]] = []  # (step, [gradient norm, losses])
        self.count = 0

    @abstractmethod
    def on_steps(self, trainer: Trainer, pl_module: LightningModule, steps: list[Step]) -> None:
        """The steps since the last call, at least one, the same on every rank."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._unread = []
        if self._every_n_steps is None:
            self.every_n_steps = 1 if pl_module.device.type == "cpu" else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        settings: Any = trainer  # Lightning sets it from outside the class
        if trainer.global_step != self._last_step and not settings.fast_dev_run:
            numbers = torch.cat([module.grad_norm[None], module.step_losses])
            self._unread.append((trainer.global_step, numbers))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._read(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._read(trainer, pl_module)
        # `state_dict` would be asked before the last steps are read
        checkpoint["callbacks"][self.state_key] = {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unread, self._unread = self._unread, []
        if not unread:
            return
        here = torch.stack([numbers for _, numbers in unread])  # [steps, 1 + micro-batches]
        ranks = torch.as_tensor(pl_module.all_gather(here)).view(-1, *here.shape).tolist()
        scaled = scales_losses(trainer)
        steps = []
        for i, (number, _) in enumerate(unread):
            losses, grad_norm = [rank[i][1:] for rank in ranks], ranks[0][i][0]
            finite = all(math.isfinite(loss) for rank in losses for loss in rank)
            broken = not finite or (not math.isfinite(grad_norm) and not scaled)
            steps.append(Step(number, losses, grad_norm, broken))
        self.on_steps(trainer, pl_module, steps)


def scales_losses(trainer: Trainer) -> bool:
    """Whether gradients may overflow only because of their scale, which the scaler then halves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1


def span(samples: Sequence[int]) -> str:
    """The numbers of samples that follow one another, as first–last."""
    first, last = samples[0], samples[-1]
    return str(first) if first == last else f"{first}–{last}"
