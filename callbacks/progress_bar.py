"""How far training is: a bar on a terminal, a line every n steps anywhere else."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from callbacks.every_n_steps import EveryNSteps
from callbacks.metric import metric_of

PATIENCE = 10.0  # seconds in which an evaluation says nothing


class StepProgressBar(EveryNSteps, ProgressBar):
    """Shows steps, loss, metric, the latest validation's, tokens per second and the time left.

    Metrics are read every n steps only, since reading one waits for the GPU. The time left follows
    from the wall time of this process's steps, validations included, its first step aside.

    Args:
        every_n_steps: None follows the trainer's `log_every_n_steps`, the steps at which there is
            a new loss to show.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        EveryNSteps.__init__(self, every_n_steps)
        ProgressBar.__init__(self)
        self._enabled = True
        self._evaluation, self._batches, self._spoke = "", 0, 0.0
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = None  # the first finished step and its time

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self._enabled:
            tqdm.write(sep.join(str(arg) for arg in args), file=sys.stdout)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = None
        if self._enabled and sys.stdout.isatty():
            self._bar = tqdm(
                total=trainer.max_steps if trainer.max_steps > 0 else None,
                initial=trainer.global_step,
                bar_format="{percentage:3.0f}% |{bar}| {desc}",
                file=sys.stdout,
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._first is None and trainer.global_step > self._last_step:
            self._first = (trainer.global_step, time.monotonic())
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._show(trainer, self.status(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin_evaluation(trainer, "validating")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, "testing")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._go_on_evaluating(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._go_on_evaluating(trainer)

    def _begin_evaluation(self, trainer: Trainer, what: str) -> None:
        self._evaluation, self._batches, self._spoke = what, 0, time.monotonic()
        if self._bar is not None:
            self._show(trainer, f"step {trainer.global_step}  {what}")

    def _go_on_evaluating(self, trainer: Trainer) -> None:
        """Say every few seconds how far a validation or a test is."""
        self._batches += 1
        if not trainer.sanity_checking and time.monotonic() - self._spoke >= PATIENCE:
            self._spoke = time.monotonic()
            status = f"{self._evaluation}, {self._batches:,} batches done"
            self._show(trainer, f"step {trainer.global_step}  {status}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._show(trainer, self.status(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def status(self, trainer: Trainer) -> str:
        """One line: step, losses, speed and the time left, of what is known so far."""
        metrics = trainer.callback_metrics
        last = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        parts = [f"step {trainer.global_step:>{max(0, len(last) - 1)}}{last}"]
        name = metric_of(trainer).name
        shown = {"train/loss": "loss", f"train/{name}": name, f"val/{name}": f"val {name}"}
        parts += [f"{label} {metrics[key]:.4f}" for key, label in shown.items() if key in metrics]
        if (speed := metrics.get("perf/tokens_per_second")) is not None:
            parts.append(f"{human(float(speed))} tokens/s")
        if (left := self._seconds_left(trainer)) is not None:
            parts.append(f"ETA {clock(left)}")
        return "  ".join(parts)

    def _seconds_left(self, trainer: Trainer) -> float | None:
        if self._first is None or trainer.max_steps < 0:
            return None
        step, then = self._first
        done = trainer.global_step - step
        if done < 1:
            return None
        return (time.monotonic() - then) / done * (trainer.max_steps - trainer.global_step)

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
