"""What a model scores on the labels of a batch, as sums, so that means over a split are exact.

Letters: B batch, T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Int, Num
from torch import Tensor

NOT_SCORED = -1  # a label


class LabelSums(NamedTuple):
    """Sums over the scored labels of one batch, or of many."""

    nats: Num[Tensor, ""]  # cross-entropy, in float32
    labels: Num[Tensor, ""]  # how many are scored
    correct: Num[Tensor, ""] | None = None  # how many the model predicts, where counted


def label_sums(
    model: Callable[[Tensor], Tensor],
    tokens: Int[Tensor, "B T1"],
    scored: Bool[Tensor, "B T"] | None = None,
    *,
    counts_correct: bool = False,
) -> LabelSums:
    """What a model scores on the labels of a batch that are `scored` (None: all) and not −1.

    The input is `tokens` also where a label is not scored; −1 may stand at the end of a row only.
    """
    labels = tokens[:, 1:]
    if scored is not None:
        labels = labels.masked_fill(~scored, NOT_SCORED)
    logits = model(tokens[:, :-1].clamp(min=0))
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NOT_SCORED, reduction="sum"
    )
    correct = (logits.argmax(dim=-1) == labels).sum() if counts_correct else None
    return LabelSums(nats, (labels != NOT_SCORED).sum(), correct)
