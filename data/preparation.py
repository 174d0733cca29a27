"""The tokens of a Hugging Face dataset: made all at once, or by chapters beside the training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.chapters import Chapters, chapter_folder
from data.documents import (
    SplitOf,
    Unread,
    check_eot,
    drawn_splits,
    only,
    text_strings,
    write_documents,
)
from data.huggingface import DatasetChoice
from data.shards import ShardWriter, build_whole, lock_of
from data.tokenizer import AnyTokenizer, TokenizerChoice, saved_tokenizer
from runs.file_lock import held


@dataclass(frozen=True)
class Preparation:
    """How tokens are made of the rows of a dataset.

    Args:
        split_names: train, val and test by the dataset's names; None: a fraction of the training
            documents is held out, of the first chapter alone where there are chapters.
        fractions: of the training documents, for val and test.
        max_tokens: of a split; None: take all.
        chapter_tokens: training tokens of a chapter, which ends with the document that reaches so
            many; None: the corpus is a single chapter.
    """

    dataset: DatasetChoice
    tokenizer: TokenizerChoice
    split_names: Mapping[str, str | None]
    fractions: Mapping[str, float]
    max_tokens: int | None
    chapter_tokens: int | None

    def source(self) -> dict[str, Any]:
        """Everything the tokens depend on, as plain JSON values."""
        source = {
            "corpus": "hf",
            "dataset": self.dataset.source(),
            "splits": self.split_names,
            "fractions": self.fractions,
            "max_tokens": self.max_tokens,
            "tokenizer": self.tokenizer.source(),
        }
        if self.chapter_tokens is not None:
            source["chapter_tokens"] = self.chapter_tokens
        return source

    def build(self, folder: Path) -> None:
        """Write the tokenizer and all splits; of training, the first chapter."""
        tokenizer = self.tokenizer.make(self.training_texts)
        check_eot(tokenizer, self.tokenizer.name)
        self.dataset.check_slices(self.split_names)
        with ShardWriter(folder, tokenizer.vocab_size, self.source()) as writer:
            writer.index["tokenizer"] = tokenizer.save(folder)
            for split, name in self.split_names.items():
                if name is None:
                    continue
                unread = Unread(self.dataset.batches(name))
                if split == "train":
                    self._write_chapter(writer, tokenizer, unread, self._split_of, before=0)
                else:
                    write_documents(writer, tokenizer, unread, only(split), self.max_tokens)

    def build_rest(self, folder: Path) -> None:
        """Write the chapters that are not there yet, going on where the last one ends.

        Of several processes that come at once, one writes and the others wait.
        """
        with held(lock_of(folder)):
            chapters = Chapters(folder)
            if chapters.complete:
                return
            tokenizer = saved_tokenizer(folder, chapters.indices[0]["tokenizer"])
            name, taken = self.split_names["train"], chapters.indices[-1]["chapter"]["documents"]
            assert name is not None
            unread = Unread(self.dataset.batches(name), taken)
            while not chapters.complete:
                write = partial(self._build_chapter, tokenizer, unread, chapters.num_tokens)
                build_whole(chapter_folder(folder, len(chapters)), write)
                chapters.look()

    def _build_chapter(
        self, tokenizer: AnyTokenizer, unread: Unread, before: int, folder: Path
    ) -> None:
        with ShardWriter(folder, tokenizer.vocab_size, self.source()) as writer:
            self._write_chapter(writer, tokenizer, unread, only("train"), before=before)

    def _write_chapter(
        self,
        writer: ShardWriter,
        tokenizer: AnyTokenizer,
        unread: Unread,
        split_of: SplitOf,
        *,
        before: int,
    ) -> None:
        """Training documents up to the end of a chapter; `before` it were so many tokens."""
        limits = [self.chapter_tokens, self.max_tokens and self.max_tokens - before]
        limit = min((each for each in limits if each is not None), default=None)
        write_documents(writer, tokenizer, unread, split_of, limit)
        if self.chapter_tokens is None:
            return
        tokens = before + writer.num_tokens("train")
        last = unread.next() is None or (self.max_tokens is not None and tokens >= self.max_tokens)
        chapter = {"documents": unread.taken, "tokens": tokens, "last": last}
        writer.index["chapter"] = chapter

    def training_texts(self) -> Iterator[str]:
        """What a tokenizer learns from."""
        number = 0
        name = self.split_names["train"]
        assert name is not None
        for batch in self.dataset.batches(name):
            splits = self._split_of(np.arange(number, number + len(batch), dtype=np.uint64))
            number += len(batch)
            yield from text_strings(batch.filter(pa.array(splits == "train")))

    def _split_of(self, numbers: NDArray[np.uint64]) -> NDArray[np.str_]:
        """Where documents of the training split go."""
        cut = {s: f for s, f in self.fractions.items() if self.split_names[s] is None}
        return drawn_splits(numbers, cut)
