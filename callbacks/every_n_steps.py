"""The base of callbacks that do something after every n-th optimizer step."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class EveryNSteps(Callback, ABC):
    """Calls `on_nth_step` once after every n-th optimizer step, whatever the accumulation.

    Idle under `fast_dev_run`. `seconds` is the time spent in `on_nth_step`, so that throughput can
    leave it out; the device is synchronised before it starts, at no other time.

    Args:
        every_n_steps: n; None follows the trainer's `log_every_n_steps`.

    Raises:
        ValueError: if `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps} of {type(self).__name__} must be at least 1; "
                "to do without a callback, drop it from the config"
            )
        self.every_n_steps = every_n_steps
        self.seconds = 0.0
        self._last_step = 0

    def check_at_least(self, least: int, **numbers: float) -> None:
        """Raises ValueError for an argument that is too small."""
        for name, value in numbers.items():
            if value < least:
                raise ValueError(
                    f"{name}={value} of {type(self).__name__} must be at least {least}"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        settings: Any = trainer  # Lightning sets them from outside the class
        step = trainer.global_step
        if step == self._last_step or settings.fast_dev_run:
            return
        self._last_step = step
        every = self.every_n_steps or settings.log_every_n_steps
        if every and step % every == 0:
            synchronize(pl_module.device)
            start = time.perf_counter()
            self.on_nth_step(trainer, pl_module, batch)
            self.seconds += time.perf_counter() - start

    @abstractmethod
    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """`trainer.global_step` optimizer steps are done; `batch` is the last micro-batch."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Give `metrics` to every logger, in the row of the optimizer step just done, and to callbacks.

    `LightningModule.log` would repeat them in every later row until they are logged again.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
        logger.save()


@contextmanager
def aside(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run the model without affecting training: no gradients, no dropout, its own random numbers.

    In training's precision, and uncompiled, so that hooks fire and odd lengths compile nothing.
    """
    was_training = pl_module.training
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        trainer.precision_plugin.forward_context(),
    ):
        pl_module.eval()
        try:
            yield
        finally:
            pl_module.train(was_training)
