"""A close look at the NSA layers as they learn: `nsa.probe` every n steps, recorded and drawn."""

import logging
import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from callbacks import probe_plot
from callbacks.csv_logger import Row, read_rows
from callbacks.every_n_steps import EveryNSteps, aside, log_metrics
from nsa.attention import SparseAttention
from nsa.probe import probe
from nsa.transformer import sparse_layers
from runs.folder import csv_head, csv_text, leaves_files, replacing, run_folder, write_text

log = logging.getLogger(__name__)

FOLDER, TABLE = "attention_probe", "heads.csv"  # inside the run folder
ONLY_IN_TABLE = "picks_beyond_"  # a prefix: too many for the loggers
Figures = dict[str, Tensor]  # [H], or [] of the whole layer


class AttentionProbe(EveryNSteps):
    """Looks at sequences of the validation split every n steps, and at the end of training.

    Logged are the figures of `nsa.probe` as means over the heads of a layer, and the norms of the
    step's gradient before clipping, all under probe/layer_<i>/: grad_compress_keys and
    grad_compress_values (the two φ), grad_layer. attention_probe/ in the run folder gets heads.csv,
    a row for each step, layer and head; heads.png, every head as it is now; curves.png, all layers
    from the start. The pictures go to W&B too. On a task with known answers (`data=recall`) the
    figures are those of the questions, and evidence_kept says how often a layer keeps the answer.

    An extra forward pass, apart from training: no gradients, no dropout, no random number of
    training's, no compiled program, no CUDA graph.

    Args:
        every_n_steps: optimizer steps between looks.
        num_sequences: how many sequences, the first of the split.
        num_tiles: where to look in each of them, see `nsa.probe.probe`.

    Raises:
        ValueError: if a number is below 1.
    """

    ALSO = ("document_starts", "evidence")  # of a batch, beside its tokens

    def __init__(
        self, every_n_steps: int = 500, num_sequences: int = 2, num_tiles: int = 8
    ) -> None:
        super().__init__(every_n_steps)
        self.check_at_least(1, num_sequences=num_sequences, num_tiles=num_tiles)
        self.num_sequences, self.num_tiles = num_sequences, num_tiles
        self._read: dict[str, Tensor] = {}
        self._rows: list[Row] = []
        self._looked_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not sparse_layers(pl_module.model):
            log.warning("attention_probe finds nothing to look at: the model has no NSA layer")
        kept = read_rows(run_folder(trainer) / FOLDER / TABLE)
        self._rows = [row for row in kept if int(row["step"]) <= trainer.global_step]

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._looked_at = trainer.global_step
        layers = sparse_layers(pl_module.model)
        if not layers:
            return
        gradients = gradient_norms(pl_module, layers)  # on every rank: they may be sharded
        figures: dict[int, Figures] = {}
        with aside(trainer, pl_module):
            read = self._sequences(trainer, pl_module.device)
            look = partial(self._look, figures, read.pop("evidence", None))
            handles = [
                layer.register_forward_pre_hook(partial(look, index), with_kwargs=True)
                for index, layer in layers.items()
                if trainer.is_global_zero  # all ranks run the model, whose weights may be sharded
            ]
            try:
                pl_module.model(**read)  # type: ignore[operator]
            finally:
                for handle in handles:
                    handle.remove()
        if trainer.is_global_zero:
            for index, norms in gradients.items():
                figures[index] |= norms
            log_metrics(trainer, layer_means(figures))
            self._record(trainer, figures)

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._looked_at != trainer.global_step and not trainer.fast_dev_run:
            self.on_nth_step(trainer, pl_module, batch=None)

    def _look(
        self,
        figures: dict[int, Figures],
        evidence: Tensor | None,
        index: int,
        layer: nn.Module,
        inputs: tuple[Tensor, ...],
        told: dict[str, Tensor],
    ) -> None:
        assert isinstance(layer, SparseAttention)
        figures[index] = probe(layer, inputs[0], self.num_tiles, evidence=evidence, **told)

    def _sequences(self, trainer: Any, device: torch.device) -> dict[str, Tensor]:
        """Token ids [B, T], where documents begin in packed rows, and where answers stand in a
        task; the same at every look.
        """
        if not self._read:
            rows: dict[str, list[Tensor]] = {}
            for batch in trainer.datamodule.val_dataloader():
                found = {"ids": batch["tokens"][:, :-1].clamp(min=0)}
                found |= {name: batch[name] for name in self.ALSO if name in batch}
                for name, array in found.items():
                    rows.setdefault(name, []).extend(array)
                if len(rows["ids"]) >= self.num_sequences:
                    break
            self._read = {n: torch.stack(each[: self.num_sequences]) for n, each in rows.items()}
        return {name: array.to(device) for name, array in self._read.items()}

    def _record(self, trainer: Trainer, figures: dict[int, Figures]) -> None:
        self._rows += rows_of(trainer.global_step, figures)
        if not leaves_files(trainer):
            return
        folder = run_folder(trainer) / FOLDER
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        write_text(folder / TABLE, csv_head(columns) + csv_text(columns, self._rows))
        pictures = [folder / "heads.png", folder / "curves.png"]
        for path, draw in zip(pictures, (probe_plot.heads, probe_plot.curves), strict=True):
            with replacing(path) as draft:
                draw(self._rows).savefig(draft, dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(FOLDER, [str(path) for path in pictures], trainer.global_step)


def gradient_norms(
    pl_module: LightningModule, layers: dict[int, SparseAttention]
) -> dict[int, Figures]:
    """Of the step just done, before clipping; nothing of a step that was skipped."""
    whole = norm_of(pl_module)
    if not whole:
        return {}
    before_clipping = float(pl_module.grad_norm) / whole  # type: ignore[arg-type]
    parts = {
        index: {
            "grad_compress_keys": layer.compress_k,
            "grad_compress_values": layer.compress_v,
            "grad_layer": layer,
        }
        for index, layer in layers.items()
    }
    return {
        index: {
            name: torch.tensor(norm_of(part) * before_clipping)
            for name, part in named.items()
            if part is not None
        }
        for index, named in parts.items()
    }


def norm_of(module: nn.Module) -> float:
    """Of the gradient that a module's parameters hold; 0 if they hold none."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not gradients:
        return 0.0
    norm = get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def layer_means(figures: dict[int, Figures]) -> dict[str, float]:
    """What the loggers get: means over heads, where there is one."""
    means = {
        f"probe/layer_{index}/{name}": values.nanmean().item()
        for index, named in figures.items()
        for name, values in named.items()
        if not name.startswith(ONLY_IN_TABLE)
    }
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def rows_of(step: int, figures: dict[int, Figures]) -> list[Row]:
    """A row a layer and head; empty where there is no figure."""
    rows = []
    for index, named in figures.items():
        heads = max(len(values) for values in named.values() if values.ndim)
        for head in range(heads):
            row = {"step": str(step), "layer": str(index), "head": str(head)}
            for name, values in named.items():
                value = values.expand(heads)[head].item()
                row |= {name: f"{value:.6g}"} if math.isfinite(value) else {}
            rows.append(row)
    return rows
