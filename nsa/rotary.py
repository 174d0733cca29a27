"""Rotary position embedding (arXiv 2104.09864): queries and keys turn by an angle a position.

A model reads sequences longer than those it was trained on if its pairs turn slower: `SCALINGS`,
the formulas of transformers' `modeling_rope_utils`.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Device = torch.device | str | None


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): every pair turns `factor` times slower."""

    factor: float
    key_scale: ClassVar[float] = 1.0

    def slowing(self, dim_head: int, base: float, device: Device) -> Float[Tensor, " half"]:
        """What multiplies the frequency of each pair."""
        return torch.full((dim_head // 2,), 1 / self.factor, device=device)


@dataclass(frozen=True)
class NTKScaling:
    """A larger base, base · factor^(D / (D − 2)): "NTK-aware".

    The first pair turns as before, the last `factor` times slower. It is transformers' dynamic
    scaling held at one length, as cached keys cannot turn again when a sequence grows.
    """

    factor: float
    key_scale: ClassVar[float] = 1.0

    def slowing(self, dim_head: int, base: float, device: Device) -> Float[Tensor, " half"]:
        """See `LinearScaling.slowing`."""
        return self.factor ** torch.linspace(0, -1, dim_head // 2, device=device)


@dataclass(frozen=True)
class YaRNScaling:
    """YaRN (arXiv 2309.00071): slow pairs are interpolated, fast ones are left alone.

    Args:
        factor: how many times longer sequences become.
        original_seq_len: T of the training before.
        beta_fast, beta_slow: pairs with more turns than `beta_fast` in `original_seq_len` tokens
            stay as they are, pairs with fewer than `beta_slow` turn `factor` times slower.
        attention_factor: multiplies rotated queries and rotated keys; None is 0.1 ln(factor) + 1.
    """

    factor: float
    original_seq_len: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.original_seq_len <= 2 * math.pi * self.beta_slow:
            raise ValueError(
                f"rope_scaling: original_seq_len={self.original_seq_len:g} must be above 2π · "
                f"beta_slow={2 * math.pi * self.beta_slow:.2f}: even the first pair needs that "
                "many tokens for beta_slow turns"
            )
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"rope_scaling: beta_fast={self.beta_fast:g} must be above "
                f"beta_slow={self.beta_slow:g}"
            )

    @property
    def key_scale(self) -> float:
        """The scale of queries times that of keys, so that keys alone can carry it."""
        scale = self.attention_factor
        return (0.1 * math.log(self.factor) + 1 if scale is None else scale) ** 2

    def slowing(self, dim_head: int, base: float, device: Device) -> Float[Tensor, " half"]:
        """See `LinearScaling.slowing`."""

        def pair_that_turns(times: float) -> float:
            tokens_a_radian = self.original_seq_len / (times * 2 * math.pi)
            return dim_head * math.log(tokens_a_radian) / (2 * math.log(base))

        first = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        last = max(min(math.ceil(pair_that_turns(self.beta_slow)), dim_head - 1), first)
        pairs = torch.arange(dim_head // 2, device=device, dtype=torch.float32)
        # Where both bounds are one pair, the ramp is a step.
        ramp = ((pairs - first) / (0.001 if first == last else last - first)).clamp(0, 1)
        return 1 - ramp + ramp / self.factor


Scaling = LinearScaling | NTKScaling | YaRNScaling
SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "ntk": NTKScaling,
    "yarn": YaRNScaling,
}


def find_scaling(spec: Mapping[str, Any] | None) -> Scaling | None:
    """The scaling that {type: yarn, factor: 4, …} names; None for None.

    Raises:
        ValueError: for an unknown type, an option that it lacks or needs, and a value out of range.
    """
    if spec is None:
        return None
    if not isinstance(spec, Mapping) or spec.get("type") not in SCALINGS:
        raise ValueError(
            f"rope_scaling={spec} must be null, or have a type: one of {', '.join(SCALINGS)}, as "
            "in {type: linear, factor: 4}"
        )
    given = {name: value for name, value in spec.items() if name != "type"}
    kind = SCALINGS[spec["type"]]
    options = {field.name: field.default for field in fields(kind)}
    unknown = [name for name in given if name not in options]
    missing = [name for name in options if options[name] is MISSING and name not in given]
    for problem, names in (("takes no", unknown), ("needs", missing)):
        if names:
            raise ValueError(
                f"rope_scaling: {spec['type']} {problem} {', '.join(names)}; it takes "
                f"{', '.join(options)}"
            )
    unset = [name for name in given if given[name] is None and options[name] is None]
    return kind(**{name: number(name, given[name]) for name in given if name not in unset})


def number(name: str, value: Any) -> float:
    """The value of an option of a scaling. Raises ValueError if it is out of range."""
    least = 1 if name in ("factor", "original_seq_len") else 0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < least or value == 0:
        rule = "a number of at least 1" if least else "a number above 0"
        raise ValueError(f"rope_scaling: {name}={value!r} must be {rule}")
    return float(value)


@dataclass(frozen=True)
class Rotary:
    """How the positions of a layer turn its heads.

    Angles are computed afresh, always in float32, and not kept in a buffer, so that no cast of a
    model rounds them.
    """

    dim_head: int
    base: float = 10_000.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"rope_base={self.base} must be above 1")

    def frequencies(self, device: Device = None) -> Float[Tensor, " half"]:
        """By how much a position turns each pair, in radians."""
        minus_pairs = torch.arange(0, -self.dim_head, -2, device=device, dtype=torch.float32)
        frequencies = self.base ** (minus_pairs / self.dim_head)
        if self.scaling is None:
            return frequencies
        return frequencies * self.scaling.slowing(self.dim_head, self.base, device)

    def angles(
        self,
        num_tokens: int,
        device: Device = None,
        document_starts: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "*B T half"]:
        """Angles in radians of positions 0, 1, …, which begin anew with each document."""
        positions = torch.arange(num_tokens, device=device)
        if document_starts is not None:
            positions = positions - document_starts
        return self.angles_at(positions)

    def angles_at(self, positions: Int[Tensor, "*B T"]) -> Float[Tensor, "*B T half"]:
        """Angles in radians of any positions."""
        return positions.float()[..., None] * self.frequencies(positions.device)

    def scale(self, k: Float[Tensor, "*B G D"]) -> Float[Tensor, "*B G D"]:
        """Keys that are going to turn, times what a scaling multiplies scores by.

        It commutes with the rotation, so no kernel that rotates needs to know of it.
        """
        scale = 1.0 if self.scaling is None else self.scaling.key_scale
        return k if scale == 1 else k * scale


@lru_cache
def frequencies(rotary: Rotary, device: Device = None) -> Float[Tensor, " half"]:
    """`Rotary.frequencies`, kept: a step of decoding has no time to compute them in every layer."""
    return rotary.frequencies(device)


def rotate(
    x: Float[Tensor, "B T H D"], angles: Float[Tensor, "*B T half"]
) -> Float[Tensor, "B T H D"]:
    """Turn the pairs (x[i], x[i + D/2]), in float32 or better; the result has the dtype of x."""
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
