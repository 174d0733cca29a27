"""Serves a task as a corpus: {"tokens": [B, T + 1], "scored": [B, T]}, judged by its accuracy.

With `grow_samples` a training window begins as many short documents and ends as one long one. A
layer-deep search for one fact in a thousand tokens has next to no gradient at first; among sixty it
is found soon, and what finds it there works on.
"""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.base import TokenDataModule
from data.checks import check_at_least
from data.datamodule import StdlibDataModule
from data.metrics import ACCURACY
from data.permutation import mix
from data.tasks import needles, symbols
from data.tasks.sample import Sample, Sizes, in_one_window
from data.token_split import TokenSplit
from data.tokenizer import ByteTokenizer
from data.waiting import TrainingSamples

OF_SYMBOLS = {
    "recall": symbols.recall,
    "straddle": symbols.straddle,
    "induction": symbols.induction,
    "selective_copy": symbols.selective_copy,
}
IN_TEXT = {"passkey": needles.passkey, "needles": needles.needles}
TASKS = (*OF_SYMBOLS, *IN_TEXT)
STREAMS = {"train": 0, "val": 1, "test": 2}  # of random numbers


class RecallDataModule(TokenDataModule):
    """A task with known answers, made on the fly. Only the labels that are asked for are scored.

    Sample k of a run is a function of seed and k; those of validation and test are the same for
    every seed. Tasks in text take it from the standard library's source, split by split.

    Args:
        task: one of `TASKS`.
        num_facts, num_questions, facts_per_cluster, min_distance, block_size, offset,
            needle_depth: see `data.tasks.sample.Sizes`.
        grow_samples: training samples over which a window's documents become one: they are halved
            in number, and doubled in length and in facts, in equal steps.
        grow_from: documents in a training window at first: a power of two.
        val_sequences, test_sequences: windows in these splits.
    """

    metric = ACCURACY
    is_text = False

    def __init__(
        self,
        *,
        task: str,
        num_facts: int,
        num_questions: int,
        facts_per_cluster: int,
        min_distance: int,
        block_size: int,
        offset: int | None,
        needle_depth: float | None,
        grow_samples: int,
        grow_from: int,
        val_sequences: int,
        test_sequences: int,
        **numbers: Any,
    ) -> None:
        super().__init__(**numbers)
        check_task(task, self.vocab_size)
        self.task = task
        self.sizes = Sizes(
            seq_len=self.seq_len,
            num_facts=num_facts,
            num_questions=num_questions,
            facts_per_cluster=facts_per_cluster,
            min_distance=min_distance,
            block_size=block_size,
            offset=offset,
            needle_depth=needle_depth,
        )
        check_sizes(task, self.sizes)
        check_growth(self.seq_len, grow_samples, grow_from)
        self.grow_samples, self.grow_from = grow_samples, grow_from
        self.num_sequences = {"val": val_sequences, "test": test_sequences}
        for split, number in self.num_sequences.items():
            check_at_least(f"data.{split}_sequences", number, 1)
        sizes = {"seq_len": self.seq_len, "micro_batch_size": 1}
        self.text = StdlibDataModule(name="stdlib", vocab_size=256, **sizes)
        growth = f"grow_samples={grow_samples}, grow_from={grow_from}"
        self.description = f"{task}, {self.sizes}, {growth}"

    def source(self) -> dict[str, Any]:
        return {"task": self.description}

    def identity(self, samples: int) -> dict[str, Any]:
        return self.source()

    def build(self, folder: Path) -> None:
        """Never called: `prepare_data` makes no shards, since samples are made on the fly."""
        raise AssertionError("a task has no shards to build")

    def prepare_data(self, verify: bool = True) -> None:
        """Tasks in text prepare it; the others need nothing."""
        if self.task in IN_TEXT:
            self.text.prepare_data(verify)

    def setup(self, stage: str | None = None) -> None:
        """Open the text, and make a sample of each length, which refuses what does not fit."""
        if self.task in IN_TEXT:
            self.text.setup(stage)
        for documents in sorted({self.num_documents(0), 1}):
            if self.seq_len // documents % self.document_alignment:
                raise ValueError(
                    f"data.grow_from={documents} cuts model.seq_len={self.seq_len} into documents "
                    f"of {self.seq_len // documents} tokens: they must be a multiple of the "
                    f"attention's block of {self.document_alignment}"
                )
            self._made("train", np.random.Generator(np.random.Philox(0)), documents)

    def at_offset(self, offset: int) -> "RecallDataModule":
        """The task straddle with its keys at another place of a block."""
        other = copy(self)
        other.sizes = replace(self.sizes, offset=offset)
        return other

    def num_documents(self, number: int) -> int:
        """How many documents share a training window."""
        if number >= self.grow_samples:
            return 1
        halvings = self.grow_from.bit_length() - 1
        return self.grow_from >> (number * halvings // self.grow_samples)

    def sample(self, split: str, number: int) -> Sample:
        """One sample of a split, by its number."""
        seed = self.seed if split == "train" else 0
        rng = np.random.Generator(np.random.Philox(key=mix(seed, STREAMS[split], number)))
        return self._made(split, rng, self.num_documents(number) if split == "train" else 1)

    def _made(self, split: str, rng: np.random.Generator, documents: int) -> Sample:
        sizes = self.sizes.of_document(documents)
        if self.task in OF_SYMBOLS:
            made = OF_SYMBOLS[self.task](rng, sizes, documents)
        else:
            text = self._text(rng, self.text.splits[split], documents * (sizes.seq_len + 1))
            made = IN_TEXT[self.task](rng, sizes, text.reshape(documents, -1))
        return in_one_window(made) if documents > 1 else Sample(*(each[0] for each in made))

    def _text(self, rng: np.random.Generator, split: TokenSplit, length: int) -> NDArray[np.int64]:
        start = int(rng.integers(0, len(split) - length + 1))
        return split.read(start, start + length)

    def epochs(self, samples: int) -> dict[str, float]:
        """No sample comes twice."""
        return {}

    def bytes_per_token(self, split: str) -> float:
        """A token stands for one byte, or for one symbol."""
        return 1.0

    def _train_windows(self) -> "TaskWindows":
        return TaskWindows(self, "train", None)

    def _eval_windows(self, split: str) -> "TaskWindows":
        return TaskWindows(self, split, self.num_sequences[split])


class TaskWindows(TrainingSamples):
    """Sample number -> {"tokens": int64 [T + 1], "scored": bool [T]}.

    Training with `grow_samples` also has "document_starts", int32 [T]; evaluation has "evidence",
    int64 [T], of a `Sample`. Numbers from `num_sequences` on have nothing to score: they fill up
    the ranks' last batches.
    """

    def __init__(self, task: RecallDataModule, split: str, num_sequences: int | None) -> None:
        self.sample_of, self.split, self.num_sequences = task.sample, split, num_sequences
        self.seq_len = task.seq_len
        grows = split == "train" and task.grow_samples > 0
        self.num_documents = task.num_documents if grows else None

    def __len__(self) -> int:
        assert self.num_sequences is not None, "training is endless"
        return self.num_sequences

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if self.num_sequences is not None and number >= self.num_sequences:
            beyond = torch.full((self.seq_len + 1,), -1)
            nothing = torch.zeros(self.seq_len, dtype=torch.bool)
            return {"tokens": beyond, "scored": nothing, "evidence": beyond[1:]}
        sample = self.sample_of(self.split, number)
        found = {
            "tokens": torch.from_numpy(sample.tokens),
            "scored": torch.from_numpy(sample.scored),
        }
        if self.num_sequences is not None:
            found["evidence"] = torch.from_numpy(sample.evidence)
        if self.num_documents is not None:
            length = self.seq_len // self.num_documents(number)
            found["document_starts"] = (
                torch.arange(self.seq_len, dtype=torch.int32) // length * length
            )
        return found


def check_task(task: str, vocab_size: int) -> None:
    """Refuse an unknown task, and another vocabulary than bytes."""
    if task not in TASKS:
        raise ValueError(f"data.task={task!r} must be one of {', '.join(TASKS)}")
    if vocab_size != ByteTokenizer.vocab_size:
        raise ValueError(f"data.vocab_size={vocab_size} must be 256 for a task")


def check_growth(seq_len: int, grow_samples: int, grow_from: int) -> None:
    """Refuse a number of documents that cannot be halved, or that does not divide a window."""
    check_at_least("data.grow_samples", grow_samples, 0)
    check_at_least("data.grow_from", grow_from, 1)
    if grow_from & (grow_from - 1) or seq_len % grow_from:
        raise ValueError(
            f"data.grow_from={grow_from} must be a power of two that divides "
            f"model.seq_len={seq_len}"
        )


def check_sizes(task: str, sizes: Sizes) -> None:
    """Refuse what no window could hold, however long."""
    for option in ("num_facts", "num_questions", "facts_per_cluster", "block_size"):
        check_at_least(f"data.{option}", getattr(sizes, option), 1)
    check_at_least("data.min_distance", sizes.min_distance, 0)
    most = {"induction": 128, "selective_copy": None, "needles": 8}.get(task, 64)
    least = 2 if task == "induction" else 1
    if sizes.num_facts < least or (most is not None and sizes.num_facts > most):
        raise ValueError(
            f"data.num_facts={sizes.num_facts} must be at least {least} and at most {most} for "
            f"data.task={task}"
        )
    if task in ("recall", "straddle") and sizes.num_questions > sizes.num_facts:
        raise ValueError(
            f"data.num_questions={sizes.num_questions} must be at most "
            f"data.num_facts={sizes.num_facts}"
        )
    if sizes.offset is not None and not 0 <= sizes.offset < sizes.block_size:
        raise ValueError(f"data.offset={sizes.offset} must be from 0 to data.block_size - 1")
    if sizes.needle_depth is not None and not 0 <= sizes.needle_depth <= 1:
        raise ValueError(
            f"data.needle_depth={sizes.needle_depth} must be from 0 (the beginning) to 1 (the end)"
        )
