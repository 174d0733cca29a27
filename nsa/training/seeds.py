"""Random numbers of a training step, seeded by its number, so that a resumed run repeats them."""

import random

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Start every generator of random numbers that a step may use."""
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def micro_batch_seed(seed: int, rank: int, micro_batch: int) -> int:
    """One seed for each micro-batch of each rank."""
    return (seed * 1_000_003 + rank << 32) + micro_batch & (1 << 63) - 1
