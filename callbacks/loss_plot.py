"""loss.png: the metric of the data against steps and tokens."""

import logging
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from callbacks.csv_logger import Row, RunCSVLogger, read_rows
from callbacks.metric import metric_of
from callbacks.preemption import Preempted
from runs.folder import leaves_files, replacing, run_folder

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "#8aa9c9", "#c2452d"
TICKS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
NEIGHBOURS = 2  # of a smoothed point, on each side, however short the run
Curve = list[tuple[int, float]]


class LossPlot(Callback):
    """Draws metrics.csv after every validation and at the end of training. Without the CSV
    logger there is nothing to draw, which is said.

    Args:
        smoothing: the bold line of training is the mean of neighbouring points, over this share of
            the run so far; at least 0, which draws the curve as it is, and below 1.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} of LossPlot must be at least 0 and below 1")
        self.smoothing = smoothing

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        has_csv = any(isinstance(logger, RunCSVLogger) for logger in trainer.loggers)
        if stage == "fit" and not has_csv and leaves_files(trainer):
            log.warning("loss.png is not drawn: it is made of metrics.csv, and logger= has no csv")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Preempted):
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if not leaves_files(trainer):
            return
        folder = run_folder(trainer)
        rows = read_rows(Path(folder, "metrics.csv"))
        metric = metric_of(trainer)
        train = curve(rows, f"train/{metric.name}")
        validation = curve(rows, f"val/{metric.name}")
        if train or validation:
            figure = draw(train, validation, metric, self.smoothing, tokens_per_step(trainer))
            with replacing(folder / "loss.png") as draft:
                figure.savefig(draft, dpi=150)


def tokens_per_step(trainer: Any) -> int:
    """All that an optimizer step is trained on; known without a step, as of a finished run."""
    data = trainer.datamodule
    micro_batches = trainer.world_size * trainer.accumulate_grad_batches
    return data.micro_batch_size * data.seq_len * micro_batches


def curve(rows: list[Row], name: str) -> Curve:
    """(optimizer steps done, value) of every row that has the metric, and a finite one."""
    points = [(int(row["step"]), float(row[name])) for row in rows if name in row]
    return [(step, value) for step, value in points if math.isfinite(value)]


def smooth(points: Curve, share: float) -> Curve:
    """Each point's mean with as many before as after it: in all, `share` of the points so far.

    At least `NEIGHBOURS` on each side where there are so many; a share of 0 changes nothing.
    """
    means = []
    for here, (step, _) in enumerate(points):
        reach = max(NEIGHBOURS, round(here * share / 2)) if share else 0
        near = points[max(0, here - reach) : here + reach + 1]
        means.append((step, sum(value for _, value in near) / len(near)))
    return means


def draw(
    train: Curve, validation: Curve, metric: Any, smoothing: float, tokens_per_step: int
) -> Figure:
    """Training thin and smoothed, validation with its last and its best value in the legend."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        smoothed = smooth(train, smoothing)
        axes.plot(*zip(*train, strict=True), color=TRAIN, alpha=0.35, linewidth=1)
        label = f"training, {smoothed[-1][1]:.3f} at the end"
        axes.plot(*zip(*smoothed, strict=True), color=TRAIN, linewidth=2, label=label)
    if validation:
        last = validation[-1][1]
        best = (min if metric.mode == "min" else max)(value for _, value in validation)
        label = f"validation, {last:.3f} at the end"
        label += f", {best:.3f} at best" if best != last else ""
        style = {"marker": "o", "markersize": 4, "linewidth": 2}
        axes.plot(*zip(*validation, strict=True), color=VALIDATION, label=label, **style)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(metric.label)
    values = [value for _, value in train + validation]
    if metric.mode == "min" and 0 < min(values) * 2 < max(values):  # the long end, and the start
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=TICKS))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    last_step = max(step for step, _ in train + validation)
    unit, size = ("million", 1e6) if last_step * tokens_per_step >= 1e6 else ("thousand", 1e3)
    factor = tokens_per_step / size
    there_and_back: Any = (lambda steps: steps * factor, lambda tokens: tokens / factor)
    above = axes.secondary_xaxis("top", functions=there_and_back)
    above.set_xlabel(f"{unit} tokens")
    return figure
