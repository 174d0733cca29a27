"""Checkpoints every n optimizer steps that a run can go on from exactly."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from runs.folder import SAVED_AT

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # of Lightning's state


class RunCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that also removes the checkpoint a run went on from.

    It does so once a better one is whole: a run that is started often does not fill the disk.
    """

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and when it was saved; paths without folders, which may be moved."""
        state = super().state_dict()
        state["dirpath"] = ""
        for name in PATHS:
            state[name] = Path(state[name]).name if state[name] else ""
        state["best_k_models"] = {Path(k).name: v for k, v in state["best_k_models"].items()}
        return state | {SAVED_AT: time.time()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Only checkpoints that lie in this run's folder count: a branch has none yet."""
        state, folder = dict(state_dict), Path(self.dirpath or "")

        def here(path: str) -> str:
            found = folder / Path(path).name
            return str(found) if path and found.exists() else ""

        state |= {name: here(state[name]) for name in PATHS}
        best = {here(path): score for path, score in state["best_k_models"].items()}
        state["best_k_models"] = {path: score for path, score in best.items() if path}
        if state["best_k_models"] or state["best_model_path"]:
            super().load_state_dict(state | {"dirpath": self.dirpath})

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return previous != current and Path(self.dirpath or "") in Path(previous).parents


class StepCheckpoint(RunCheckpoint):
    """A `RunCheckpoint` with two gaps of saving by steps closed.

    Where a validation falls on the same step, the checkpoint is saved after it, not before: a run
    that goes on from it skips that validation, so it must know its result and the best checkpoint.
    And the end of training is always saved, also between two cadences. Takes the same arguments;
    keep `every_n_train_steps` set and `monitor=step`.

    `asked` has the next validation saved, whatever the cadence.
    """

    asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A run that goes on is saved already: not again before its first step is done.
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not _validation_follows(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_validation_end(trainer, pl_module)
        if self.asked:
            self.asked = False
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self.save(trainer)

    def save_between_steps(self, trainer: Trainer) -> None:
        """Save the step that is done, also where it is saved already: time has passed since then,
        and trainer.max_time counts it.
        """
        if trainer.global_step:
            with counted_as_in_the_last_batch(trainer):
                self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, whatever the cadence, and also where this step was saved before."""
        candidates = self._monitor_candidates(trainer)
        # A step that is saved anew takes the place of its own file, not of the oldest one.
        self.best_k_models.pop(self.format_checkpoint_name(candidates), None)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)


@contextmanager
def counted_as_in_the_last_batch(trainer: Trainer) -> Iterator[None]:
    """Lightning's counts as they were in `on_train_batch_end`, where it expects to be saved.

    It counts the last batch itself where a run goes on from there, and does not validate it again.
    """
    loop = trainer.fit_loop.epoch_loop
    batches = (loop.batch_progress.total, loop.batch_progress.current)

    def count(change: int) -> None:
        loop._batches_that_stepped += change
        for each in batches:
            each.completed += change

    count(-1)
    try:
        yield
    finally:
        count(1)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether validation runs after this micro-batch, where it is counted in micro-batches."""
    every = trainer.val_check_batch if trainer.check_val_every_n_epoch is None else None
    if not every or not trainer.enable_validation:
        return False
    return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0
