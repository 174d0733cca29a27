"""Numbers and orders that look random and are a pure function of a key, on every machine."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
ROUNDS = 6


def mix(*values: Any) -> Any:
    """64 bits that look random and depend on nothing but the values (a splitmix64 chain).

    Values are integers, or uint64 arrays for one answer each.
    """
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def permuted(index: int, size: int, key: int) -> int:
    """Where a permutation of range(size), chosen by `key`, sends `index`.

    A Feistel network over the next even power of two, walked until it lands inside: no table,
    whatever the size, and the same on every machine.
    """
    while True:
        index = _feistel(index, size, key)
        if index < size:
            return index


def permuted_each(indices: NDArray[np.uint64], size: int, key: int) -> NDArray[np.uint64]:
    """`permuted` of each index [n]."""
    found = _feistel(indices, size, key)
    while (outside := found >= size).any():
        found[outside] = _feistel(found[outside], size, key)
    return found


def _feistel(index: Any, size: int, key: int) -> Any:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    left, right = index >> half, index & low
    for turn in range(ROUNDS):
        left, right = right, left ^ (mix(key, turn, right) & low)
    return left << half | right
