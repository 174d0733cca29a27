"""A step learns from the mean over all its labels, however micro-batches and ranks divide them.

Where a batch says which labels are `scored`, micro-batches may have different numbers of them: a
mean of their means would hang on how a step is divided, and so on a GPU's memory. So a micro-batch
learns from its mean times the share of its positions that are scored, and before the update the
gradients are divided by this share of the whole step. What sums gradients in between, over
micro-batches or ranks, takes plain means.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def positions_of(batch: dict[str, Tensor]) -> int | None:
    """How many labels a micro-batch could have; None where it does not say which are scored."""
    return batch["tokens"][:, 1:].numel() if "scored" in batch else None


def weighed(
    loss: Float[Tensor, ""], labels: Float[Tensor, ""], batch: dict[str, Tensor]
) -> Float[Tensor, ""]:
    """A micro-batch's mean over its `labels`, as it counts in a step."""
    positions = positions_of(batch)
    return loss if positions is None else loss * (labels / positions)


def divide_by_share(
    parameters: Iterable[nn.Parameter], labels: Float[Tensor, ""], positions: int
) -> None:
    """Gradients of `weighed` losses become those of the mean over the step's labels.

    Args:
        labels: of all micro-batches and ranks; if there are none, gradients become NaN.
        positions: likewise.
    """
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    mine = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    torch._foreach_mul_(mine, positions / labels)  # type: ignore[attr-defined]
