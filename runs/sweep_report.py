"""What came out of a sweep: sweep.csv, and sweep.md and sweep.png made of it.

    python -m runs.sweep_report                          of the newest sweep that has a CSV
    python -m runs.sweep_report outputs/sweeps/<time>    of this one

Hydra calls `SweepReport` after every job, so that the CSV also stands when the sweep is killed.
"""

import csv
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runs import ranks, results
from runs.file_lock import held
from runs.folder import csv_head, csv_text, replacing, write_text
from runs.sweep_plot import Job, by_metric, draw, finished, pareto_front, telling

SWEEPS = Path("outputs", "sweeps")


class SweepReport(Callback):
    """Writes sweep.csv after each job of a multirun, and what is made of it at the end.

    Does nothing in a single run. Raises SystemExit at the end of a sweep without a single result,
    for the sake of its exit code.
    """

    def on_job_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and ranks.is_zero():
            write_csv(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not ranks.is_zero():
            return
        folder = Path(config.hydra.sweep.dir)
        write_csv(folder)
        print(f"{write_table_and_plot(folder)}\n{folder}", flush=True)
        if not finished(read_csv(folder)):
            sys.exit(f"no job of {folder} has a result")


def write_csv(folder: Path) -> None:
    """Collect the jobs of a multirun in its sweep.csv.

    Jobs that end at the same time in different processes wait for one another.

    Raises:
        FileNotFoundError: if the folder holds no job.
    """
    with held(folder / ".sweep.lock"):
        jobs = collect(folder)
        if not jobs:
            raise FileNotFoundError(f"{folder} holds no job of a multirun: no <job>/.hydra in it")
        write_text(folder / "sweep.csv", as_csv(jobs))


def write_table_and_plot(folder: Path) -> str:
    """Write sweep.md and sweep.png from sweep.csv alone; returns the table in Markdown."""
    jobs = read_csv(folder)
    table = markdown(jobs)
    write_text(folder / "sweep.md", table)
    if finished(jobs):
        with replacing(folder / "sweep.png") as draft:
            draw(jobs).savefig(draft, dpi=150)
    return table


def collect(folder: Path) -> list[Job]:
    """A row for every job that has begun, by name or number; best first is the reader's to sort."""
    begun = folder.rglob(".hydra/overrides.yaml")
    jobs = [read_job(path.parent.parent, folder) for path in begun]
    jobs.sort(key=lambda job: (len(job["job"]), job["job"]))
    return [dict.fromkeys(columns(jobs)) | job for job in jobs]


def read_job(record: Path, folder: Path) -> Job:
    """One job's overrides and result, or why there is none."""
    result: Job = {"error": "no result: it is running, or was killed"}
    if (file := record / "result.json").exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        result = (results.UNNAMED if "val_bpb" in result else {}) | result
    metrics = [result["metric"]] if "metric" in result else []
    job: Job = {column: result.get(column) for column in results.columns(metrics)}
    overrides = OmegaConf.to_container(OmegaConf.load(record / ".hydra" / "overrides.yaml"))
    job |= {"job": str(record.relative_to(folder)), "overrides": overrides}
    value = results.value(job, "val_metric")
    if job["error"] is None and (value is None or not math.isfinite(value)):
        name = f"val_{job['metric']}"
        job |= {name: None, "error": f"no finite {name}"}
    return job


def columns(jobs: list[Job]) -> tuple[str, ...]:
    """Of the table: those of every metric that the jobs have, of text where none has one."""
    metrics = dict.fromkeys(job["metric"] for job in jobs if job["metric"])
    return results.columns(metrics or [results.UNNAMED["metric"]])


def as_csv(jobs: list[Job]) -> str:
    """One row a job; the overrides quoted as on a command line."""
    names = columns(jobs)
    rows = [job | {"overrides": shlex.join(job["overrides"])} for job in jobs]
    return csv_head(names) + csv_text(names, [{n: row.get(n) for n in names} for row in rows])


def read_csv(folder: Path) -> list[Job]:
    """The rows of a folder's sweep.csv; None where there is no number.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is missing, or what should be a number is not one.
    """
    path = folder / "sweep.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a sweep: it holds no sweep.csv")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = set(reader.fieldnames or ())
        rows = list(reader)
    metrics = [name.removeprefix("val_") for name in found if name.startswith("val_")]
    needed = set(results.columns(metrics or [results.UNNAMED["metric"]])) - {*results.UNNAMED}
    if missing := needed - found:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    return [read_row(row) for row in rows]


def read_row(row: dict[str, str]) -> Job:
    """One line of a sweep.csv; what is empty, and no text, is None."""
    numbers = [name for name in row if name not in results.TEXT]
    job: Job = {name: float(row[name]) if row[name] else None for name in numbers}
    job.update(job=row["job"], overrides=shlex.split(row["overrides"]), error=row["error"] or None)
    named = {name: row.get(name) or None for name in results.UNNAMED}
    if "better" not in row and not job["error"]:
        named = {**results.UNNAMED}
    return job | named


def markdown(jobs: list[Job]) -> str:
    """The jobs as a table, those on the Pareto front in bold."""
    front = [
        job["job"] for group in by_metric(jobs) for job in pareto_front(group, "visible_tokens")
    ]
    hidden = {*results.UNNAMED} if any(job["error"] for job in jobs) else {*results.LAST}
    shown = [column for column in columns(jobs) if column not in hidden]
    lines = ["| " + " | ".join(shown) + " |", "|" + " --- |" * len(shown)]
    for job, overrides in zip(jobs, telling(jobs), strict=True):
        row = {**job, "overrides": ", ".join(overrides)}
        cells = {column: cell(column, row.get(column)) for column in shown}
        value = f"val_{job['metric']}" if job["metric"] else shown[len(results.FIRST)]
        if job["error"]:
            cells[value] = "failed"
        if job["job"] in front:
            cells[value] = f"**{cells[value]}**"
        lines.append("| " + " | ".join(cells.values()) + " |")
    metrics = {f"{job['better']} val_{job['metric']}": None for job in jobs if job["metric"]}
    note = f"Bold: no other job has a {' or a '.join(metrics)} with as few visible tokens."
    return "\n".join([*lines, "", note, ""])


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:,.0f}" if column in results.FIGURES else f"{value:.4f}"


def newest_sweep(sweeps: Path = SWEEPS) -> Path:
    """The folder whose sweep.csv was written last.

    Raises:
        FileNotFoundError: if no folder has one.
    """
    tables = list(sweeps.glob("*/sweep.csv"))
    if not tables:
        raise FileNotFoundError(f"no folder in {sweeps} holds a sweep.csv")
    return max(tables, key=lambda table: table.stat().st_mtime_ns).parent


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python -m runs.sweep_report [FOLDER]")
    try:
        folder = Path(sys.argv[1]) if len(sys.argv) == 2 else newest_sweep()
        print(f"{write_table_and_plot(folder)}\n{folder}")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
