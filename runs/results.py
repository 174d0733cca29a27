"""What a run reports in result.json: the columns of a sweep's table, and its objectives."""

from collections.abc import Iterable, Mapping
from typing import Any

from hydra.utils import get_object

SPLITS = ("val", "test")
UNNAMED = {"metric": "bpb", "better": "lower"}  # of files from before runs named their metric
METRIC = "metric"  # val_metric and test_metric stand for those of the data, as val_bpb
FIRST = ("job", "overrides")
FIGURES = ("visible_tokens", "num_params", "tokens_per_second", "steps", "seconds")
LAST = ("metric", "better", "error")
TEXT = (*FIRST, *LAST)  # the other columns are numbers


def columns(metrics: Iterable[str]) -> tuple[str, ...]:
    """Of a sweep's table, for jobs that are judged by these metrics."""
    measured = [f"{split}_{metric}" for metric in metrics for split in SPLITS]
    return (*FIRST, *measured, *FIGURES, *LAST)


def metric_of(data: Mapping[str, Any]) -> Any:
    """The metric of a config of data, a `data.metrics.Metric`; nothing is built for it."""
    return get_object(data["_target_"]).metric


def check_objective(objective: Any, metric: str) -> None:
    """Refuse a name that result.json will not hold."""
    wanted = names(objective)
    possible = [f"{split}_{name}" for name in (metric, METRIC) for split in SPLITS] + [*FIGURES]
    if not wanted or not set(wanted) <= set(possible):
        raise ValueError(f"objective={objective} must be one or a list of {', '.join(possible)}")


def names(objective: Any) -> list[str]:
    """One name or many."""
    if objective is None:
        return []
    return [objective] if isinstance(objective, str) else list(objective)


def value(result: Mapping[str, Any], name: str) -> Any:
    """What a result, or a row of a sweep's table, holds of a name; None where there is nothing."""
    metric = result.get("metric")
    return result.get(name.replace(f"_{METRIC}", f"_{metric}") if metric else name)
