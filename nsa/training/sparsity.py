"""Sparsity as a function of the step: NSA layers that begin denser than they end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from typing import Any

from nsa import blocks
from nsa.config import NSAConfig
from nsa.transformer import Transformer, sparse_layers

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
        self.model = model
        self.stages = [] if stages is None else checked_stages(stages)
        self.now: int | None = None  # the stage whose sizes the layers have; None: their own
        self.layers = {}
        if self.stages:
            self.layers = {layer: layer.cfg for layer in sparse_layers(model).values()}
            if not self.layers:
                raise ValueError("sparsity_schedule: no layer of the model is NSA: leave it out")
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
            longest = self._replaced(own, stage, sizes | {"num_selected_blocks": 1})
            sizes["num_selected_blocks"] = blocks.num_selection_blocks(self.model.seq_len, longest)
        return self._replaced(own, stage, sizes)

    def _replaced(self, own: NSAConfig, stage: Stage, sizes: Mapping[str, Any]) -> NSAConfig:
        try:
            return replace(own, **sizes)
        except ValueError as error:
            raise ValueError(f"{about(stage)}: {error}") from error


def about(stage: Stage) -> str:
    return f"sparsity_schedule: the stage {dict(stage)}"


def checked_stages(stages: Any) -> list[Stage]:
    """The stages, with sizes such as 1e3 made whole.

    Raises:
        ValueError: unless they are a list of stages that end one after the other, and each changes
            something.
    """
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        raise ValueError(
            f"sparsity_schedule={stages} must be a list of stages, as in "
            "[{until: 0.25, num_selected_blocks: all}]"
        )
    end = 0.0
    for stage in stages:
        until = stage.get("until")
        if isinstance(until, bool) or not isinstance(until, int | float) or not end < until < 1:
            raise ValueError(
                f"{about(stage)} needs `until`, the share of the steps at which it ends: above the "
                f"one before, {end:g}, and below 1"
            )
        end = until
        sizes = set(stage) - {"until"}
        if not sizes or sizes - set(SIZES):
            raise ValueError(
                f"{about(stage)} must set one or more of {', '.join(SIZES)}, and no more"
            )
        if stage.get("num_selected_blocks") == 0:
            raise ValueError(f"{about(stage)}: num_selected_blocks must be at least 1, or {ALL}")
    return [{name: whole(value) for name, value in stage.items()} for stage in stages]


def whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
