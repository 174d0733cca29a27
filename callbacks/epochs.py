"""How often each corpus has been gone through."""

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.every_n_steps import EveryNSteps, log_metrics

log = logging.getLogger(__name__)


class Epochs(EveryNSteps):
    """Logs data/<corpus>/epochs, and says when a corpus begins again: its text is then seen anew.

    Counted from the samples so far, as the datamodule counts them (`epochs`): for a run that goes
    on, too.

    Args:
        every_n_steps: as in `EveryNSteps`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begun = {name: int(epochs) for name, epochs in epochs_of(trainer).items()}

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        found = epochs_of(trainer)
        log_metrics(trainer, {f"data/{name}/epochs": epochs for name, epochs in found.items()})
        for name, epochs in found.items():
            if int(epochs) > self._begun.get(name, 0) and trainer.is_global_zero:
                log.info(
                    "corpus %s: epoch %d begins by step %d", name, int(epochs) + 1,
                    trainer.global_step,
                )  # fmt: skip
            self._begun[name] = int(epochs)


def epochs_of(trainer: Any) -> dict[str, float]:
    """Epochs of each corpus by the trainer's step; none where its data does not count them."""
    data = trainer.datamodule
    if not hasattr(data, "epochs"):
        return {}
    per_step = data.micro_batch_size * trainer.accumulate_grad_batches * trainer.world_size
    return data.epochs(trainer.global_step * per_step)
