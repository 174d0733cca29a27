"""What a run that goes on from a checkpoint has to forget."""

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.csv_logger import RunCSVLogger


class RewindMetrics(Callback):
    """Drops the rows of metrics.csv after the checkpoint's step: those steps are trained again."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.drop_after(trainer.global_step)
