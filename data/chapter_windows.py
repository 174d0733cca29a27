"""Which window a training sample is, where a corpus may still be growing by chapters.

An epoch goes through the chapters in their order, and through the windows of each in an order of
its own. So the place of a sample hangs on the chapters before it alone, and not on how many are
there: it is a pure function of the seed and the sample's number, as it is for a corpus that was
prepared as a whole.
"""

import logging
import multiprocessing
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data.background import Background
from data.chapters import Chapters
from data.packing import PackedTrainWindows, Packing, packing_of
from data.permutation import mix
from data.sampler import TrainWindows
from data.token_split import TokenSplit
from data.waiting import LOOK_S, TrainingSamples, alone, wait_for

log = logging.getLogger(__name__)


class ChapterWindows(TrainingSamples):
    """Sample number -> a window of its chapter.

    Args:
        label: of the corpus, in messages.
        chapters: those that are there.
        seq_len: T.
        seed: of the order of windows.
        packing: of the first chapter's documents; None: windows are cut from one stream.
    """

    def __init__(
        self, label: str, chapters: Chapters, seq_len: int, seed: int, packing: Packing | None
    ) -> None:
        self.label, self.chapters = label, chapters
        self.seq_len, self.seed, self.packing = seq_len, seed, packing
        self.preparation: Background | None = None  # of the chapters to come, in its own process
        self._windows: list[Any] = []
        self._ends = [0]  # of chapters, in windows
        self._failure: str | None = None  # as it was told
        self._open()
        self._released = None if chapters.complete else multiprocessing.Event()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"preparation": None}

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        chapter, own = self.place(sample)
        return self._windows[chapter][own]

    def place(self, sample: int) -> tuple[int, int]:
        """The chapter of a sample, and the sample's number among those of that chapter."""
        while not self._has(sample):  # in a loader process, which is ahead of its trainer
            if self._released is not None and self._released.wait(LOOK_S):
                raise InterruptedError("training is over")
        epoch, index = divmod(sample, self._ends[-1]) if self.chapters.complete else (0, sample)
        chapter = bisect_right(self._ends, index) - 1
        first, end = self._ends[chapter : chapter + 2]
        return chapter, index - first + epoch * (end - first)

    def epochs(self, samples: int) -> float | None:
        """How often the corpus is gone through by so many samples; None: its size is not known."""
        self._open()
        return samples / self._ends[-1] if self.chapters.complete else None

    def begun(self, samples: int) -> list[dict[str, Any]]:
        """The indices of the chapters that the first so many samples are from, once all are there.

        Raises:
            ChildProcessError: one will not come, since preparing it failed.
        """
        wait_for(self, [samples - 1], alone)
        number = sum(first < max(samples, 1) for first in self._ends[:-1])
        return self.chapters.indices[:number]

    @property
    def complete(self) -> bool:  # type: ignore[override]
        return self.chapters.complete

    def lacking(self, samples: Sequence[int]) -> list[TrainingSamples]:
        return [] if self._has(max(samples)) else [self]

    def failure(self) -> str | None:
        failure = self.preparation and self.preparation.failure()
        if not failure or self.chapters.look():  # what came last is still to be had
            return None
        there = self.chapters.there()
        return f"{self._what_failed(failure)}. Training has seen all there is: {there}"

    def say_what_failed(self) -> None:
        failure = self.preparation and self.preparation.failure()
        if failure and failure != self._failure:
            what = self._what_failed(failure)
            log.error("%s. Training goes on with what is there: %s", what, self.chapters.there())
        self._failure = failure

    def say(self, what: str) -> None:
        if self.preparation is not None:
            log.info("%s, %s", self._prepared(), what)

    def release(self) -> None:
        if self._released is not None:
            self._released.set()

    def stop_preparation(self) -> None:
        """End the preparation of chapters that nobody is going to read."""
        if self.preparation is not None and self.preparation.running:
            log.info("%s; a run that needs more goes on from there", self._prepared())
            self.preparation.stop()
        self.preparation = None

    def _has(self, sample: int) -> bool:
        if sample >= self._ends[-1]:
            self._open()
        return sample < self._ends[-1] or self.chapters.complete

    def _open(self) -> None:
        """Cut or pack the chapters that have come."""
        while len(self._windows) < len(self.chapters) or self.chapters.look():
            number = len(self._windows)
            split = self.chapters.splits[number]
            windows, count = self._of_chapter(
                split, mix(self.seed, number) if number else self.seed
            )
            self._windows.append(windows)
            self._ends.append(self._ends[-1] + count)

    def _of_chapter(self, split: TokenSplit, seed: int) -> tuple[Any, int]:
        if self.packing is None:
            return TrainWindows(split, self.seq_len, seed), len(split) // self.seq_len
        packing = self.packing
        if self._windows:
            packing = packing_of(split, self.seq_len, packing.alignment)
        return PackedTrainWindows(split, packing, seed), len(packing)

    def _what_failed(self, failure: str) -> str:
        return f"{self.label}: preparing the next chapter failed: {failure}"

    def _prepared(self) -> str:
        return f"{self.label}: {self.chapters.there()} prepared"
