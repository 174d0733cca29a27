"""Ends a run that gets no better."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from callbacks.metric import MONITOR, PLACEHOLDER, check_mode, metric_of, worst


class MetricEarlyStopping(EarlyStopping):
    """Ends training once the validation metric stops improving, and says so.

    Args:
        monitor, mode: as of `BestCheckpoint`.
        min_delta: a change for the better by less counts as none.
        patience: validations in a row without a change for the better.
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        metric = metric_of(trainer)
        if stage == "fit" and self._takes_mode:
            self.mode = metric.mode
            self.min_delta = abs(self.min_delta) * (1 if self.mode == "max" else -1)
            self.best_score = torch.tensor(worst(self.mode))
        self.monitor = self.monitor.replace(PLACEHOLDER, metric.name)
        super().setup(trainer, pl_module, stage)
