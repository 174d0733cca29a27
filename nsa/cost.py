"""What a Transformer costs: the keys that a query reads, and floating-point operations a token."""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from nsa.transformer_block import Block


def visible_tokens(blocks: Sequence[Block], num_tokens: int) -> float:
    """Keys that the last of `num_tokens` queries reads, summed over branches (eq. 6).

    The mean over a model's blocks.
    """
    counts = [block.attention.keys_per_query(num_tokens) for block in blocks]
    return sum(int(keys[-1]) for layer in counts for keys in layer.values()) / len(counts)


def training_flops(blocks: Sequence[Block], head: nn.Linear, num_tokens: int) -> dict[str, float]:
    """Floating-point operations a token costs in training, forward and backward.

    A product of m×k and k×n counts 2mkn; the backward pass counts twice the forward one; what
    kernels recompute does not count. By what they are spent on: `linear` (projections,
    feed-forward, head), `compress` (φ), and each branch's attention by name, averaged over the
    queries of a sequence of `num_tokens`.
    """
    forward: defaultdict[str, float] = defaultdict(float)
    forward["linear"] = 2.0 * head.weight.numel()
    for block in blocks:
        attention = block.attention
        linears = [block.feed_forward.to_hidden, block.feed_forward.to_out]
        linears += [m for m in attention.children() if isinstance(m, nn.Linear)]
        forward["linear"] += sum(2 * linear.weight.numel() for linear in linears)
        forward["compress"] += attention.compress_flops(num_tokens) / num_tokens
        for branch, keys in attention.keys_per_query(num_tokens).items():
            pair = 4 * attention.heads * attention.dim_head  # q·k and p·v
            forward[branch] += pair * float(keys.double().mean())
    return {name: 3.0 * flops for name, flops in forward.items() if flops}
