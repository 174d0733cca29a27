"""Sparsity as a function of the step: NSA layers that begin denser than they end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from typing import Any

from nsa import blocks
from nsa.attention import SparseAttention
from nsa.config import NSAConfig
from nsa.transformer import Transformer

SIZES = ("num_selected_blocks", "sliding_window_size", "selection_block_size")  # n, w, l'
ALL = "all"  # blocks of a whole sequence
Stage = Mapping[str, Any]


class SparsitySchedule:
    """Sizes of a model's NSA layers in the stages of a run; after the last one they are their own.

    No parameter depends on them. Stages should be few: each compiles programs and records graphs
    of its own.

    Args:
        model: its NSA layers of that time give the sizes after the last stage.
        stages: each has `until`, the share of the run's steps at which it ends, and one or more of
            `SIZES`; the others are those of the model. `num_selected_blocks` may be "all". Layers
            that select nothing keep doing so.

    Raises:
        ValueError: for stages out of order, unknown sizes, and sizes that `NSAConfig` refuses.
    """

    def __init__(self, model: Transformer, stages: Sequence[Stage] | None) -> None:
        self.model, self.stages = model, list(stages or ())
        self.now: int | None = None  # the stage whose sizes the layers have; None: their own
        self.layers = {}
        if self.stages:
            check_stages(self.stages)
            layers = [block.attention for block in model.blocks]
            self.layers = {a: a.cfg for a in layers if isinstance(a, SparseAttention)}
        for layer, own in self.layers.items():  # documents begin where blocks of every stage do
            sizes = [self._sizes(own, stage).selection_block_size for stage in self.stages]
            layer.document_alignment = lcm(own.selection_block_size, *sizes)

    def set_stage(self, step: int, max_steps: int) -> bool:
        """Give the layers the sizes of the step that comes after `step` done ones; whether other
        ones than they had.
        """
        return self._set(self.stage_of(step, max_steps))

    @contextmanager
    def at(self, stage: int | None) -> Iterator[None]:
        """The layers have the sizes of a stage, of None their own; afterwards those of before."""
        before = self.now
        self._set(stage)
        try:
            yield
        finally:
            self._set(before)

    def densest(self) -> int | None:
        """The stage of the most work."""

        def flops(stage: int | None) -> float:
            with self.at(stage):
                return self.model.flops_per_token(self.model.seq_len)

        return max([None, *range(len(self.stages))], key=flops)

    def _set(self, stage: int | None) -> bool:
        changes, self.now = stage != self.now, stage
        if changes:
            for layer, own in self.layers.items():
                layer.cfg = own if stage is None else self._sizes(own, self.stages[stage])
        return changes

    def stage_of(self, step: int, max_steps: int) -> int | None:
        """The number of the stage; None after the last one."""
        ends = (stage["until"] * max_steps for stage in self.stages)
        return next((number for number, end in enumerate(ends) if step < end), None)

    def _sizes(self, own: NSAConfig, stage: Stage) -> NSAConfig:
        sizes = {name: stage[name] for name in SIZES if name in stage}
        if not own.num_selected_blocks:
            sizes.pop("num_selected_blocks", None)
        elif sizes.get("num_selected_blocks") == ALL:
            longest = replace(own, **sizes | {"num_selected_blocks": 1})
            sizes["num_selected_blocks"] = blocks.num_selection_blocks(self.model.seq_len, longest)
        return replace(own, **sizes)


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises ValueError unless stages end one after the other, and change something."""
    end = 0.0
    for stage in stages:
        about = f"sparsity_schedule: the stage {dict(stage)}"
        until = stage.get("until")
        if not isinstance(until, int | float) or not end < until < 1:
            raise ValueError(
                f"{about} needs `until`, the share of the steps at which it ends: above the one "
                f"before, {end:g}, and below 1"
            )
        end = until
        sizes = set(stage) - {"until"}
        if not sizes or sizes - set(SIZES):
            raise ValueError(f"{about} must set one or more of {', '.join(SIZES)}, and no more")
        if stage.get("num_selected_blocks") == 0:
            raise ValueError(f"{about}: num_selected_blocks must be at least 1, or {ALL}")
