"""Importance rules: how much each selection block matters to a query, by its compressed scores.

A rule is given, for the R query heads that make each of J choices together,

    scores   [B J R T C]  q.k / sqrt(D) against the compressed keys, in float32 or better
    lse      [B J R T]    the log of the sum of exponents of what each query sees
    visible  [#B 1 1 T C] which compressed blocks each query sees; broadcasts to the scores
    overlap  [C S]        what a compressed and a selection block share, in strides (eq. 9)

and returns [B J T S]. It must be differentiable in scores and lse, and ignore what is not visible.
"""

from collections.abc import Callable

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

Rule = Callable[..., Tensor]


def probability_sum(
    scores: Float[Tensor, "B J R T C"],
    lse: Float[Tensor, "B J R T"],
    visible: Bool[Tensor, "#B 1 1 T C"],
    overlap: Float[Tensor, "C S"],
) -> Float[Tensor, "B J T S"]:
    """Compressed probabilities (eq. 8), summed over the heads (eq. 10) and spread (eq. 9)."""
    p_cmp = (scores - lse[..., None]).masked_fill(~visible, float("-inf")).exp()
    return reduce(p_cmp, "B J R T C -> B J T C", "sum") @ overlap


def logit_mean(
    scores: Float[Tensor, "B J R T C"],
    lse: Float[Tensor, "B J R T"],
    visible: Bool[Tensor, "#B 1 1 T C"],
    overlap: Float[Tensor, "C S"],
) -> Float[Tensor, "B J T S"]:
    """The mean over the heads of the mean score of the visible blocks that overlap.

    For comparison: the rule of native-sparse-attention-pytorch, with eq. 9's overlaps as weights.
    The lowest finite number where no visible block overlaps.
    """
    visible = visible[:, 0]
    weight = visible.to(scores) @ overlap  # [#B 1 T S], in strides
    total = (reduce(scores, "B J R T C -> B J T C", "mean") * visible) @ overlap
    mean = total / weight.masked_fill(weight == 0, 1.0)
    return mean.masked_fill(weight == 0, torch.finfo(scores.dtype).min)


RULES: dict[str, Rule] = {"probability_sum": probability_sum, "logit_mean": logit_mean}
