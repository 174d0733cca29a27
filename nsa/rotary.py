"""Rotary position embedding (arXiv 2104.09864): queries and keys turn by an angle a position."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_angles(
    num_tokens: int,
    dim_head: int,
    *,
    base: float = 10_000.0,
    device: torch.device | str | None = None,
) -> Float[Tensor, "T half"]:
    """Angles in radians of positions 0, 1, …; always float32.

    Computed afresh, not kept in a buffer, so that no cast of a model rounds them.
    """
    positions = torch.arange(num_tokens, device=device, dtype=torch.float32)
    return positions[:, None] * rotary_frequencies(dim_head, base=base, device=device)


def angles_at(
    positions: Int[Tensor, "*B T"], dim_head: int, *, base: float = 10_000.0
) -> Float[Tensor, "*B T half"]:
    """`rotary_angles` of any positions."""
    frequencies = rotary_frequencies(dim_head, base=base, device=positions.device)
    return positions.float()[..., None] * frequencies


def rotary_frequencies(
    dim_head: int, *, base: float = 10_000.0, device: torch.device | str | None = None
) -> Float[Tensor, " half"]:
    """By how much a position turns each pair, in radians; always float32."""
    minus_pairs = torch.arange(0, -dim_head, -2, device=device, dtype=torch.float32)
    return base ** (minus_pairs / dim_head)


def rotate(
    x: Float[Tensor, "B T H D"], angles: Float[Tensor, "*B T half"]
) -> Float[Tensor, "B T H D"]:
    """Turn the pairs (x[i], x[i + D/2]), in float32 or better; the result has the dtype of x."""
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
