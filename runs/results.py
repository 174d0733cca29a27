"""What a run tells of itself in result.json: the columns of a sweep's table, and its objectives."""

from typing import Any

COLUMNS = (
    "job",
    "overrides",
    "val_bpb",
    "test_bpb",
    "visible_tokens",
    "num_params",
    "tokens_per_second",
    "steps",
    "seconds",
    "error",
)
TEXT = ("job", "overrides", "error")  # the other columns are numbers
OBJECTIVES = tuple(column for column in COLUMNS if column not in TEXT)


def check_objective(objective: Any) -> None:
    """Refuse a name that result.json will not hold."""
    wanted = names(objective)
    if not wanted or not set(wanted) <= set(OBJECTIVES):
        raise ValueError(f"objective={objective} must be one or a list of {', '.join(OBJECTIVES)}")


def names(objective: Any) -> list[str]:
    """One name or many."""
    if objective is None:
        return []
    return [objective] if isinstance(objective, str) else list(objective)
