"""Trains every arm of an experiment, several at once on one device, and draws what came out.

    python -m benchmarks.evidence recall_scattered --arms dense nsa random none window --seeds 0 1 2
    python -m benchmarks.evidence recall_scattered --draw          figures once more, from the CSV

Each run is a `train.py` in a folder of its own, so the same command goes on where it was
interrupted and leaves alone what is finished. The arms are those of conf/arm. All get the data of
their seed in the same order, and feed-forwards of such a width that they have the parameters of
the arm nsa. Words after `--` are overrides for every run.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from benchmarks import evidence_figures
from nsa.transformer import Transformer

ROOT = Path(__file__).parents[1]
ARMS = sorted(path.stem for path in (ROOT / "conf" / "arm").glob("*.yaml"))
QUIET = ("trainer.devices=1", "logger=csv", "callbacks.samples=null")
WIDTH_STEP = 64  # of a feed-forward's hidden width
CLOSE_ENOUGH = 0.001  # of the parameters: then the feed-forward keeps its width


class Job(NamedTuple):
    """One run of `train.py`."""

    arm: str
    seed: int
    lr: float
    expand: float  # hidden width of the feed-forward over the model's
    folder: Path


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence")
    parser.add_argument("experiment", help="a page of conf/experiment, such as recall_scattered")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM",
                        default=["dense", "nsa", "random", "none", "window"])  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, metavar="LR",
                        help="learning rates; default: the experiment's")  # fmt: skip
    parser.add_argument("--together", type=int, default=4, help="runs at once on the device")
    parser.add_argument("--seconds", type=int, help="of training a run at most; default: all steps")
    parser.add_argument("--folder", type=Path, help="default: outputs/evidence/EXPERIMENT")
    parser.add_argument("--draw", action="store_true", help="train nothing, draw evidence.csv")
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)  # overrides for every train.py
    asked = parser.parse_args(words[:split])
    asked.overrides = words[split + 1 :]
    if asked.together < 1 or (asked.seconds is not None and asked.seconds < 1):
        parser.error("--together and --seconds must be at least 1")
    asked.folder = asked.folder or Path("outputs", "evidence", asked.experiment)
    return asked


def configured(words: Sequence[str]) -> DictConfig:
    """What train.py makes of these words."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*words, "run_dir=."])


def count_params(words: Sequence[str], expand: float | None = None) -> tuple[int, float, int]:
    """Parameters of a run's model, its feed-forward's expansion, and its width."""
    model = OmegaConf.to_container(configured(words).model, resolve=True)
    assert isinstance(model, dict)
    if expand is not None:
        model["feed_forward_expand"] = expand
    with torch.device("meta"):
        built = Transformer(**{str(k): v for k, v in model.items() if k not in ("name", "weights")})
    return built.num_params, float(model["feed_forward_expand"]), int(model["dim"])


def matched_expand(words: Sequence[str], wanted: int) -> float:
    """The expansion with which the words' model comes closest to `wanted` parameters."""
    num_params, expand, dim = count_params(words)
    if abs(num_params - wanted) <= CLOSE_ENOUGH * wanted:
        return expand
    width = -(-int(dim * expand) // WIDTH_STEP) * WIDTH_STEP
    wider, _, _ = count_params(words, (width + WIDTH_STEP) / dim)
    narrow, _, _ = count_params(words, width / dim)
    steps = round((wanted - narrow) / (wider - narrow))
    return max(WIDTH_STEP, width + steps * WIDTH_STEP) / dim


def plan(asked: argparse.Namespace) -> list[Job]:
    """The runs, seed by seed, so that an early stop leaves whole comparisons. Prints parameters."""
    common = [f"experiment={asked.experiment}", *asked.overrides]
    wanted, _, _ = count_params([*common, "arm=nsa"])
    expands = {}
    for arm in asked.arms:
        words = [*common, f"arm={arm}"]
        expands[arm] = matched_expand(words, wanted)
        num_params, _, _ = count_params(words, expands[arm])
        print(f"{arm:12} {num_params:12,} parameters, {num_params / wanted - 1:+.1%} of nsa's")
    rates = asked.lrs or [float(configured(common).optimizer.lr)]
    return [
        Job(arm, seed, lr, expands[arm], asked.folder / f"{arm}-seed_{seed}-lr_{lr:g}")
        for seed, lr, arm in product(asked.seeds, rates, asked.arms)
    ]


def command(job: Job, asked: argparse.Namespace) -> list[str]:
    limit = []
    if asked.seconds is not None:
        minutes, seconds = divmod(asked.seconds, 60)
        hours, minutes = divmod(minutes, 60)
        limit = [f'trainer.max_time="00:{hours:02}:{minutes:02}:{seconds:02}"']
    return [
        sys.executable, str(ROOT / "train.py"), f"experiment={asked.experiment}",
        *QUIET, *asked.overrides, *limit, f"arm={job.arm}", f"seed={job.seed}",
        f"optimizer.lr={job.lr:g}", f"model.feed_forward_expand={job.expand:.6f}",
        f"run_dir={job.folder.resolve()}",
    ]  # fmt: skip


def finished(job: Job) -> bool:
    """Whether the run has a result, and not an error instead."""
    path = job.folder / "result.json"
    return path.is_file() and "error" not in json.loads(path.read_text())


def run(job: Job, asked: argparse.Namespace) -> bool:
    """Train a job, or go on with it; whether it finished. Its output goes to its log.txt."""
    if not finished(job):
        job.folder.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // asked.together))
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
            subprocess.run(
                command(job, asked), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
    done = finished(job)
    said = (job.folder / "result.json").read_text() if done else f"failed: {job.folder}/log.txt"
    print(f"{job.folder.name}: {' '.join(said.split())[:150]}", flush=True)
    return done


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(argv)
    failed = []
    if not asked.draw:
        jobs = plan(asked)
        with ThreadPoolExecutor(asked.together) as pool:
            done = list(pool.map(lambda job: run(job, asked), jobs))
        failed = [job.folder.name for job, ok in zip(jobs, done, strict=True) if not ok]
        evidence_figures.collect(asked.folder, jobs)
    print(evidence_figures.draw(asked.folder))
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}; the same command goes on with them")


if __name__ == "__main__":
    main()
