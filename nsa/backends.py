"""The backends: who computes each op, what each backend covers, and how one is chosen.

reference  `nsa.reference` and nothing else: the paper in plain PyTorch, dense masks
torch      the same, but the window by the local-attention library and block means without
           stored windows: portable, and what "auto" takes where there is no GPU for Triton
flex       `torch`, with FlexAttention for the selected and the sliding branch
triton     our kernels
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from nsa import flex, local, pooling, reference
from nsa.importance import Rule
from nsa.plugins import label


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of every op, and what it covers beyond the defaults of a layer.

    What is not declared here counts as not covered: a new option has to be added here, too.

    Args:
        gated_attention: the branches and their sum in one op; None if it has no such op.
        append_token, append_block, cached_attention: one step of decoding (`nsa.decoding`); None
            for all three decodes in plain torch.
        importances: the names of the rules it has; None for any rule, one's own included.
        covers: options, spelled as one sets them in `SparseAttention` or in its `forward`.
        reasons: why it lacks an option, for the message that refuses it.
    """

    block_means: Callable[..., Tensor]
    attention_pool: Callable[..., Tensor]
    compressed_attention: Callable[..., tuple[Tensor, Tensor]]
    select_blocks: Callable[..., Tensor]
    selected_importance: Callable[..., Tensor]
    selected_attention: Callable[..., Tensor]
    sliding_window_attention: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    gated_attention: Callable[..., Tensor] | None = None
    append_token: Callable[..., tuple[Tensor, list[Tensor]]] | None = None
    append_block: Callable[..., None] | None = None
    cached_attention: Callable[..., tuple[Tensor, Tensor]] | None = None
    importances: frozenset[str] | None = None
    covers: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)


OPTIONS = frozenset(
    {
        "causal=False",
        "document_starts",
        "num_compressed_mem_kv",
        "query_heads_share_selected_kv=False",
        "use_diff_topk=True",
    }
)

REFERENCE = Backend(
    block_means=reference.block_means,
    attention_pool=reference.attention_pool,
    compressed_attention=reference.compressed_attention,
    select_blocks=reference.select_blocks,
    selected_importance=reference.selected_importance,
    selected_attention=reference.selected_attention,
    sliding_window_attention=reference.sliding_window_attention,
    combine=reference.combine,
    rotate=reference.rotate,
    covers=OPTIONS,
)
TORCH = replace(
    REFERENCE,
    block_means=pooling.block_means,
    attention_pool=pooling.attention_pool,
    sliding_window_attention=local.sliding_window_attention,
)
FLEX = replace(
    TORCH,
    selected_attention=flex.selected_attention,
    sliding_window_attention=flex.sliding_window_attention,
    covers=OPTIONS - {"use_diff_topk=True"},
    reasons={"use_diff_topk=True": "FlexAttention's scores take no gates that carry a gradient"},
)

BACKENDS = {"reference": REFERENCE, "torch": TORCH, "flex": FLEX}

if find_spec("triton"):
    from nsa import kernels

    BACKENDS["triton"] = Backend(
        block_means=kernels.block_means,
        attention_pool=kernels.attention_pool,
        compressed_attention=kernels.compressed_attention,
        select_blocks=kernels.select_blocks,
        selected_importance=kernels.selected_importance,
        selected_attention=kernels.selected_attention,
        sliding_window_attention=kernels.sliding_window_attention,
        combine=kernels.combine,
        rotate=kernels.rotate,
        gated_attention=kernels.gated_attention,
        append_token=kernels.append_token,
        append_block=kernels.append_block,
        cached_attention=kernels.cached_attention,
        importances=frozenset({"probability_sum", "logit_mean"}),
        covers=OPTIONS,
    )


def resolve_backend(
    backend: str, *, options: Iterable[str] = (), importance: str | Rule = "probability_sum"
) -> str:
    """The name of the backend a module will use, decided once, at construction.

    "auto" is "triton" where Triton and a CUDA device of compute capability 8.0 or newer are
    available, else "torch".

    Args:
        options: those of `Backend.covers` that the module needs.
        importance: its importance rule.

    Raises:
        ValueError: for an unknown name, for a backend that cannot run here, and, by name, for an
            option or a rule that the backend lacks.
    """
    name = backend
    if backend == "auto":
        name = "triton" if "triton" in BACKENDS and _gpu_for_triton() else "torch"
    if name not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}"
        )
    if name == "triton" and not (_gpu_for_triton() or interpreted()):
        raise ValueError(
            "backend='triton' needs a CUDA device of compute capability 8.0 or newer (or "
            "TRITON_INTERPRET=1, for tests): use backend='torch', or 'auto'"
        )
    for option in options:
        check_option(name, option)
    check_importance(name, importance)
    return name


def check_option(backend: str, option: str) -> None:
    """Raises ValueError if the backend does not cover the option."""
    entry = BACKENDS[backend]
    if option not in entry.covers:
        reason = f": {entry.reasons[option]}" if option in entry.reasons else ""
        raise ValueError(
            f"backend={backend!r} does not cover {option}{reason}; {_way_out(backend)}, or leave "
            "the option out"
        )


def check_importance(backend: str, importance: str | Rule) -> None:
    """Raises ValueError if the backend does not have the rule."""
    covered = BACKENDS[backend].importances
    name = rule_name(importance)
    if covered is not None and name not in covered:
        raise ValueError(
            f"backend={backend!r} does not cover importance={name}: it has "
            f"{', '.join(sorted(covered))}; {_way_out(backend)}"
        )


def rule_name(importance: str | Rule) -> str:
    """A built-in rule's name, or the dotted path of one's own."""
    return importance if isinstance(importance, str) else label(importance)


def _way_out(backend: str) -> str:
    return "use backend='torch'" if backend != "torch" else "use backend='reference'"


def _gpu_for_triton() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"
