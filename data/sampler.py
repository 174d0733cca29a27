"""Which tokens a step sees: a pure function of the seed and of how many samples came before.

Sample k of a run lies in epoch k // n, n being the whole windows of T tokens in the split. An epoch
cuts the split, closed to a ring, into n windows that start at an offset of its own, and visits
them in an order of its own: every token is a label once an epoch, but for the n·T short of the
split (fewer than T, elsewhere each time). Nothing is stored: a run that resumes at step s, on any
number of ranks, in micro-batches of any size, asks for the samples from s times the global batch.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data.permutation import mix, permuted
from data.token_split import TokenSplit


def visited(sample: int, num_windows: int, seed: int) -> tuple[int, int]:
    """The window that sample `sample` of a run visits, and 64 bits that belong to its epoch."""
    epoch, index = divmod(sample, num_windows)
    key = mix(seed, epoch)
    return permuted(index, num_windows, key), key


def window_start(sample: int, num_tokens: int, seq_len: int, seed: int) -> int:
    """The token of the ring at which sample `sample` of a run begins."""
    window, key = visited(sample, num_tokens // seq_len, seed)
    return (key + window * seq_len) % num_tokens


class TrainWindows(Dataset):
    """Sample number -> {"tokens": int64 [T + 1]}, endless."""

    def __init__(self, split: TokenSplit, seq_len: int, seed: int) -> None:
        self.split, self.seq_len, self.seed = split, seq_len, seed

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        start = window_start(sample, len(self.split), self.seq_len, self.seed)
        tokens = self.split.read(start, start + self.seq_len + 1)
        beyond = self.seq_len + 1 - len(tokens)  # the ring closes: go on at the beginning
        return {"tokens": torch.from_numpy(np.concatenate([tokens, self.split.read(0, beyond)]))}


class EvalWindows(Dataset):
    """Window number -> {"tokens": int64 [T + 1]}: every token but the first is a label once.

    Windows share one token, the last label of one being the first input of the next. What lies
    beyond the end is -1, which no loss counts; a window wholly beyond it has nothing to score.
    """

    def __init__(self, split: TokenSplit, seq_len: int, limit: int | None) -> None:
        self.split, self.seq_len = split, seq_len
        self.num_tokens = len(split) if limit is None else min(limit, len(split))

    def __len__(self) -> int:
        return -(-(self.num_tokens - 1) // self.seq_len)

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        start = window * self.seq_len
        tokens = self.split.read(start, min(start + self.seq_len + 1, self.num_tokens))
        padding = np.full(self.seq_len + 1 - len(tokens), -1)
        return {"tokens": torch.from_numpy(np.concatenate([tokens, padding]))}


class TrainBatches(Sampler[list[int]]):
    """The sample numbers of every micro-batch of one rank, from an optimizer step to the last.

    A step takes `micro_batch_size` samples from each rank, `accumulate` times over; the numbers
    that a step covers depend only on their product. The length counts from step 0, as Lightning
    counts batches across a resume.
    """

    def __init__(
        self,
        *,
        start_step: int,
        num_steps: int,
        micro_batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.start_step, self.num_steps = start_step, num_steps
        self.micro_batch_size, self.accumulate = micro_batch_size, accumulate
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.num_steps):
            for micro_batch in range(self.accumulate):
                yield self.samples(step, micro_batch)

    def samples(self, step: int, micro_batch: int) -> list[int]:
        """The sample numbers of one micro-batch of a step, both counted from 0."""
        micro_batches = step * self.accumulate + micro_batch
        first = (micro_batches * self.world_size + self.rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))

    def of_step(self, step: int) -> range:
        """The sample numbers of a step, counted from 0, over all ranks."""
        size = self.micro_batch_size * self.accumulate * self.world_size
        return range(step * size, (step + 1) * size)


class EvalBatches(Sampler[list[int]]):
    """The window numbers of one rank's batches. Every rank gets as many batches, all full.

    Numbers past the last window are handed out too: `EvalWindows` makes them wholly unscored, so
    that ranks meet at every collective and no token is dropped or counted twice.
    """

    def __init__(self, *, num_windows: int, batch_size: int, rank: int, world_size: int) -> None:
        self.num_windows, self.batch_size = num_windows, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.num_windows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
