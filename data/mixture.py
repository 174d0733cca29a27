"""Which corpus a sample of a mixture is from: a pure function of the seed and the sample's number.

Of every `PERIOD` samples each corpus has its share, in an order of their own. So sample k needs no
memory of the samples before it, and nor does a run that goes on.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.permutation import mix, permuted, permuted_each
from data.waiting import TrainingSamples

PERIOD = 10_000  # samples


def quotas(shares: Mapping[str, float]) -> dict[str, int]:
    """Samples of each corpus in a period: its share of the sum, the largest remainders rounded up.

    Raises:
        ValueError: if a share is not above 0, or too small for a single sample.
    """
    for name, share in shares.items():
        if not share > 0:
            raise ValueError(f"data.weights: {name}={share} must be above 0")
    total = sum(shares.values())
    exact = {name: PERIOD * share / total for name, share in shares.items()}
    found = {name: int(each) for name, each in exact.items()}
    missing = PERIOD - sum(found.values())
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[:missing]:
        found[name] += 1
    if rare := [name for name, each in found.items() if not each]:
        raise ValueError(
            f"data.weights: {rare[0]}={shares[rare[0]]} is less than one sample in {PERIOD:,}: "
            "raise it, or leave the corpus out"
        )
    return found


class Schedule:
    """Sample number -> number of its corpus, and the sample's number within it.

    Args:
        quotas: samples of each corpus in a period.
        seed: of the order within a period.
    """

    def __init__(self, quotas: Sequence[int], seed: int) -> None:
        self.quotas, self.seed = list(quotas), seed
        self.ends = np.cumsum(self.quotas).tolist()

    def place(self, sample: int) -> tuple[int, int]:
        period, index = divmod(sample, PERIOD)
        slot = permuted(index, PERIOD, mix(self.seed, period))
        corpus = bisect_right(self.ends, slot)
        return corpus, slot - self.ends[corpus] + (period + 1) * self.quotas[corpus]

    def drawn(self, samples: int) -> list[int]:
        """How many of the first so many samples each corpus has."""
        periods, rest = divmod(samples, PERIOD)
        slots = permuted_each(np.arange(rest, dtype=np.uint64), PERIOD, mix(self.seed, periods))
        last = np.bincount(np.searchsorted(self.ends, slots, "right"), minlength=len(self.quotas))
        return [periods * quota + int(n) for quota, n in zip(self.quotas, last, strict=True)]


class MixedTrainWindows(TrainingSamples):
    """Sample number -> a window of one of the corpora, and `corpus`, the number of that."""

    def __init__(self, windows: Sequence[TrainingSamples], schedule: Schedule) -> None:
        self.windows, self.schedule = windows, schedule

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        corpus, own = self.schedule.place(sample)
        return self.windows[corpus][own] | {"corpus": torch.tensor(corpus)}

    @property
    def complete(self) -> bool:  # type: ignore[override]
        return all(each.complete for each in self.windows)

    def lacking(self, samples: Sequence[int]) -> list[TrainingSamples]:
        own: dict[int, list[int]] = {}
        for corpus, sample in map(self.schedule.place, samples):
            own.setdefault(corpus, []).append(sample)
        return [part for corpus in own for part in self.windows[corpus].lacking(own[corpus])]

    def say_what_failed(self) -> None:
        for each in self.windows:
            each.say_what_failed()

    def release(self) -> None:
        for each in self.windows:
            each.release()


class MixedEvalWindows(Dataset):
    """Window number -> a window, all of one corpus after all of another; `corpus` as above."""

    def __init__(self, windows: Sequence[Any]) -> None:
        self.windows = windows
        self.ends = np.cumsum([len(each) for each in windows]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        corpus = min(bisect_right(self.ends, window), len(self.ends) - 1)  # beyond all: the last
        own = window - self.ends[corpus] + len(self.windows[corpus])
        return self.windows[corpus][own] | {"corpus": torch.tensor(corpus)}
