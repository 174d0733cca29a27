"""Read results.csv: a table of speed-ups, and the pictures in docs/.

    python -m benchmarks.plots            # draw the newest run that has what it takes once more

Only rows of one run are compared: absolute times differ from machine to machine.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import measure

DOCS = Path(__file__).parents[1] / "docs"
OURS = ("triton", "reference", "flex")
BASELINE = ("dense", "cudnn")
OPS = ("compressed", "select", "selected", "window", "combine", "pool")
STYLES: dict[tuple[str, str], dict] = {  # of whole ops, by op and the first word of the backend
    ("nsa", "triton"): dict(label="NSA, ours", color="#c2255c", lw=2.6, marker="o", ms=4, zorder=9),
    ("dense", "cudnn"): dict(label="dense, cuDNN", color="#212529", lw=1.8),
    ("dense", "flash"): dict(label="dense, FlashAttention-2", color="#868e96", lw=1.5),
    ("dense", "flex"): dict(label="dense, FlexAttention", color="#adb5bd", lw=1.5, ls="--"),
    ("nsa", "fla-core"): dict(label="NSA, fla-core", color="#1c7ed6", lw=1.5),
}
OP_COLOURS = ("#7048e8", "#1c7ed6", "#c2255c", "#2b8a3e", "#e67700", "#868e96")
Rows = Sequence[Mapping[str, str]]
Series = dict[int, float]  # by number of tokens


# ---- from rows to figures ------------------------------------------------------------


def of_run(rows: Rows, date: str) -> list[Mapping[str, str]]:
    """What a run measured of suite op."""
    wanted = {"suite": "op", "status": "ok", "date": date}
    return [row for row in rows if wanted.items() <= row.items()]


def newest_run(rows: Rows) -> str:
    """The date of the last run of suite op that has the baseline.

    Raises:
        ValueError: if there is none.
    """
    dates = [row["date"] for row in rows if row["suite"] == "op" and kind(row) == BASELINE]
    if not dates:
        raise ValueError("no run of suite op with dense cuDNN attention: make bench on a GPU first")
    return dates[-1]


def kind(row: Mapping[str, str]) -> tuple[str, str]:
    """Op and backend, without a version."""
    return row["op"], (row["backend"].split() or [""])[0]


def layouts_in(rows: Rows) -> list[str]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(layout_of(row) for row in rows))


def layout_of(row: Mapping[str, str]) -> str:
    return f"{row['heads']}/{row['kv_heads']} D{row['dim_head']}"


def in_words(layout: str) -> str:
    heads, kv_heads, width, *values = re.findall(r"\d+", layout)
    words = f"{heads} query heads, {kv_heads} key/value heads,\nhead dimension {width}"
    return f"{words}, of values {values[0]}" if values else words


def series(rows: Rows, layout: str, op: str, backend: str, column: str) -> Series:
    found = {
        int(row["tokens"]): float(row[column])
        for row in rows
        if layout_of(row) == layout and kind(row) == (op, backend) and row[column]
    }
    return dict(sorted(found.items()))


def ratio(above: Series, below: Series) -> Series:
    return {tokens: above[tokens] / below[tokens] for tokens in above if tokens in below}


def speed_up(rows: Rows, layout: str, column: str) -> Series:
    dense = series(rows, layout, *BASELINE, column)
    return ratio(dense, series(rows, layout, "nsa", "triton", column))


def crossover(speed: Series) -> float | None:
    """From how many tokens on it pays: where the speed-up passes 1 for the last time.

    Interpolated in logarithms. 0 where it pays at every length, None where not at the longest.
    """
    points = list(speed.items())
    if not points or points[-1][1] < 1:
        return None
    for (t0, s0), (t1, s1) in reversed([*pairwise(points)]):
        if s0 < 1 <= s1:
            share = math.log(1 / s0) / math.log(s1 / s0)
            return t0 * (t1 / t0) ** share
    return 0.0


def in_thousands(tokens: float) -> str:
    return f"{tokens / 1024:.3g}k"


def report(rows: Rows, date: str, docs: Path) -> str:
    """The run's speed-ups as text, after drawing its pictures where it has the baseline."""
    run = of_run(rows, date)
    if not any(kind(row) == BASELINE for row in run):
        return "no dense cuDNN attention in this run: no speed-up to tell, nothing drawn"
    lines = [table(run, layout) for layout in layouts_in(run)]
    drawn = ", ".join(path.name for path in draw(run, docs))
    return "\n".join([*lines, f"drawn: {drawn} in {docs}"])


def table(rows: Rows, layout: str) -> str:
    """Whole NSA against dense cuDNN attention, and how its ops grow."""
    lines = [f"\n{layout}: tokens, NSA and cuDNN ms (fwd + bwd), speed-up, NSA peak MiB"]
    ours, dense, memory = (
        series(rows, layout, *which)
        for which in (
            ("nsa", "triton", "step_ms"),
            (*BASELINE, "step_ms"),
            ("nsa", "triton", "peak_mib"),
        )
    )
    for tokens, speed in speed_up(rows, layout, "step_ms").items():
        times = f"{ours[tokens]:10.3f} {dense[tokens]:10.3f} {speed:6.2f}x"
        lines.append(f"  {in_thousands(tokens):>5} {times} {memory.get(tokens, math.nan):8.0f}")
    for column, name in (("step_ms", "fwd + bwd"), ("forward_ms", "forward")):
        at = crossover(speed_up(rows, layout, column))
        says = "not reached" if at is None else f"at {in_thousands(at)}" if at else "below all"
        lines.append(f"  crossover, {name}: {says}")
    growth = [f"{op} {grown:.2f}" for op in OPS if (grown := growth_at_64k(rows, layout, op))]
    lines.append(f"  time at 64k over time at 32k: {', '.join(growth) or 'not measured'}")
    return "\n".join(lines)


def growth_at_64k(rows: Rows, layout: str, op: str) -> float | None:
    times = series(rows, layout, op, "triton", "step_ms")
    return times[65536] / times[32768] if {32768, 65536} <= set(times) else None


# ---- pictures ------------------------------------------------------------


def draw(rows: Rows, docs: Path) -> list[Path]:
    """Writes bench_time.png, bench_speedup.png and bench_memory.png; returns their paths."""
    docs.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Rows], Figure]] = {
        "bench_time.png": draw_times,
        "bench_speedup.png": draw_speed_ups,
        "bench_memory.png": draw_memory,
    }
    for name, picture in pictures.items():
        figure = picture(rows)
        figure.savefig(docs / name, dpi=110, facecolor="white")
        plt.close(figure)
    return [docs / name for name in pictures]


def draw_times(rows: Rows) -> Figure:
    """The whole op and its rivals above, single ops below, if any; one column a head layout."""
    layouts = layouts_in(rows)
    with_ops = any(row["op"] in OPS for row in rows)
    figure, axes = panels(1 + with_ops, len(layouts), height=3.4)
    for axis, layout in zip(axes[0], layouts, strict=True):
        draw_whole(axis, rows, layout, "step_ms")
        dress(axis, title=in_words(layout))
    axes[0][0].set_ylabel("ms, forward + backward")
    if with_ops:
        for axis, layout in zip(axes[1], layouts, strict=True):
            draw_ops(axis, rows, layout)
            dress(axis)
        axes[1][0].set_ylabel("ops of NSA, ms")
    finish(figure, rows, "Time of one attention, batch 1", axes)
    return figure


def draw_speed_ups(rows: Rows) -> Figure:
    """Over dense cuDNN attention, with the length from which on it pays."""
    figure, axes = panels(1, 2, height=4.4, width=5.2)
    columns = {"forward_ms": "forward", "step_ms": "forward + backward"}
    for axis, (column, title) in zip(axes[0], columns.items(), strict=True):
        axis.axhline(1, color="#212529", lw=1)
        for layout, colour in zip(layouts_in(rows), OP_COLOURS, strict=False):
            speed = speed_up(rows, layout, column)
            at = crossover(speed)
            says = "nowhere yet" if at is None else f"from {in_thousands(at)}" if at else "always"
            label = f"{in_words(layout)}: {says}"
            axis.plot(*xy(speed), color=colour, lw=2, marker="o", ms=4, label=label)
            if at:
                axis.plot([at], [1], marker="o", ms=11, mfc="none", mec=colour, mew=2, zorder=9)
        dress(axis, title=title)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes[0][0].set_ylabel("times as fast as dense cuDNN")
    finish(figure, rows, "NSA over dense attention: where it begins to pay", axes.T)
    return figure


def draw_memory(rows: Rows) -> Figure:
    layouts = layouts_in(rows)
    figure, axes = panels(1, len(layouts), height=3.6)
    for axis, layout in zip(axes[0], layouts, strict=True):
        draw_whole(axis, rows, layout, "peak_mib", scale=1 / 1024)
        dress(axis, title=in_words(layout))
    axes[0][0].set_ylabel("GiB above the inputs")
    finish(figure, rows, "Peak memory of a forward and backward pass", axes)
    return figure


def draw_ops(axis: Axes, rows: Rows, layout: str) -> None:
    for op, colour in zip(OPS, OP_COLOURS, strict=True):
        times = series(rows, layout, op, "triton", "step_ms")
        axis.plot(*xy(times), color=colour, lw=1.6, marker="o", ms=3, label=op)


def draw_whole(axis: Axes, rows: Rows, layout: str, column: str, scale: float = 1.0) -> None:
    for (op, backend), style in STYLES.items():
        tokens, values = xy(series(rows, layout, op, backend, column))
        if tokens:
            shown = {"marker": "."} | style  # a lone point has no line
            axis.plot(tokens, [scale * value for value in values], **shown)


def xy(points: Series) -> tuple[list[int], list[float]]:
    return list(points.keys()), list(points.values())


def panels(height_in_rows: int, columns: int, *, height: float, width: float = 3.4):
    return plt.subplots(
        height_in_rows,
        columns,
        figsize=(width * columns, height * height_in_rows),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )


def dress(axis: Axes, *, title: str = "") -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=10)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_title(title, fontsize=10)
    axis.xaxis.set_major_formatter(lambda value, _: in_thousands(value))
    axis.grid(True, which="major", color="#e9ecef", lw=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def finish(figure: Figure, rows: Rows, title: str, runs: Sequence[Sequence[Axes]]) -> None:
    """Title, and a legend to the right of each run of panels: of what any of them shows."""
    for run in runs:
        handles: dict[str, Any] = {}
        for axis in run:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        run[-1].legend(
            list(handles.values()),
            list(handles),
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            fontsize=8.5,
        )
    row = rows[0]
    figure.suptitle(
        f"{title}\n{row['device']}, {row['dtype']}, {row['sizes']}, {row['date'][:10]}", fontsize=11
    )
    figure.supxlabel("tokens", fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--date", help="of the run; the newest with the baseline by default")
    options = parser.parse_args()
    rows = measure.read(options.results)
    print(report(rows, options.date or newest_run(rows), options.docs))


if __name__ == "__main__":
    main()
