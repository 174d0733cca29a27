"""Documents packed into windows of T tokens: none is cut but those that are longer than a window.

Which documents share a window depends on their lengths alone, so it is the same in every epoch and
for every seed; the order in which windows come is the sampler's. A document begins at a multiple of
`alignment` tokens, where blocks of NSA begin too.

Letters: T labels in a window, n documents or parts of them, W windows.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data.sampler import visited
from data.token_split import TokenSplit

NOTHING = -1  # a token where no document is


@dataclass(frozen=True)
class Parts:
    """Documents, and parts of long ones: `labels` tokens after the one at `first` are predicted."""

    first: NDArray[np.int64]  # [n]
    labels: NDArray[np.int64]  # [n], at most T each

    @classmethod
    def of(cls, documents: NDArray[np.int64], seq_len: int) -> "Parts":
        """Of documents given by where they begin, and the end of the last, [n + 1].

        A long one goes on in its next part with the last label of the part before. A document of a
        single token has no label, and is left out.
        """
        labels = np.maximum(np.diff(documents) - 1, 0)
        parts = -(-labels // seq_len)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        before = number * seq_len
        rest = np.repeat(labels, parts) - before
        return cls(np.repeat(documents[:-1], parts) + before, np.minimum(rest, seq_len))


@dataclass(frozen=True)
class Packing:
    """Which parts of documents lie in which window.

    Args:
        parts: in any order.
        seq_len: T.
        alignment: tokens; every part begins at a multiple of it.
    """

    parts: Parts
    seq_len: int
    alignment: int

    @cached_property
    def windows(self) -> list[NDArray[np.int64]]:
        """The numbers of the parts in each window, in their order."""
        room = max(1, self.seq_len // self.alignment)
        units = -(-self._slots(self.parts.labels) // self.alignment)
        return best_fit(np.minimum(units, room), room)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def fill(self) -> float:
        """The share of all windows' tokens that are of documents."""
        return self._filled(self.parts.labels, len(self))

    @property
    def last_fill(self) -> float:
        """The same of the last window, with which packing ended."""
        return self._filled(self.parts.labels[self.windows[-1]], 1)

    def lengths(self, groups: int = 16) -> list[tuple[int, float]]:
        """How long parts are, and the share of all windows' tokens in parts of about that length.

        Parts are grouped by length; a group's is the mean over its tokens. The rest is empty.
        """
        slots = np.sort(self._slots(self.parts.labels))
        ends = np.cumsum(slots)
        borders = np.searchsorted(ends, np.linspace(0, ends[-1], groups + 1)[1:-1])
        found = [each for each in np.split(slots, borders) if len(each)]
        whole = len(self) * self.seq_len
        return [(round((e * e).sum() / e.sum()), float(e.sum()) / whole) for e in found]

    def _filled(self, labels: NDArray[np.int64], windows: int) -> float:
        return float(self._slots(labels).sum()) / (windows * self.seq_len)

    def _slots(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Inputs of parts: the last label is one too, unless it ends a part of T labels."""
        return np.minimum(labels + 1, self.seq_len)

    def read(self, split: TokenSplit, window: int) -> dict[str, Tensor]:
        """One window: see `data.base`."""
        tokens = np.full(self.seq_len + 1, NOTHING)
        starts = np.zeros(self.seq_len, np.int32)
        scored = np.zeros(self.seq_len, bool)
        parts, place = self.windows[window], 0
        lengths = self.parts.labels[parts]
        strides = -(-self._slots(lengths) // self.alignment) * self.alignment
        columns = (self.parts.first[parts], lengths, strides)
        for first, labels, stride in zip(*(each.tolist() for each in columns), strict=True):
            tokens[place : place + labels + 1] = split.read(first, first + labels + 1)
            scored[place : place + labels] = True
            starts[place:] = place  # what is behind it belongs to it, until the next one begins
            place += stride
        found = {"tokens": tokens, "scored": scored, "document_starts": starts}
        return {name: torch.from_numpy(array) for name, array in found.items()}


def best_fit(sizes: NDArray[np.int64], room: int) -> list[NDArray[np.int64]]:
    """Pack things of whole `sizes` [n], from 1 to `room`, into bins that hold `room`.

    Best fit, the largest first: each goes where the least room is left behind it. Bins that hold
    the same sizes are handled as one, so that the time depends on how many sizes there are (as in
    the histograms of arXiv 2107.02027).
    """
    bins: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)  # by their room left
    rooms: list[int] = []  # that some bins have left, ascending

    def put(number: int, held: tuple[int, ...], left: int) -> None:
        if number:
            if not bins[left]:
                insort(rooms, left)
            bins[left].append((number, held))

    counts = np.bincount(sizes, minlength=room + 1)
    for size in np.flatnonzero(counts)[::-1].tolist():
        rest = int(counts[size])
        while rest:
            place = bisect_left(rooms, size)
            if place < len(rooms):
                left = rooms[place]
                number, held = bins[left].pop()
                if not bins[left]:
                    rooms.pop(place)
            else:
                left, number, held = room, rest, ()
            each = left // size  # of this size in one bin
            full = min(number, rest // each)
            rest -= full * each
            put(full, held + (size,) * each, left - each * size)
            if full < number and rest:
                put(1, held + (size,) * rest, left - rest * size)
                full, rest = full + 1, 0
            if held:
                put(number - full, held, left)
    return numbered(sizes, [each for left in sorted(bins) for each in bins[left]])


def numbered(
    sizes: NDArray[np.int64], bins: list[tuple[int, tuple[int, ...]]]
) -> list[NDArray[np.int64]]:
    """Bins given by how many hold which sizes, filled with the numbers of things of those sizes."""
    order = np.argsort(sizes, kind="stable")
    next_of = np.searchsorted(sizes[order], np.arange(sizes.max(initial=0) + 2))
    found: list[NDArray[np.int64]] = []
    for number, held in bins:
        columns = []
        for size in held:
            start = next_of[size]
            next_of[size] += number
            columns.append(order[start : start + number])
        found += list(np.stack(columns, axis=1))
    return found


class PackedTrainWindows(Dataset):
    """Sample number -> a window of packed documents, endless."""

    def __init__(self, split: TokenSplit, packing: Packing, seed: int) -> None:
        self.split, self.packing, self.seed = split, packing, seed
        self.num_windows = len(packing)  # packs here, once for all loader processes

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        window, _ = visited(sample, self.num_windows, self.seed)
        return self.packing.read(self.split, window)


class PackedEvalWindows(Dataset):
    """Window number -> a window of packed documents; wholly unscored beyond the last one."""

    def __init__(self, split: TokenSplit, packing: Packing) -> None:
        self.split, self.packing = split, packing

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        if window < len(self):
            return self.packing.read(self.split, window)
        read = self.packing.read(self.split, 0)
        return read | {
            "tokens": torch.full_like(read["tokens"], NOTHING),
            "scored": torch.zeros_like(read["scored"]),
        }


def packing_of(
    split: TokenSplit, seq_len: int, alignment: int, limit: int | None = None
) -> Packing:
    """The documents of a split, or of its first `limit` tokens, packed."""
    documents = split.documents()
    if limit is not None and limit < documents[-1]:
        documents = np.append(documents[documents < limit], limit)
    return Packing(Parts.of(documents, seq_len), seq_len, alignment)
