"""What training minimises, and the totals that are logged of it.

A micro-batch is a dict as `NSALightningModule` describes it. Letters: S totals.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.training import scores
from nsa.training.importance_loss import ImportanceLoss
from nsa.training.label_sums import label_sums
from nsa.training.label_weights import weighed
from nsa.transformer import Transformer

LossAndTotals = tuple[Float[Tensor, ""], Float[Tensor, " S"]]


class Losses:
    """Cross-entropy; and, beside it in training, the importance loss where it has a weight.

    Args:
        cross_entropy: of `label_sums.CROSS_ENTROPIES`.
    """

    def __init__(
        self, model: Transformer, cross_entropy: str, importance_loss: ImportanceLoss
    ) -> None:
        self.model, self.cross_entropy = model, cross_entropy
        self.importance_loss = importance_loss

    def evaluate(
        self,
        batch: dict[str, Tensor],
        *,
        counts_correct: bool = False,
        num_corpora: int = 0,
        **told: Any,
    ) -> LossAndTotals:
        """The mean over the scored labels, or 0, and `scores.totals`; the model is `told` more."""
        sums = label_sums(
            partial(self.model, **told),
            batch["tokens"],
            batch.get("scored"),
            document_starts=batch.get("document_starts"),
            counts_correct=counts_correct,
            cross_entropy=self.cross_entropy,
        )
        return sums.nats / sums.labels.clamp(min=1), scores.totals(
            sums, batch.get("corpus"), num_corpora
        )

    def learn(self, batch: dict[str, Tensor], **counted: Any) -> LossAndTotals:
        """The loss to learn from (`label_weights`). Where there is an importance loss, it is the
        last of the totals, unweighed.
        """
        if not self.importance_loss.weight:
            loss, found = self.evaluate(batch, **counted)
            return weighed(loss, found[1], batch), found
        inputs: list[Tensor] = []
        loss, found = self.evaluate(batch, layer_inputs=inputs, **counted)
        taught = self.importance_loss(inputs, batch.get("document_starts"))
        loss = weighed(loss + self.importance_loss.weight * taught, found[1], batch)
        return loss, torch.cat([found, taught.detach()[None]])

    def split_off(self, totals: Float[Tensor, "A S"]) -> tuple[Tensor, Float[Tensor, " A"] | None]:
        """From rows of `learn`'s totals: those of labels, and the importance losses."""
        if not self.importance_loss.weight:
            return totals, None
        return totals[:, :-1], totals[:, -1]
