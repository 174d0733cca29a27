"""The gates that weigh the branches (eq. 5): the network of their logits, and what it gives."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def split_gates(logits: Float[Tensor, "*B L"], heads: int) -> Float[Tensor, "*B H 3"]:
    """Raises ValueError if there are not three logits a head."""
    if logits.shape[-1] != 3 * heads:
        raise ValueError(
            f"strategy_combine_mlp gives {logits.shape[-1]} numbers a token: it must give "
            f"3 * heads = {3 * heads}, the branches of a head side by side"
        )
    return logits.unflatten(-1, (heads, 3))


def gate_network(
    dim: int, heads: int, gate_bias: float | Sequence[float], network: nn.Module | None
) -> nn.Module:
    """From tokens to gate logits; None: linear, its weight 0, so that gates start at the bias."""
    bias = [gate_bias] * 3 if isinstance(gate_bias, int | float) else list(gate_bias)
    if len(bias) != 3 or not all(isinstance(number, int | float) for number in bias):
        raise ValueError(
            f"gate_bias={bias} must be one number, or three: compressed, selected, sliding"
        )
    if network is not None:
        if any(bias):
            raise ValueError(
                f"gate_bias={bias} is for the built-in gates: a strategy_combine_mlp brings its own"
            )
        return network
    gates = zero_linear(dim, 3 * heads)
    with torch.no_grad():
        for branch, number in enumerate(bias):
            gates.bias[branch::3] = number
    return gates


def zero_linear(dim_in: int, dim_out: int) -> nn.Linear:
    """Gives 0 at the start, whatever comes in."""
    linear = nn.Linear(dim_in, dim_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
