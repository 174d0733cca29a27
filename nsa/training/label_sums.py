"""What a model scores on the labels of a batch, as sums, so that means over a split are exact.

Letters: B batch, T tokens, M model width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
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
    # Of one batch, without gradients:
    of_rows: Num[Tensor, "B 2"] | None = None  # nats and labels of each row
    of_each: Float[Tensor, "B T"] | None = None  # nats of each label, 0 where it is not scored
    scored: Bool[Tensor, "B T"] | None = None  # which labels are


def label_sums(
    model: Callable[..., Tensor],
    tokens: Int[Tensor, "B T1"],
    scored: Bool[Tensor, "B T"] | None = None,
    *,
    document_starts: Int[Tensor, "B T"] | None = None,
    counts_correct: bool = False,
    cross_entropy: str = "plain",
) -> LabelSums:
    """What a model scores on the labels of a batch that are `scored` (None: all) and not −1.

    The input is `tokens` also where a label is not scored. −1 may stand at the end of a row, or of
    a document where `document_starts` tells them apart (`nsa.documents`). `cross_entropy` is one of
    `CROSS_ENTROPIES`; all but "plain" need a `Transformer`.
    """
    labels = tokens[:, 1:]
    if scored is not None:
        labels = labels.masked_fill(~scored, NOT_SCORED)
    ids = tokens[:, :-1].clamp(min=0)
    told = {} if document_starts is None else {"document_starts": document_starts}
    compute = CROSS_ENTROPIES[cross_entropy]
    nats, of_each, correct = compute(partial(model, ids, **told), labels, counts_correct)
    counted, of_each = labels != NOT_SCORED, of_each.detach()
    of_rows = torch.stack([of_each.sum(dim=1), counted.sum(dim=1)], dim=1)
    return LabelSums(nats, counted.sum(), correct, of_rows, of_each, counted)


Nats = tuple[Tensor, Float[Tensor, "B T"], Tensor | None]  # summed; of each label; correct ones


def plain(model: partial[Tensor], labels: Int[Tensor, "B T"], counts_correct: bool) -> Nats:
    """By the logits of all labels, [B T V]."""
    logits = model()
    of_each = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NOT_SCORED, reduction="none"
    ).view_as(labels)
    correct = (logits.argmax(dim=-1) == labels).sum() if counts_correct else None
    return of_each.sum(), of_each, correct


def chunked(model: partial[Tensor], labels: Int[Tensor, "B T"], counts_correct: bool) -> Nats:
    """By the logits of some labels after the others."""
    hidden = model(return_hidden=True).flatten(0, 1)
    weight = cast(Any, model.func).head.weight  # now: FSDP gathers it in the forward pass
    nats, of_each, correct = linear_cross_entropy(
        hidden, weight, labels.flatten(), counts_correct=counts_correct
    )
    return nats, of_each.view_as(labels), correct


CROSS_ENTROPIES: dict[str, Callable[..., Nats]] = {
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
