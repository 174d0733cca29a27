"""Ends a run that gets no better."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from callbacks.metric import MONITOR, PLACEHOLDER, check_mode, metric_of, worst


class MetricEarlyStopping(EarlyStopping):
    """Ends training once the validation metric stops improving; `why` says it in our words.

    Args:
        monitor, mode: as of `BestCheckpoint`.
        min_delta: a smaller improvement counts as none.
        patience: validations in a row without an improvement.
        options: as of Lightning's `EarlyStopping`.

    Raises:
        ValueError: if another metric than the data's is monitored and no mode is given.
    """

    def __init__(
        self,
        monitor: str = MONITOR,
        mode: str | None = None,
        min_delta: float = 0.0,
        patience: int = 5,
        **options: Any,
    ) -> None:
        check_mode("early_stopping", monitor, mode)
        super().__init__(monitor, min_delta, patience, mode=mode or "min", **options)
        self._takes_mode = mode is None

    @property
    def state_key(self) -> str:
        """What its state is called in a checkpoint: as when runs used Lightning's own class."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__, 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        metric = metric_of(trainer)
        if stage == "fit" and self._takes_mode:
            self.mode = metric.mode
            self.min_delta = abs(self.min_delta) * (1 if self.mode == "max" else -1)
            self.best_score = torch.tensor(worst(self.mode))
        self.monitor = self.monitor.replace(PLACEHOLDER, metric.name)
        super().setup(trainer, pl_module, stage)

    def why(self) -> str:
        """What ended the run, and the option that lets it run longer."""
        if self.stopping_reason != EarlyStoppingReason.PATIENCE_EXHAUSTED:
            return str(self.stopping_reason_message)
        return (
            f"{self.monitor} got no better than {self.best_score:.4f} in the last "
            f"{self.wait_count} validations (callbacks.early_stopping.patience={self.patience})"
        )
