"""What is logged of the labels that a model scored: of a whole batch or split, and by corpus.

A datamodule here is one of `data`: it has a `metric`, `bytes_per_token(split)` and, where it mixes
corpora, `corpora` by their names. Letters: B rows of a batch, S totals.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.training.label_sums import LabelSums


def totals(
    sums: LabelSums, corpus: Int[Tensor, " B"] | None = None, num_corpora: int = 0
) -> Float[Tensor, " S"]:
    """Nats, labels and, where counted, correct ones; then nats and labels of each corpus.

    `corpus` says which of `num_corpora` each row is from. Without gradients; totals add up.
    """
    of_all = [sums.nats.detach(), sums.labels, *([] if sums.correct is None else [sums.correct])]
    found = torch.stack(of_all)
    if corpus is None or sums.of_rows is None:
        return found
    # Not index_add, which adds on a GPU in any order.
    from_corpus = corpus[:, None] == torch.arange(num_corpora, device=corpus.device)  # [B, K]
    of_corpora = torch.where(from_corpus[..., None], sums.of_rows[:, None], 0).sum(dim=0)
    return torch.cat([found, of_corpora.flatten()])


def counted(datamodule: Any) -> dict[str, Any]:
    """What `totals` are of, beside all labels."""
    metric = datamodule.metric
    return {"counts_correct": metric.counts_correct, "num_corpora": len(corpora_of(datamodule))}


def num_of_all(datamodule: Any) -> int:
    """How many of the totals are of all labels."""
    return 3 if datamodule.metric.counts_correct else 2


def num_totals(datamodule: Any) -> int:
    """S, of `totals`."""
    return num_of_all(datamodule) + 2 * len(corpora_of(datamodule))


def split_totals(totals: Tensor, datamodule: Any) -> tuple[Tensor, Tensor]:
    """`totals` [..., S], or rows of them, of all labels and of the corpora."""
    size = num_of_all(datamodule)
    return totals[..., :size], totals[..., size:]


def corpora_of(datamodule: Any) -> Mapping[str, Any]:
    """The corpora of a mixture by their names; none of another corpus."""
    return getattr(datamodule, "corpora", {})


def label_scores(
    split: str, loss: Tensor, correct: Tensor | None, datamodule: Any
) -> dict[str, Tensor | float]:
    """The loss of a split in nats a label, and the metric of the data; `correct` is a share."""
    metric = datamodule.metric
    value = metric.of(loss, correct, datamodule.bytes_per_token(split))
    return {f"{split}/loss": loss.float(), f"{split}/{metric.name}": value.float()}


def corpus_scores(split: str, totals: Tensor, datamodule: Any) -> dict[str, float]:
    """The same of each corpus that has scored labels, by its name."""
    found, name_of_metric = {}, datamodule.metric.name
    pairs = totals.view(-1, 2).tolist()
    for (name, corpus), (nats, labels) in zip(corpora_of(datamodule).items(), pairs, strict=True):
        if labels:
            loss = nats / labels
            value = datamodule.metric.of(loss, None, corpus.bytes_per_token(split))
            found |= {f"{split}/{name}/loss": loss, f"{split}/{name}/{name_of_metric}": value}
    return found


def split_scores(split: str, totals: Tensor, datamodule: Any) -> dict[str, Any]:
    """All that there is to say of a whole split, from the sum of its `totals`."""
    of_all, of_corpora = split_totals(totals, datamodule)
    correct = of_all[2] / of_all[1] if datamodule.metric.counts_correct else None
    found = label_scores(split, of_all[0] / of_all[1], correct, datamodule)
    return found | corpus_scores(split, of_corpora, datamodule)
