"""How callbacks get the metric of a run, which its data name."""

from typing import Any

PLACEHOLDER = "{metric}"  # stands for the metric's name in options of callbacks
MONITOR = f"val/{PLACEHOLDER}"


def metric_of(trainer: Any) -> Any:
    """The metric of the trainer's data, a `data.metrics.Metric`."""
    return trainer.datamodule.metric


def worst(mode: str) -> float:
    """The value that any other one is better than."""
    return float("inf") if mode == "min" else -float("inf")


def check_mode(callback: str, monitor: str, mode: str | None) -> None:
    """Refuse another metric than the data's unless it is said which values are better."""
    if mode is None and PLACEHOLDER not in monitor:
        raise ValueError(
            f"callbacks.{callback}.monitor={monitor} is not the metric of the data: say with "
            f"callbacks.{callback}.mode=min or =max which of its values is better"
        )
