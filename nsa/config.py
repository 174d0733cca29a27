"""The sizes that define Native Sparse Attention (arXiv 2502.11089, section 3).

They are checked once, here; whoever is given an `NSAConfig` can rely on it.
"""

from dataclasses import dataclass

from nsa.importance import RULES, Rule


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Sizes in tokens or blocks, the paper's by default. Impossible ones raise ValueError."""

    sliding_window_size: int = 512  # w, keys a query sees in the window, its own included
    compress_block_size: int = 32  # l, tokens folded into one compressed key
    compress_block_sliding_stride: int = 16  # d, tokens between the starts of neighbouring blocks
    selection_block_size: int = 64  # l', tokens in one selectable block
    num_selected_blocks: int = 16  # n, blocks a query keeps, forced ones included; 0: branch off
    num_initial_blocks: int = 1  # forced: the first blocks of the sequence
    num_local_blocks: int = 2  # forced: the query's own block and those just before it
    causal: bool = True
    importance: str | Rule = "probability_sum"  # a name in RULES (eq. 8-10), or one's own rule

    def __post_init__(self) -> None:
        for name, least in (
            ("sliding_window_size", 1),  # a query always sees itself
            ("compress_block_size", 1),
            ("compress_block_sliding_stride", 1),
            ("selection_block_size", 1),
            ("num_selected_blocks", 0),
            ("num_initial_blocks", 0),
            ("num_local_blocks", 1),  # a query's own block is always among its candidates
        ):
            self._check_at_least(name, least)
        self._check_at_most("compress_block_sliding_stride", "compress_block_size")
        self._check_at_most("compress_block_size", "selection_block_size")
        d, selection = self.compress_block_sliding_stride, self.selection_block_size
        if selection % d:
            raise ValueError(
                f"selection_block_size={selection} must be a multiple of "
                f"compress_block_sliding_stride={d}: choose a stride that divides it"
            )
        if not callable(self.importance) and self.importance not in RULES:
            raise ValueError(
                f"importance={self.importance!r} is unknown: choose one of {', '.join(RULES)}, or "
                "pass a function of the form that nsa.importance describes"
            )

    def _check_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be a whole number")
        if value < least:
            off = "; 0 turns the selected branch off" if name == "num_selected_blocks" else ""
            raise ValueError(f"{name}={value} must be at least {least}{off}")

    def _check_at_most(self, name: str, bound: str) -> None:
        if getattr(self, name) > getattr(self, bound):
            raise ValueError(
                f"{name}={getattr(self, name)} must be at most {bound}={getattr(self, bound)}: "
                f"lower {name} or raise {bound}"
            )
