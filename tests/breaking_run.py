"""Runs of the real module on a real corpus that break where they are told to, in a second each."""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from squares import squares
from tiny_run import tiny_trainer
from torch import Tensor

from data.datamodule import TextDataModule
from nsa.training.lightning_module import NSALightningModule

ROWS, SEQ_LEN = 2, 8
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
SIZES = {"vocab_size": 256, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "seq_len": SEQ_LEN}


def overflowing(logits: Tensor) -> Tensor:
    """Every gradient stays finite, their squares do not."""
    logits.register_hook(lambda gradient: gradient * 1e30)
    return logits


def impossible(logits: Tensor) -> Tensor:
    """The loss is infinite, every gradient finite: all but the first class has no chance."""
    hopeless = torch.arange(logits.shape[-1], device=logits.device) > 0
    return logits.masked_fill(hopeless, -math.inf)


BREAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda logits: logits * math.nan,
    "impossible": impossible,
    "overflowing": overflowing,
    "spike": lambda logits: 300 * logits,
}


class BreakingModule(NSALightningModule):
    """Breaks at {(step, rank, micro-batch): a key of BREAKS}; steps `left_out` have no update."""

    def __init__(
        self, breaks: dict | None = None, left_out: Collection[int] = (), fused: bool = True
    ) -> None:
        attention: dict = {}
        super().__init__(
            model={**SIZES, "layer_pattern": ["dense"], "attention": attention},
            optimizer=ADAMW | {"fused": fused},
            scheduler={"name": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1},
        )
        self.breaks, self.left_out = breaks or {}, left_out
        self.model.register_forward_hook(self._break)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step, micro_batch = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        self.place = (step + 1, self.global_rank, micro_batch)
        return super().training_step(batch, batch_idx)

    def _break(self, model: Any, inputs: Any, logits: Tensor) -> Tensor:
        how = self.breaks.get(self.place) if self.training else None
        return BREAKS[how](logits) if how else logits

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self.global_step + 1 not in self.left_out:
            return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer_closure()
        self._micro_totals.clear()
        return None


def corpus(folder: Path) -> TextDataModule:
    """Text whose windows tell one another apart."""
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text(squares(400))
    return TextDataModule(
        name="breaking",
        paths=str(folder / "corpus.txt"),
        vocab_size=256,
        seq_len=SEQ_LEN,
        micro_batch_size=ROWS,
    )


def fit(
    folder: Path, *callbacks: L.Callback, module: NSALightningModule, **options: Any
) -> L.Trainer:
    """Train from scratch, or from `ckpt_path`, without validation; the trainer afterwards."""
    ckpt_path = options.pop("ckpt_path", None)
    settings = {"max_steps": 6, "limit_val_batches": 0, "use_distributed_sampler": False}
    trainer = tiny_trainer(folder, list(callbacks), **settings | options)
    trainer.fit(module, corpus(folder), ckpt_path=ckpt_path, weights_only=True)
    return trainer
