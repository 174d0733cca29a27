"""Which samples were in a batch whose loss jumped, and what they say."""

import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.every_n_steps import log_metrics
from callbacks.every_step import EveryStep, Step, span
from runs.folder import run_folder, write_text

log = logging.getLogger(__name__)

SIGMA = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


class LossSpikes(EveryStep):
    """Writes spikes/step_<n>.txt for a step whose loss is far above what it was, or not finite.

    The file has the loss and the samples of every micro-batch of every rank, and the text of the
    worst one's. No batch is kept for it: samples and text follow from the step. Far above is more
    than `threshold` standard deviations over the median of the `window` steps before, the deviation
    estimated from the median distance to it, so that earlier spikes do not hide later ones. Nothing
    is judged before half a window. `train/loss_spikes`, how many there were so far, is logged
    whenever it grows.

    Args:
        threshold: standard deviations above the median.
        window: steps that say what is usual.
        max_reports: files in a run folder; spikes beyond it are counted only.
        every_n_steps: as in `EveryStep`.

    Raises:
        ValueError: if the threshold is not above 0, the window below 2 or the reports below 1.
    """

    def __init__(
        self,
        threshold: float = 6.0,
        window: int = 100,
        max_reports: int = 20,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        if threshold <= 0:
            raise ValueError(f"threshold={threshold} of LossSpikes must be above 0")
        self.check_at_least(2, window=window)
        self.check_at_least(1, max_reports=max_reports)
        self.threshold = threshold
        self.max_reports = max_reports
        self._recent: deque[float] = deque(maxlen=window)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._recent.clear()

    def on_steps(self, trainer: Trainer, pl_module: LightningModule, steps: list[Step]) -> None:
        before = self.count
        for step in steps:
            usual = self._usual()
            limit = math.inf if usual is None else usual[0] + self.threshold * usual[1]
            if step.broken or step.loss > limit:
                self.count += 1
                self._report(trainer, step, usual)
            if math.isfinite(step.loss):
                self._recent.append(step.loss)
        if self.count > before:
            log_metrics(trainer, {"train/loss_spikes": float(self.count)})

    def _usual(self) -> tuple[float, float] | None:
        """Median and standard deviation of the recent losses; None while they are too few."""
        if 2 * len(self._recent) < (self._recent.maxlen or 0):
            return None
        median = statistics.median(self._recent)
        return median, SIGMA * statistics.median(abs(loss - median) for loss in self._recent)

    def _report(self, trainer: Trainer, step: Step, usual: tuple[float, float] | None) -> None:
        path = Path(run_folder(trainer), "spikes", f"step_{step.number}.txt")
        files = {*path.parent.glob("step_*.txt"), path}  # those of before a restart, too
        if not trainer.is_global_zero or len(files) > self.max_reports:
            return
        log.warning("the loss of step %d is %.4f: see %s", step.number, step.loss, path)
        known = "unknown yet" if usual is None else "{:.4f} ± {:.4f}".format(*usual)
        write_text(path, report(trainer, step, known))


def report(trainer: Any, step: Step, usual: str) -> str:
    """What a file says: the step, every micro-batch, and the text of the worst one."""
    lines = [
        f"step {step.number}",
        f"loss {step.loss:.4f}, usual {usual}",
        f"gradient norm {step.grad_norm:.4g}, before clipping",
        "",
        "rank  micro-batch      loss  samples",
    ]
    data = trainer.datamodule
    for rank, losses in enumerate(step.losses):
        for micro_batch, loss in enumerate(losses):
            samples = span(data.samples_of(step.number, rank, micro_batch))
            lines.append(f"{rank:4}  {micro_batch:11}  {loss:8.4f}  {samples}")
    rank, micro_batch = step.worst()
    for sample in data.samples_of(step.number, rank, micro_batch):
        head = f"--- sample {sample}, of rank {rank}, micro-batch {micro_batch}"
        lines += ["", head, data.text_of(sample)]
    return "\n".join(lines) + "\n"
