"""One count of steps everywhere: those that are done, as the console and checkpoints say."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer


def count_steps_done(trainer: Trainer) -> None:
    """Have all loggers number what they are given by the optimizer steps that are done.

    Lightning itself gives the metrics of the first step the number 0, but those of a test after
    n steps the number n.
    """
    connector: Any = trainer._logger_connector
    log = connector.log_metrics

    def log_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
        log(metrics, step=trainer.global_step if step is None else step)

    connector.log_metrics = log_metrics
