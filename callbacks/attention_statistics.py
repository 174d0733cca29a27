"""How much each NSA layer uses its branches: mean gates, and where selected blocks lie."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn

from callbacks.every_n_steps import EveryNSteps, aside, log_metrics
from nsa import blocks
from nsa.attention import SparseAttention
from nsa.config import NSAConfig
from nsa.transformer import sparse_layers
from runs.folder import leaves_files, replacing, run_folder

BRANCHES = ("compressed", "selected", "sliding")


class AttentionStatistics(EveryNSteps):
    """Logs attn/layer_<i>/gate_<branch> and attn/layer_<i>/free_selected_share every n steps.

    A gate is the mean over tokens and heads. A selected block is free if it is not forced and no
    token of it lies in the sliding window: what selection alone brings. The share is over all
    selected blocks; it is not logged where nothing is selected.

    The layers are looked at in an extra forward pass over the first sequences of the last
    micro-batch, apart from training: no gradients, no dropout, no random number of training's.
    At the end attention_gates.png shows the last gates by layer and branch.

    Args:
        every_n_steps: optimizer steps between looks.
        num_sequences: how many sequences of the micro-batch to look at.
    """

    def __init__(self, every_n_steps: int = 500, num_sequences: int = 1) -> None:
        super().__init__(every_n_steps)
        self.check_at_least(1, num_sequences=num_sequences)
        self.num_sequences = num_sequences
        self._gates: dict[int, list[float]] = {}  # layer -> mean gates in the order of BRANCHES

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        model: Any = pl_module.model
        metrics: dict[str, float] = {}
        told = {n: batch[n][: self.num_sequences] for n in ("document_starts",) if n in batch}
        handles = [
            layer.register_forward_pre_hook(partial(self._look, metrics, index), with_kwargs=True)
            for index, layer in sparse_layers(model).items()
        ]
        try:
            with aside(trainer, pl_module):
                model(batch["tokens"][: self.num_sequences, :-1].clamp(min=0), **told)
        finally:
            for handle in handles:
                handle.remove()
        if metrics:
            log_metrics(trainer, metrics)

    def _look(
        self,
        metrics: dict[str, float],
        index: int,
        layer: nn.Module,
        inputs: tuple[Tensor, ...],
        told: dict[str, Tensor],
    ) -> None:
        assert isinstance(layer, SparseAttention)
        starts = told.get("document_starts")
        found = layer.branches(inputs[0], document_starts=starts)
        self._gates[index] = found.gates.float().mean(dim=(0, 1, 2)).tolist()
        for branch, gate in zip(BRANCHES, self._gates[index], strict=True):
            metrics[f"attn/layer_{index}/gate_{branch}"] = gate
        selected = found.block_indices >= 0
        if selected.any():
            free = is_free(found.block_indices, layer.cfg, starts)
            share = free.sum() / selected.sum()
            metrics[f"attn/layer_{index}/free_selected_share"] = share.item()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._gates and leaves_files(trainer):
            with replacing(Path(run_folder(trainer), "attention_gates.png")) as draft:
                draw_gates(self._gates, trainer.global_step).savefig(draft, dpi=150)


def is_free(block_indices: Tensor, cfg: NSAConfig, document_starts: Tensor | None = None) -> Tensor:
    """[B, T, G, N] slots -> whether each holds a block that neither force nor window brings."""
    num_tokens, device = block_indices.shape[1], block_indices.device
    first = torch.arange(blocks.num_selection_blocks(num_tokens, cfg), device=device)
    first = first * cfg.selection_block_size
    last = (first + cfg.selection_block_size - 1).clamp(max=num_tokens - 1)
    t = torch.arange(num_tokens, device=device)[:, None]
    distance = torch.maximum(first - t, t - last)  # to the nearest token of the block
    beyond = distance >= cfg.sliding_window_size
    rank = blocks.priority(num_tokens, cfg, device, document_starts=document_starts)
    free = beyond & (rank == blocks.FREE)  # [T, S], or [B, T, S]
    of_heads = free.unsqueeze(-2).expand(*block_indices.shape[:-1], -1)
    return of_heads.gather(-1, block_indices.clamp(min=0).long()) & (block_indices >= 0)


def draw_gates(gates: dict[int, list[float]], step: int) -> Figure:
    """A heat map of the mean gates: a row a layer, a column a branch."""
    layers = sorted(gates)
    figure = Figure(figsize=(4.6, 1.2 + 0.42 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        [gates[layer] for layer in layers], vmin=0, vmax=1, cmap="viridis", aspect="auto"
    )
    for row, layer in enumerate(layers):
        for column, gate in enumerate(gates[layer]):
            colour = "white" if gate < 0.6 else "black"
            axes.text(column, row, f"{gate:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(BRANCHES)), BRANCHES)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_title(f"mean gate after {step} steps", fontsize=11)
    figure.colorbar(image, ax=axes)
    return figure
