"""What the arms of an experiment learned: evidence.csv, and a table and a figure made of it alone.

A row of the CSV is one validation of one run. The figure shows every run as a thin line and the
mean of each arm's best learning rate as a bold one. The jump is the first step at which a run's
accuracy is at least `JUMP`.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from data.metrics import ACCURACY, LABELS
from runs.folder import csv_head, csv_text, replacing, write_text

COLUMNS = ("arm", "seed", "lr", "num_params", "metric", "better", "step", "val", "test")
JUMP = 0.5
COLOURS = {
    "dense": "#212529",
    "dense_gated": "#868e96",
    "nsa": "#c2255c",
    "random": "#e67700",
    "oracle": "#7048e8",
    "none": "#1c7ed6",
    "window": "#2b8a3e",
}  # other arms take Matplotlib's own
Row = dict[str, Any]
Runs = dict[tuple[str, str, str], list[Row]]  # by arm, learning rate and seed


def collect(folder: Path, jobs: Iterable[Any]) -> None:
    """Write evidence.csv from the metrics.csv and result.json of jobs that have one."""
    rows = [row for job in jobs for row in validations(job)]
    write_text(folder / "evidence.csv", csv_head(COLUMNS) + csv_text(COLUMNS, rows))


def validations(job: Any) -> list[Row]:
    """The validations of a job; the last one bears the test's result, too."""
    result_file, metrics = job.folder / "result.json", job.folder / "metrics.csv"
    if not (result_file.is_file() and metrics.is_file()):
        return []
    result = json.loads(result_file.read_text(encoding="utf-8"))
    if "error" in result:
        return []
    name = result["metric"]
    known = {"arm": job.arm, "seed": job.seed, "lr": f"{job.lr:g}", "metric": name}
    known |= {"num_params": result["num_params"], "better": result["better"]}
    with metrics.open(newline="", encoding="utf-8") as file:
        found = [
            known | {"step": int(row["step"]), "val": float(row[f"val/{name}"])}
            for row in csv.DictReader(file)
            if row.get(f"val/{name}")
        ]
    if found:
        found[-1]["test"] = result.get(f"test_{name}")
    return found


def read(folder: Path) -> Runs:
    """The validations of each run, in the order of steps.

    Raises:
        FileNotFoundError: if the folder has no evidence.csv.
        ValueError: if it has no rows.
    """
    runs: Runs = defaultdict(list)
    with (folder / "evidence.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            row = {**row, "step": int(row["step"]), "val": float(row["val"])}
            runs[row["arm"], row["lr"], row["seed"]].append(row)
    if not runs:
        raise ValueError(f"{folder}/evidence.csv has no rows: no run has finished")
    for rows in runs.values():
        rows.sort(key=lambda row: row["step"])
    return dict(runs)


def final(rows: list[Row]) -> float:
    """The test's result of a run, or its last validation where it was not tested."""
    return float(rows[-1]["test"] or rows[-1]["val"])


def best_rates(runs: Runs) -> dict[str, str]:
    """The learning rate of each arm whose mean over the seeds is best at the last validation."""
    means: dict[str, dict[str, float]] = defaultdict(dict)
    for arm, lr in dict.fromkeys((arm, lr) for arm, lr, _ in runs):
        of_rate = [rows for (a, r, _), rows in runs.items() if (a, r) == (arm, lr)]
        sign = 1 if of_rate[0][-1]["better"] == "higher" else -1
        means[arm][lr] = sign * fmean(rows[-1]["val"] for rows in of_rate)
    return {arm: max(rates, key=rates.__getitem__) for arm, rates in means.items()}


def jump(rows: list[Row]) -> int | None:
    """The first validated step at which the accuracy is at least JUMP."""
    return next((row["step"] for row in rows if row["val"] >= JUMP), None)


def table(runs: Runs, rates: Mapping[str, str]) -> str:
    """One line an arm, at its best learning rate, in Markdown."""
    any_row = next(iter(runs.values()))[0]
    name = any_row["metric"]
    jumps = name == ACCURACY.name
    titles = ["arm", "parameters", "lr", "seeds", f"test {name}, mean", "std", "each seed", "steps"]
    titles += [f"step of {name} ≥ {JUMP}"] * jumps
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for arm, lr in rates.items():
        of_arm = [rows for (a, r, _), rows in runs.items() if (a, r) == (arm, lr)]
        values = [final(rows) for rows in of_arm]
        spread = f"{stdev(values):.4f}" if len(values) > 1 else ""
        cells = [arm, f"{int(of_arm[0][0]['num_params']):,}", lr, str(len(values))]
        cells += [f"{fmean(values):.4f}", spread, " ".join(f"{value:.4f}" for value in values)]
        cells.append(" ".join(f"{rows[-1]['step']:,}" for rows in of_arm))
        if jumps:
            cells.append(" ".join(f"{s:,}" if (s := jump(rows)) else "never" for rows in of_arm))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(folder: Path) -> str:
    """Write evidence.md and evidence.png from evidence.csv alone; returns the table."""
    runs = read(folder)
    rates = best_rates(runs)
    text = table(runs, rates)
    write_text(folder / "evidence.md", text)
    with replacing(folder / "evidence.png") as draft:
        figure(runs, rates).savefig(draft, dpi=150)
    return f"{text}\n{folder}/evidence.csv, evidence.md, evidence.png"


def figure(runs: Runs, rates: Mapping[str, str]) -> Figure:
    """The validation metric against the step: a thin line a run, a bold one an arm."""
    drawing = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = drawing.subplots()
    for arm, lr in rates.items():
        of_arm = [rows for (a, r, _), rows in runs.items() if (a, r) == (arm, lr)]
        colour = COLOURS.get(arm)
        by_step = defaultdict(list)
        for rows in of_arm:
            axes.plot(*points(rows), color=colour, lw=0.8, alpha=0.5)
            for row in rows:
                by_step[row["step"]].append(row["val"])
        steps = sorted(step for step, values in by_step.items() if len(values) == len(of_arm))
        means = [fmean(by_step[step]) for step in steps]
        last = f"{means[-1]:.3f}" if means else f"{math.nan}"
        axes.plot(steps, means, color=colour, lw=2.2, label=f"{arm}, lr {lr}: {last}")
    metric = next(iter(runs.values()))[0]["metric"]
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"validation, {LABELS.get(metric, metric)}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return drawing


def points(rows: list[Row]) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row["val"] for row in rows]
