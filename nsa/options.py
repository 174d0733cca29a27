"""Which options of `SparseAttention` go together, and what they come to."""

import logging
from collections.abc import Mapping
from functools import cache

from torch import nn

from nsa.importance import RULES, Rule
from nsa.plugins import Spec, find

log = logging.getLogger(__name__)


def importance_rule(importance: Spec) -> str | Rule:
    """A built-in rule stays a name, by which backends know it; one's own becomes a function."""
    if isinstance(importance, str):
        return importance
    if isinstance(importance, Mapping) and set(importance) == {"name"}:
        return importance["name"]
    return importance if callable(importance) else find("importance", importance, RULES)


def kv_layout(kv_per_branch: bool, compressed_output: bool, selects: bool) -> tuple[int, ...]:
    """The place in `to_kv`'s output of each of k_cmp, v_cmp, k_slc, v_slc, k_win, v_win.

    Keys or values that nothing reads share the place of others: a parameter that no loss reaches
    would stop distributed training.
    """
    if not kv_per_branch:
        return (0, 1) * 3
    compressed = (0, 1) if compressed_output else (0, 0)
    first = max(compressed) + 1
    selected = (first, first + 1)
    sliding = (first + 2, first + 3) if selects else selected
    return (*compressed, *selected, *sliding)


def check_scores_can_learn(
    phi: nn.Module,
    *,
    num_selected_blocks: int,
    use_diff_topk: bool,
    kv_per_branch: bool,
    num_memories: int,
) -> None:
    """Without the compressed output something else must train the scores that select blocks."""
    if not num_selected_blocks:
        raise ValueError(
            "compressed_output=False with num_selected_blocks=0 leaves only the window: "
            "use WindowAttention"
        )
    if num_memories:
        raise ValueError(
            f"num_compressed_mem_kv={num_memories} needs compressed_output=True: memory keys and "
            f"values are read by the compressed branch alone"
        )
    has_parameters = next(phi.parameters(), None) is not None
    if not use_diff_topk and (kv_per_branch or has_parameters):
        raise ValueError(
            "compressed_output=False leaves nothing to train the scores that select blocks: "
            "use use_diff_topk=True, or kv_per_branch=False with a compress_mlp without "
            "parameters (MeanPool)"
        )


def warn_if_phi_is_large(layer: nn.Module, networks: list[nn.Module]) -> None:
    """Say once if φ, whose copies are `networks`, has more parameters than the rest of a layer."""
    whole = sum(p.numel() for p in layer.parameters())
    phi = sum(p.numel() for network in networks for p in network.parameters())
    if 2 * phi > whole:
        _warn_once(
            f"φ ({type(networks[0]).__name__}, for keys and for values) has "
            f"{phi:,} of this layer's {whole:,} parameters ({phi / whole:.0%}): "
            "compress_mlp=AttentionPool(dim_head, compress_block_size), MeanPool(), or a small "
            "compress_mlp_expand_factor are lighter"
        )


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
