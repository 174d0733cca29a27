"""Refuses a sweep in which every job would fail, before there is one.

Hydra imports this file before it knows whether there is anything to train, so it needs no torch.
"""

import os
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig

from runs import results

ONE_PROCESS = (
    "a job of a sweep is one process on one device: add trainer.devices=1 (hydra/launcher=joblib "
    "hydra.launcher.n_jobs=4 runs four jobs at once, each on a GPU of its own), or start the sweep "
    "with torchrun and hydra.sweep.dir=FOLDER, which runs every job on all devices"
)


class SweepCheck(Callback):
    """Refuses a sweep in which every job would fail, before there is one."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check(config)
        except ValueError as error:
            sys.exit(str(error))  # Hydra makes a warning of any other exception


def check(config: DictConfig) -> None:
    """Refuse what no job of this sweep could run with; `config` holds `hydra` too.

    Raises:
        ValueError: naming the value, what it must be, and the way out.
    """
    metric = results.metric_of(config.data)
    results.check_objective(config.objective, metric.name)
    check_devices(config.trainer)
    if "direction" in config.hydra.sweeper:
        check_search(config.hydra.sweeper, results.names(config.objective), metric)


def check_devices(trainer: DictConfig) -> None:
    """Refuse a job of more than one process."""
    if wants_processes(trainer) and not is_torchelastic_launched():
        raise ValueError(f"trainer.devices={trainer.devices}: {ONE_PROCESS}")


def check_search(sweeper: DictConfig, objectives: list[str], metric: Any) -> None:
    """Refuse a search by Optuna that would die of its first job, or of its first failed one."""
    if is_torchelastic_launched():
        raise ValueError("under torchrun every rank would search by itself: sweep over a grid")
    directions = directions_of(sweeper, len(objectives))
    if len(directions) != len(objectives):
        raise ValueError(
            f"hydra.sweeper.direction={directions} must have one direction for each name of "
            f"objective={objectives}"
        )
    check_directions(directions, objectives, metric)
    if len(objectives) > 1 and "TPE" in sweeper.sampler._target_:
        raise ValueError(
            "the TPE sampler cannot go on after a failed job where there are several objectives: "
            "use hydra/sweeper/sampler=nsgaii, or one objective"
        )
    if sweeper.n_jobs < 1:
        raise ValueError(
            f"hydra.sweeper.n_jobs={sweeper.n_jobs} must be at least 1; it is how many jobs run "
            "at once, hydra.launcher.n_jobs with the joblib launcher"
        )


def check_directions(directions: list[str], objectives: list[str], metric: Any) -> None:
    """Refuse a search for the worst value of the data's metric."""
    wrong = "maximize" if metric.better == "lower" else "minimize"
    for name, direction in zip(objectives, directions, strict=True):
        if direction == wrong and name.endswith((f"_{metric.name}", f"_{results.METRIC}")):
            raise ValueError(
                f"hydra.sweeper.direction={direction} for objective={name}: a {metric.better} "
                f"{metric.name} is better; set the other direction"
            )


def wants_processes(trainer: DictConfig) -> bool:
    """Whether the trainer asks for more than one process; `auto` is one device in a sweep."""
    devices = trainer.devices
    one = len(devices) == 1 if isinstance(devices, ListConfig) else devices in ("auto", 1, "1")
    return trainer.num_nodes != 1 or not one


def is_torchelastic_launched() -> bool:
    """Whether torchrun started this process, asked as `torch.distributed` asks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def directions_of(sweeper: Any, count: int) -> list[str]:
    """minimize or maximize, for each objective; a sweeper that knows neither minimises."""
    if "direction" not in sweeper:
        return ["minimize"] * count
    found = sweeper.direction if isinstance(sweeper.direction, ListConfig) else [sweeper.direction]
    return [str(direction).rpartition(".")[2] for direction in found]
