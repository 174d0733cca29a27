"""What a better metric costs: a sweep's jobs against visible tokens, speed and parameters."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from data.metrics import LABELS
from runs import results

Job = dict[str, Any]  # one row of sweep.csv
COSTS = {  # column -> label of its axis; in this order from left to right
    "visible_tokens": "visible tokens: keys that the last query reads",
    "tokens_per_second": "tokens per second",
    "num_params": "parameters",
}
MORE_IS_BETTER = ("tokens_per_second",)
FRONT, BEHIND = "#c2452d", "#8aa9c9"
SIDES = ((1, 1), (-1, -1), (1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1), (0, -1))  # of a point
LOG_FROM = 3.0  # an axis is logarithmic if its largest value is at least so many times its smallest


def finished(jobs: list[Job]) -> list[Job]:
    """The jobs that have a result."""
    return [job for job in jobs if not job["error"]]


def by_metric(jobs: list[Job]) -> list[list[Job]]:
    """The finished jobs, those that are judged by the same metric together."""
    done = finished(jobs)
    metrics = dict.fromkeys(job["metric"] for job in done)
    return [[job for job in done if job["metric"] == metric] for metric in metrics]


def measured(job: Job) -> float:
    """The validation metric of a finished job."""
    return results.value(job, "val_metric")


def badness(job: Job) -> float:
    """The validation metric, turned round where a higher one is better."""
    return -measured(job) if job["better"] == "higher" else measured(job)


def pareto_front(jobs: list[Job], cost: str) -> list[Job]:
    """The jobs of one metric that no other beats in both, the cheapest first: a better metric,
    and a lower cost (a higher one in `MORE_IS_BETTER`).
    """
    sign = -1 if cost in MORE_IS_BETTER else 1
    known = [job for job in finished(jobs) if job[cost] is not None]
    front, best = [], math.inf
    for job in sorted(known, key=lambda job: (sign * job[cost], badness(job))):
        if badness(job) < best:
            front.append(job)
            best = badness(job)
    return front


def telling(jobs: list[Job]) -> list[list[str]]:
    """What tells the jobs apart: their overrides without those that all share."""
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    return [[o for o in job["overrides"] if o not in shared] for job in jobs]


def labels(jobs: list[Job]) -> tuple[str, list[str]]:
    """A short label for each job, and what the labels say: the names of the values they show.

    Where the jobs override different names, a label holds the names itself.
    """
    overrides = [[override.partition("=") for override in job] for job in telling(jobs)]
    keys = {tuple(name.rpartition(".")[2] for name, _, _ in job) for job in overrides}
    if len(keys) > 1:
        return "", [", ".join(name + sep + value for name, sep, value in job) for job in overrides]
    return ", ".join(keys.pop()), [", ".join(value for _, _, value in job) for job in overrides]


def draw(jobs: list[Job]) -> Figure:
    """A panel for each cost in which the jobs differ: a point a job, the Pareto front as steps.

    Failed jobs are left out, and so are jobs that are judged by another metric than the first.
    """
    legend, texts = labels(jobs)
    shown = by_metric(jobs)[0]
    points = [(job, text) for job, text in zip(jobs, texts, strict=True) if job in shown]
    costs = [cost for cost in COSTS if len({job[cost] for job, _ in points} - {None}) > 1]
    costs = costs or ["visible_tokens"]
    figure = Figure(figsize=(1.8 + 4.2 * len(costs), 5.0), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        draw_panel(axes, cost, [job for job, _ in points if job[cost] is not None])
    metric = shown[0]["metric"]
    panels[0].set_ylabel(f"validation, {LABELS.get(metric, metric)}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", frameon=False)
    if legend:
        figure.suptitle(f"labels: {legend}", fontsize="medium", wrap=True)
    figure.draw_without_rendering()  # settles where everything is
    for axes, cost in zip(panels, costs, strict=True):
        known = [(job, text) for job, text in points if job[cost] is not None]
        place_labels(axes, [(job[cost], measured(job), text) for job, text in known])
    return figure


def draw_panel(axes: Axes, cost: str, jobs: list[Job]) -> None:
    """Points, front and axis of one cost."""
    front = pareto_front(jobs, cost)
    leading = sorted((job[cost], measured(job)) for job in front)
    behind = [(job[cost], measured(job)) for job in jobs if job not in front]
    where = "pre" if cost in MORE_IS_BETTER else "post"
    if behind:
        axes.plot(*zip(*behind, strict=True), "o", color=BEHIND, markersize=6)
    axes.step(*zip(*leading, strict=True), where=where, color=FRONT, alpha=0.5)
    axes.plot(*zip(*leading, strict=True), "o", color=FRONT, markersize=7, label="Pareto front")
    values = sorted({job[cost] for job in jobs})
    if values[-1] >= LOG_FROM * values[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        exact = cost == "visible_tokens"
        ticks = values if exact else [float(f"{value:.2g}") for value in values]
        axes.xaxis.set_major_locator(FixedLocator(apart(ticks)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    better = "more" if cost in MORE_IS_BETTER else "fewer"
    axes.set_xlabel(f"{COSTS[cost]} ({better} is better)")
    axes.grid(alpha=0.25)
    axes.margins(x=0.12, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def apart(ascending: list[float], at_most: int = 8) -> list[float]:
    """The values that can be told apart as ticks of a logarithmic axis."""
    factor = max(1.1, (ascending[-1] / ascending[0]) ** (1 / at_most))
    kept: list[float] = []
    for value in ascending:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


def place_labels(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Label each point on the side that has room: not over another point or label, nor outside.

    A point without room stays without a label.
    """
    half = 3.5 * axes.figure.dpi / 72  # of a marker, in pixels
    taken = []
    for x, y, _ in points:
        px, py = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(px - half, py - half, px + half, py + half))
    for x, y, label in points:
        for dx, dy in SIDES:
            reach = 4 if dx and dy else 7  # in points
            text = axes.annotate(
                label,
                (x, y),
                xytext=(reach * dx, reach * dy),
                textcoords="offset points",
                ha=("right", "center", "left")[dx + 1],
                va=("top", "center", "bottom")[dy + 1],
                fontsize=8,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            inside = inside and axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
