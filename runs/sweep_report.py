"""What came out of a sweep: sweep.csv, and sweep.md and sweep.png made of it.

    python -m runs.sweep_report                          of the newest sweep that has a CSV
    python -m runs.sweep_report outputs/sweeps/<time>    of this one

Hydra calls `SweepReport` after every job, so that the CSV also stands when the sweep is killed.
"""

import csv
import io
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runs.folder import replacing, write_text
from runs.results import COLUMNS, TEXT
from runs.sweep_plot import Job, draw, finished, pareto_front, telling

SWEEPS = Path("outputs", "sweeps")


class SweepReport(Callback):
    """Writes sweep.csv after each job of a multirun, and what is made of it at the end.

    Does nothing in a single run. Raises SystemExit at the end of a sweep without a single result,
    for the sake of its exit code.
    """

    def on_job_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and is_rank_zero():
            write_csv(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not is_rank_zero():
            return
        folder = Path(config.hydra.sweep.dir)
        write_csv(folder)
        print(f"{write_table_and_plot(folder)}\n{folder}", flush=True)
        if not finished(read_csv(folder)):
            sys.exit(f"no job of {folder} has a result")


def is_rank_zero() -> bool:
    """False in the processes that torchrun starts beside rank zero: each runs the sweep."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def write_csv(folder: Path) -> None:
    """Collect the jobs of a multirun in its sweep.csv.

    Jobs that end at the same time in different processes wait for one another.

    Raises:
        FileNotFoundError: if the folder holds no job.
    """
    with FileLock(folder / ".sweep.lock"):
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
    return sorted(jobs, key=lambda job: (len(job["job"]), job["job"]))


def read_job(record: Path, folder: Path) -> Job:
    """One job's overrides and result, or why there is none."""
    result: Job = {"error": "no result: it is running, or was killed"}
    if (file := record / "result.json").exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    job = {column: result.get(column) for column in COLUMNS}
    overrides = OmegaConf.to_container(OmegaConf.load(record / ".hydra" / "overrides.yaml"))
    job |= {"job": str(record.relative_to(folder)), "overrides": overrides}
    bpb = math.nan if job["val_bpb"] is None else job["val_bpb"]
    if job["error"] is None and not math.isfinite(bpb):
        job |= {"val_bpb": None, "error": "no finite val_bpb"}
    return job


def as_csv(jobs: list[Job]) -> str:
    """One row a job; the overrides quoted as on a command line."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for job in jobs:
        flat = {**job, "overrides": shlex.join(job["overrides"])}
        writer.writerow([flat[column] for column in COLUMNS])
    return buffer.getvalue()


def read_csv(folder: Path) -> list[Job]:
    """The rows of a folder's sweep.csv; None where there is no number.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is missing, or a number is none.
    """
    path = folder / "sweep.csv"
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
        rows = list(reader)
    numbers = [column for column in COLUMNS if column not in TEXT]
    jobs: list[Job] = [{c: float(row[c]) if row[c] else None for c in numbers} for row in rows]
    for job, row in zip(jobs, rows, strict=True):
        overrides = shlex.split(row["overrides"])
        job.update(job=row["job"], overrides=overrides, error=row["error"] or None)
    return jobs


def markdown(jobs: list[Job]) -> str:
    """The jobs as a table, those on the Pareto front in bold."""
    front = [job["job"] for job in pareto_front(jobs, "visible_tokens")]
    columns = COLUMNS if any(job["error"] for job in jobs) else COLUMNS[:-1]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for job, overrides in zip(jobs, telling(jobs), strict=True):
        row = {**job, "overrides": ", ".join(overrides)}
        cells = {column: cell(column, row[column]) for column in columns}
        if job["error"]:
            cells["val_bpb"] = "failed"
        if job["job"] in front:
            cells["val_bpb"] = f"**{cells['val_bpb']}**"
        lines.append("| " + " | ".join(cells.values()) + " |")
    note = "Bold: no other job has a lower val_bpb with as few visible tokens."
    return "\n".join([*lines, "", note, ""])


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.4f}" if column.endswith("bpb") else f"{value:,.0f}"


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
