"""Progress of training: a bar on a terminal, a line every n steps anywhere else."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from callbacks.every_n_steps import EveryNSteps
from callbacks.metric import metric_of
from callbacks.time_left import TimeLeft

PATIENCE = 10.0  # seconds in which an evaluation says nothing


class StepProgressBar(EveryNSteps, ProgressBar):
    """Shows step, loss, metric, the latest validation's metric, tokens per second and time left.

    Metrics are read every n steps only, since reading one waits for the GPU. The time left is that
    of `TimeLeft`. Where there is no terminal, a line says that training or the test begins.

    Args:
        every_n_steps: None follows the trainer's `log_every_n_steps`, the steps at which there is
            a new loss to show.
        test: whether a test follows training, which the time left then includes.
    """

    def __init__(self, every_n_steps: int | None = None, test: bool = True) -> None:
        EveryNSteps.__init__(self, every_n_steps)
        ProgressBar.__init__(self)
        self._enabled = True
        self._evaluation, self._total, self._batches, self._spoke = "", 0, 0, 0.0
        self._bar: tqdm | None = None
        self._time_left = TimeLeft(test=test)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self._enabled:
            tqdm.write(sep.join(str(arg) for arg in args), file=sys.stdout)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._time_left.begin(trainer)
        if self._enabled and sys.stdout.isatty():
            self._bar = tqdm(
                total=trainer.max_steps if trainer.max_steps > 0 else None,
                initial=trainer.global_step,
                bar_format="{percentage:3.0f}% |{bar}| {desc}",
                file=sys.stdout,
                dynamic_ncols=True,
            )
        else:
            every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
            self._show(trainer, f"{place(trainer)}  training begins, a line every {every} steps")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._last_step:
            self._time_left.step_done(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._show(trainer, self.status(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._time_left.validation_begins()
        self._begin_evaluation("validating", trainer.num_val_batches)
        if self._bar is not None:
            self._show(trainer, f"{place(trainer)}  validating")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation("testing", trainer.num_test_batches)
        self._show(trainer, f"{place(trainer)}  testing, {self._total:,} batches")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._go_on_evaluating(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._go_on_evaluating(trainer)

    def _begin_evaluation(self, what: str, batches: list[int | float]) -> None:
        self._evaluation, self._total = what, int(sum(batches))
        self._batches, self._spoke = 0, time.monotonic()

    def _go_on_evaluating(self, trainer: Trainer) -> None:
        """Say every few seconds how far a validation or a test is."""
        self._batches += 1
        if not trainer.sanity_checking and time.monotonic() - self._spoke >= PATIENCE:
            self._spoke = time.monotonic()
            status = f"{self._evaluation}, {self._batches:,} of {self._total:,} batches done"
            self._show(trainer, f"{place(trainer)}  {status}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._time_left.validation_done(trainer)
            self._show(trainer, self.status(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def status(self, trainer: Trainer) -> str:
        """One line of what is known so far: step, losses, speed and time left."""
        metrics = trainer.callback_metrics
        parts = [place(trainer)]
        name = metric_of(trainer).name
        shown = {"train/loss": "loss", f"train/{name}": name, f"val/{name}": f"val {name}"}
        parts += [f"{label} {metrics[key]:.4f}" for key, label in shown.items() if key in metrics]
        if (speed := metrics.get("perf/tokens_per_second")) is not None:
            parts.append(f"{human(float(speed))} tokens/s")
        if (left := self._time_left.seconds(trainer)) is not None:
            parts.append(f"ETA {clock(left)}")
        return "  ".join(parts)

    def _show(self, trainer: Trainer, status: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(status, refresh=False)
            self._bar.n = trainer.global_step
            self._bar.refresh()
        elif self._enabled:
            print(status, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def place(trainer: Trainer) -> str:
    """The step, and the last one where it is known."""
    last = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
    return f"step {trainer.global_step:>{max(0, len(last) - 1)}}{last}"


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """3723 -> 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
