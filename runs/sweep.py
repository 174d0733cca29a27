"""What a job of a sweep does and a single run does not: it has a GPU of its own, it tells the
sweeper how good it was, and whatever it dies of, the next job runs.
"""

import gc
import io
import logging
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from runs import gpus, results
from runs.checkpoint_faults import first_line
from runs.folder import write_json
from runs.run import REFUSALS, build, root, train
from runs.sweep_check import (
    check_devices,
    directions_of,
    is_torchelastic_launched,
    wants_processes,
)

log = logging.getLogger(__name__)

ENDINGS = (FloatingPointError, torch.OutOfMemoryError)  # of a training: the message says it all


# A job


def run_job(cfg: DictConfig) -> float | list[float]:
    """Build and train on a GPU of this job's own; what the sweeper is told."""
    with beside_others(), one_gpu(cfg.trainer):
        result = attempt(cfg)
        torch.compiler.reset()  # programs of one process are limited, and hold their graphs' memory
    return score(result, cfg.objective)


def attempt(cfg: DictConfig) -> Mapping[str, Any]:
    """The result of a job. One that fails leaves its reason in the log and in result.json."""
    expected = REFUSALS
    try:
        check_devices(cfg.trainer)
        run = build(cfg)
        expected = ENDINGS
        return train(run, cfg)
    except Exception as error:
        known = isinstance(error, expected) and "HYDRA_FULL_ERROR" not in os.environ
        why = first_line(root(error) if known else f"{type(error).__name__}: {error}")
        hydra = HydraConfig.get()
        log.error("job %s failed: %s", hydra.job.num, why, exc_info=not known)
        result = {"error": why, "overrides": list(hydra.overrides.task)}
        write_json(Path(cfg.run_dir, "result.json"), result)
        if is_torchelastic_launched():
            sys.exit(1)  # the other ranks wait for this one: torchrun ends them
        return result
    finally:
        wandb.finish()  # or the next job would log into this one's run


@contextmanager
def beside_others() -> Iterator[None]:
    """With joblib, printed lines bear the job's number, and loader processes start as elsewhere:
    joblib's own way of starting a process, which it leaves behind, is not for them.
    """
    hydra = HydraConfig.get()
    if hydra.runtime.choices["hydra/launcher"] != "joblib":
        yield
        return
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    with redirect_stdout(NumberedLines(hydra.job.num, sys.stdout)):
        yield


class NumberedLines(io.TextIOBase):
    """A stream that passes whole lines on to another one, each behind a job's number.

    It does not count as a terminal, so that nobody draws a bar on it.
    """

    def __init__(self, number: int, stream: TextIO) -> None:
        self.number, self.stream, self.begun = number, stream, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        self.stream.write("".join(f"#{self.number} {line}\n" for line in lines))
        self.stream.flush()
        return len(text)


@contextmanager
def one_gpu(trainer: DictConfig) -> Iterator[None]:
    """A GPU that no other job has. On a CPU, or where torchrun deals them out, none is taken."""
    choice = gpus_of(trainer)
    if not choice:
        yield
        return
    with gpus.free_gpu(choice) as number:
        trainer.devices = [number]
        torch.cuda.reset_peak_memory_stats(number)
        yield
        gc.collect()
        torch.cuda.empty_cache()  # this process's next job may run on another GPU


def gpus_of(trainer: DictConfig) -> dict[int, str]:
    """The GPUs that a job may choose from: number -> id."""
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if not on_gpu or is_torchelastic_launched() or wants_processes(trainer):
        return {}
    found = gpus.visible()
    listed = trainer.devices if isinstance(trainer.devices, ListConfig) else found
    return {number: found[number] for number in listed if number in found}


# What the sweeper is told


def score(result: Mapping[str, Any], objective: Any) -> float | list[float]:
    """The objectives' values; all are as bad as can be where one is missing or not finite."""
    wanted = results.names(objective)
    found = [results.value(result, name) for name in wanted]
    values = [float(value) for value in found if value is not None and math.isfinite(value)]
    if len(values) < len(wanted):
        if "error" not in result:
            log.warning("%s is %s: the sweeper is told the worst", ", ".join(wanted), found)
        directions = directions_of(HydraConfig.get().sweeper, len(wanted))
        values = [-math.inf if direction == "maximize" else math.inf for direction in directions]
    return values[0] if len(values) == 1 else values
