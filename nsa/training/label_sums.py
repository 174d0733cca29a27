"""What a model scores on the labels of a batch, as sums, so that means over a split are exact.

Letters: B batch, T tokens, M model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Int, Num
from torch import Tensor

from nsa.training.linear_cross_entropy import linear_cross_entropy

NOT_SCORED = -1  # a label
CHUNKED_FROM = 4096  # V: smaller vocabularies have few logits, and plain cross-entropy is as fast
AUTO = "auto"


class LabelSums(NamedTuple):
    """Sums over the scored labels of one batch, or of many."""

    nats: Num[Tensor, ""]  # cross-entropy, in float32
    labels: Num[Tensor, ""]  # how many are scored
    correct: Num[Tensor, ""] | None = None  # how many the model predicts, where counted


def label_sums(
    model: Callable[..., Tensor],
    tokens: Int[Tensor, "B T1"],
    scored: Bool[Tensor, "B T"] | None = None,
    *,
    counts_correct: bool = False,
    cross_entropy: str = "plain",
) -> LabelSums:
    """What a model scores on the labels of a batch that are `scored` (None: all) and not −1.

    The input is `tokens` also where a label is not scored; −1 may stand at the end of a row only.
    `cross_entropy` is one of `CROSS_ENTROPIES`; all but "plain" need a `Transformer`.
    """
    labels = tokens[:, 1:]
    if scored is not None:
        labels = labels.masked_fill(~scored, NOT_SCORED)
    compute = CROSS_ENTROPIES[cross_entropy]
    nats, correct = compute(model, tokens[:, :-1].clamp(min=0), labels, counts_correct)
    return LabelSums(nats, (labels != NOT_SCORED).sum(), correct)


def plain(
    model: Callable[..., Tensor], ids: Tensor, labels: Tensor, counts_correct: bool
) -> tuple[Tensor, Tensor | None]:
    """By the logits of all labels, [B T V]."""
    logits = model(ids)
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NOT_SCORED, reduction="sum"
    )
    return nats, (logits.argmax(dim=-1) == labels).sum() if counts_correct else None


def chunked(
    model: Any, ids: Tensor, labels: Tensor, counts_correct: bool
) -> tuple[Tensor, Tensor | None]:
    """By the logits of some labels after the others."""
    hidden = model(ids, return_hidden=True).flatten(0, 1)
    return linear_cross_entropy(
        hidden, model.head.weight, labels.flatten(), counts_correct=counts_correct
    )


CROSS_ENTROPIES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "plain": plain,
    "chunked": chunked,
}


def resolve_cross_entropy(name: str, vocab_size: int) -> str:
    """What `auto` means: chunks where the vocabulary is large.

    Raises:
        ValueError: for another name than `auto` and those of `CROSS_ENTROPIES`.
    """
    if name == AUTO:
        return "chunked" if vocab_size >= CHUNKED_FROM else "plain"
    if name not in CROSS_ENTROPIES:
        names = ", ".join([AUTO, *CROSS_ENTROPIES])
        raise ValueError(f"cross_entropy={name} must be one of {names}")
    return name
