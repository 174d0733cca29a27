"""Random inputs for tests of kernels, and the device they run on."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU runs Triton's interpreter


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def heads(B: int, T: int, K: int, H: int, G: int, D: int, Dv: int) -> tuple[Tensor, ...]:
    """q [B, T, H, D], k [B, K, G, D] and v [B, K, G, Dv]."""
    return random(B, T, H, D), random(B, K, G, D), random(B, K, G, Dv)
