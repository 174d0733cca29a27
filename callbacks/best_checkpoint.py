"""The best checkpoints of a run, by the metric of its data."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.metric import MONITOR, PLACEHOLDER, check_mode, metric_of, worst
from callbacks.step_checkpoint import RunCheckpoint


class BestCheckpoint(RunCheckpoint):
    """Keeps the checkpoints with the best validation metric.

    Args:
        dirpath: the folder of the checkpoints.
        filename: `{metric}` in it is the name of the data's metric.
        monitor: what is compared; `{metric}` as above.
        mode: min or max; None: what the data's metric says.
        options: as of Lightning's `ModelCheckpoint`.

    Raises:
        ValueError: if another metric than the data's is monitored and no mode is given.
    """

    def __init__(
        self,
        dirpath: str | Path,
        filename: str,
        monitor: str = MONITOR,
        mode: str | None = None,
        **options: Any,
    ) -> None:
        check_mode("checkpoint_best", monitor, mode)
        super().__init__(dirpath, filename, monitor, mode=mode or "min", **options)
        self._takes_mode = mode is None

    @property
    def state_key(self) -> str:
        """What its state is called in a checkpoint: as before this class was split off."""
        return super().state_key.replace(type(self).__qualname__, RunCheckpoint.__qualname__, 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        metric = metric_of(trainer)
        if stage == "fit" and self._takes_mode:
            self.mode = metric.mode
            self.kth_value = torch.tensor(worst(self.mode))
        self.monitor = str(self.monitor).replace(PLACEHOLDER, metric.name)
        self.filename = str(self.filename).replace(PLACEHOLDER, metric.name)
        super().setup(trainer, pl_module, stage)
