"""Options that count something are whole numbers: 1e3 is 1000; 2.5, -3 or a word is refused."""

import re
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from runs.same_run import flatten

COUNT = re.compile(  # the last part of an option's path
    r"(.*_)?(steps?|tokens|blocks|stride|heads|seed|seq_len|depth|dim|dim_head|workers|nodes)"
    r"|(.*_)?(block|window|batch|vocab|population)_size|num_.*|every_n_.*|max_(reports|epochs)"
    r"|sequences_per_step|skip_budget|patience|window|save_top_k|login_timeout|devices"
)
SHARE = re.compile(r"limit_.*_batches|overfit_batches")  # up to 1 a share, above it a count
NEEDED = re.compile(  # of them, what has no meaning as null
    r"(max|warmup|val_every_n|log_every_n)_steps|(vocab|micro_batch)_size|sequences_per_step"
    r"|seed|seq_len|depth|dim|dim_head|heads|new_tokens|prompt_tokens|num_workers"
)
FROM_MINUS_ONE = re.compile(r"max_(steps|epochs)|save_top_k|devices")  # -1: all of them
LARGEST_SEED = 2**32 - 1  # that NumPy takes


def make_whole(cfg: DictConfig) -> None:
    """Turn every count of a config into an `int`.

    Raises:
        ValueError: naming the first that is not a whole number, or too small.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("sparsity_schedule", None)  # a list, which says itself what it is made of
    for path, value in flatten(settings, ""):
        number = whole(path, value)
        if number is not value:
            OmegaConf.update(cfg, path, number)


def whole(path: str, value: Any) -> Any:
    """The value of an option, an `int` where it is a count."""
    name = path.rpartition(".")[2]
    is_share = SHARE.fullmatch(name) is not None
    if not is_share and not COUNT.fullmatch(name):
        return value
    if value is None and not NEEDED.fullmatch(name):
        return value
    if name == "micro_batch_size" and value == "auto":
        return value
    if name == "devices" and not isinstance(value, float):
        return value  # auto, a list, "0,1": the trainer's to read
    if isinstance(value, float) and value.is_integer() and not (is_share and value <= 1):
        value = int(value)
    if not allowed(value, is_share):
        also = " or a share between 0.0 and 1.0" if is_share else ""
        also = ", or auto: as many sequences as fit" if name == "micro_batch_size" else also
        raise ValueError(f"{path}={value} must be a whole number{also}")
    check_limits(path, name, cast(float, value))
    return value


def check_limits(path: str, name: str, count: int | float) -> None:
    """Refuse a count below zero, or a seed that no generator takes."""
    least = -1 if FROM_MINUS_ONE.fullmatch(name) else 0
    if count < least:
        raise ValueError(f"{path}={count} must be at least {least}")
    if name == "seed" and count > LARGEST_SEED:
        raise ValueError(f"{path}={count} must be at most {LARGEST_SEED}")


def allowed(value: Any, is_share: bool) -> bool:
    if isinstance(value, float):
        return is_share and 0 <= value <= 1
    return isinstance(value, int) and not isinstance(value, bool)
