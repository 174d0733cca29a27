"""What a step leaves behind whose loss or gradient is not finite: nothing, on any rank."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer


def breaking_its_gradient(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss as it is; one that is not finite makes every gradient it reaches NaN.

    An infinite loss may have finite gradients. So the norm of the gradients, which are those of all
    ranks, tells of any rank's broken loss, and no flag has to be exchanged.
    """
    return loss * (1 + 0 * loss.detach())  # 0 · inf = 0 · NaN = NaN


def skip_if_broken(optimizer: Optimizer, grad_norm: Float[Tensor, ""]) -> None:
    """Let the coming `optimizer.step` change nothing if the norm over all gradients is not finite.

    Weights, moments and step counts stay as they are. To be called before every step. A fused
    optimizer reads the answer on the device; for any other the host has to look, and waits.
    """
    broken = ~torch.isfinite(grad_norm)
    # Of the groups, which a checkpoint restores where a run goes on.
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
    elif broken:
        optimizer.zero_grad()  # a parameter without a gradient is passed over
