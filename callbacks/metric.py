"""The metric that the data of a run name, as callbacks take it from there."""

from typing import Any

PLACEHOLDER = "{metric}"  # stands for the metric's name in options of callbacks
MONITOR = f"val/{PLACEHOLDER}"


def metric_of(trainer: Any) -> Any:
    """The metric of the trainer's data, a `data.metrics.Metric`."""
    return trainer.datamodule.metric


def worst(mode: str) -> float:
    """What any value is better than."""
    return float("inf") if mode == "min" else -float("inf")


def check_mode(callback: str, monitor: str, mode: str | None) -> None:
    """Raises ValueError where nothing says whether less or more of `monitor` is better."""
    if mode is None and PLACEHOLDER not in monitor:
        raise ValueError(
            f"callbacks.{callback}.monitor={monitor} is not the metric of the data: say with "
            f"callbacks.{callback}.mode=min or =max which of its values is better"
        )
