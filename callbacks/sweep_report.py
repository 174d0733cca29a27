"""What came out of a sweep: sweep.csv, sweep.md and sweep.png in its folder.

    python -m callbacks.sweep_report outputs/sweeps/<time>    write them (again)

Hydra calls `SweepReport` after every job, so that the files also stand when a later job fails.
"""

import csv
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from omegaconf import DictConfig, OmegaConf

from callbacks.run_folder import replacing, write_text

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
)
FAILED = "failed"
FRONT, BEHIND = "#c2452d", "#8aa9c9"
Job = dict[str, Any]  # one row: the COLUMNS; val_bpb is FAILED where there is no result


class SweepReport(Callback):
    """Writes the report of a multirun after each of its jobs. Does nothing in a single run."""

    def on_job_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and is_rank_zero():
            write_report(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if is_rank_zero():
            print(f"{write_report(Path(config.hydra.sweep.dir))}\n{config.hydra.sweep.dir}")


def is_rank_zero() -> bool:
    """False in the processes that distributed training starts beside rank zero: each of them runs
    the sweep again, in a folder of its own.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"


def write_report(folder: Path) -> str:
    """Write the three files into a multirun's folder; returns the table in Markdown.

    Raises:
        FileNotFoundError: if the folder holds no job.
    """
    jobs = read_jobs(folder)
    if not jobs:
        raise FileNotFoundError(f"{folder} holds no job of a multirun: no <job>/.hydra in it")
    table = markdown(jobs)
    write_text(folder / "sweep.csv", as_csv(jobs))
    write_text(folder / "sweep.md", table)
    finished = [job for job in jobs if job["val_bpb"] != FAILED]
    if finished:
        with replacing(folder / "sweep.png") as draft:
            draw(finished).savefig(draft, dpi=150)
    return table


def read_jobs(folder: Path) -> list[Job]:
    """A row for every job that has begun, by name or number; best first is the reader's to sort."""
    records = [path.parent for path in folder.rglob(".hydra") if path.is_dir()]
    jobs = [read_job(record, folder) for record in records]
    return sorted(jobs, key=lambda job: (len(job["job"]), job["job"]))


def read_job(record: Path, folder: Path) -> Job:
    """One job's overrides and result; a result that is missing or not finite counts as failed."""
    result: Job = {}
    if (file := record / "result.json").exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    overrides = OmegaConf.to_container(OmegaConf.load(record / ".hydra" / "overrides.yaml"))
    job = {column: result.get(column) for column in COLUMNS}
    job |= {"job": str(record.relative_to(folder)), "overrides": overrides}
    if job["val_bpb"] is None or not math.isfinite(job["val_bpb"]):
        job["val_bpb"] = FAILED
    return job


def telling(jobs: list[Job]) -> list[list[str]]:
    """What tells the jobs apart: their overrides without those that all share."""
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    return [[o for o in job["overrides"] if o not in shared] for job in jobs]


def short(override: str) -> str:
    """`attention.num_selected_blocks=4` -> `num_selected_blocks=4`."""
    name, equals, value = override.partition("=")
    return name.rpartition(".")[2] + equals + value


def as_csv(jobs: list[Job]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for job in jobs:
        flat = {**job, "overrides": " ".join(job["overrides"])}
        writer.writerow([flat[column] for column in COLUMNS])
    return buffer.getvalue()


def markdown(jobs: list[Job]) -> str:
    """The jobs as a table, those on the Pareto front in bold."""
    front = pareto_front(jobs)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for job, overrides in zip(jobs, telling(jobs), strict=True):
        row = {**job, "overrides": ", ".join(overrides)}
        cells = [cell(column, row[column]) for column in COLUMNS]
        if job["job"] in front:
            cells[2] = f"**{cells[2]}**"
        lines.append("| " + " | ".join(cells) + " |")
    note = "Bold: no other job has a lower val_bpb with as few visible tokens."
    return "\n".join([*lines, "", note, ""])


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.4f}" if column.endswith("bpb") else f"{value:,.0f}"


def pareto_front(jobs: list[Job]) -> list[str]:
    """Names of the jobs that no other beats, by visible tokens: fewer of them and a lower bpb."""
    finished = [job for job in jobs if job["val_bpb"] != FAILED]
    front, best = [], math.inf
    for job in sorted(finished, key=lambda job: (job["visible_tokens"], job["val_bpb"])):
        if job["val_bpb"] < best:
            front.append(job["job"])
            best = job["val_bpb"]
    return front


def draw(jobs: list[Job]) -> Figure:
    """Validation bpb against visible tokens: a point a job, the Pareto front joined by steps."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    front = pareto_front(jobs)
    points = [
        (job["visible_tokens"], job["val_bpb"])
        for name in front
        for job in jobs
        if job["job"] == name
    ]
    axes.step(
        *zip(*points, strict=True), where="post", color=FRONT, alpha=0.5, label="Pareto front"
    )
    middle = sum(math.log(job["visible_tokens"]) for job in jobs) / len(jobs)
    for job, overrides in zip(jobs, telling(jobs), strict=True):
        x, y = job["visible_tokens"], job["val_bpb"]
        leads = job["job"] in front
        axes.plot(x, y, "o", color=FRONT if leads else BEHIND, markersize=7)
        left = math.log(x) <= middle  # labels grow towards the middle
        text = axes.annotate(
            "\n".join(map(short, overrides)),
            (x, y),
            xytext=(6 if left else -6, 6 if leads else -6),
            textcoords="offset points",
            ha="left" if left else "right",
            va="bottom" if leads else "top",
            fontsize=8,
        )
        text.set_in_layout(False)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(apart(sorted(job["visible_tokens"] for job in jobs)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("visible tokens: keys that the last query of a sequence reads")
    axes.set_ylabel("validation, bits per byte")
    axes.grid(alpha=0.25)
    axes.margins(x=0.12, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def apart(ascending: list[float], factor: float = 1.1) -> list[float]:
    """The values that can be told apart as ticks of a logarithmic axis."""
    kept: list[float] = []
    for value in ascending:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m callbacks.sweep_report FOLDER")
    print(write_report(Path(sys.argv[1])))
