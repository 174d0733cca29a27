"""What every corpus shares: prepared once as token shards, served as {"tokens": int64 [B, T + 1]}.

Inputs are tokens[:, :-1] and labels tokens[:, 1:]. The last windows of a validation or test split
are padded with -1, which is not scored. A batch may also say which labels are scored, anywhere in a
window: {"tokens": …, "scored": bool [B, T]}.

With data.pack=documents it also has "document_starts": int32 [B, T], for each input the place of
the first one of its document. What is padded behind a document belongs to it, is -1, and is not
scored; nor is the label that would be the next document's first token.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from data.chapter_windows import ChapterWindows
from data.chapters import Chapters
from data.checks import check_at_least, check_lengths, check_pack
from data.loader_signals import leave_signals_to_the_trainer
from data.metrics import BITS_PER_BYTE, Metric
from data.packing import PackedEvalWindows, Packing, packing_of
from data.sampler import EvalBatches, EvalWindows, TrainBatches
from data.shards import (
    INDEX,
    ShardWriter,
    identity,
    prepare_shards,
    refuse,
    shard_folder,
)
from data.token_split import SPLITS, TokenSplit
from data.tokenizer import AnyTokenizer, ByteTokenizer, saved_tokenizer
from data.waiting import StepLoader, StepWait

log = logging.getLogger(__name__)


class TokenDataModule(L.LightningDataModule, ABC):
    """What every corpus shares; a subclass says what its tokens are made from, and makes them.

    Args:
        name: of the corpus, for folders and logs.
        vocab_size: ids the model must know: at least as many as the tokenizer has.
        seq_len: T, the labels in a window.
        micro_batch_size: windows a rank takes at once, in training and validation.
        num_workers: loader processes on each rank.
        val_tokens, test_tokens: score only the first so many tokens of the split; None: all.
        seed: of the order in which training windows come; it moves nothing else.
        pack: "stream" cuts a split into windows wherever they end; "documents" packs whole
            documents (`data.packing`).

    After `prepare_data` and `setup` it has `splits` and `tokenizer`; train, val and test then hold
    at least one window each.
    """

    metric: Metric = BITS_PER_BYTE  # what a run on these data is judged by
    more_text = "choose a larger corpus"  # the way out where there is too little text in all
    has_documents = False  # whether the corpus knows where documents begin
    is_text = True  # whether it is made of text: a task is not
    more_held_out = more_text  # the way out where too little of it is held out of training

    def __init__(
        self,
        *,
        name: str,
        vocab_size: int,
        seq_len: int,
        micro_batch_size: int,
        num_workers: int = 0,
        val_tokens: int | None = None,
        test_tokens: int | None = None,
        seed: int = 0,
        pack: str = "stream",
    ) -> None:
        super().__init__()
        check_pack(name, pack, self.has_documents)
        check_at_least("model.seq_len", seq_len, 1)
        check_at_least("batch.micro_batch_size", micro_batch_size, 1)
        check_at_least("data.num_workers", num_workers, 0)
        for option, value in (("data.val_tokens", val_tokens), ("data.test_tokens", test_tokens)):
            if value is not None:
                check_at_least(option, value, 2)
        self.name: str = name
        self.label = name  # in messages: a mixture has names of the user's own
        self.vocab_size, self.seq_len = vocab_size, seq_len
        self.micro_batch_size = micro_batch_size
        self.num_workers = num_workers
        self.eval_tokens = {"val": val_tokens, "test": test_tokens}
        self.seed = seed
        self.pack = pack
        self.document_alignment = 1  # documents begin at multiples of so many tokens
        self._packings: dict[str, Packing] = {}
        self._prepared = False
        self.splits: dict[str, TokenSplit] = {}
        self.chapters: Chapters | None = None
        self._windows: ChapterWindows | None = None
        self.step_wait = StepWait()
        self.tokenizer: AnyTokenizer = ByteTokenizer()

    @abstractmethod
    def source(self) -> dict[str, Any]:
        """Everything the tokens depend on, as plain JSON values: the identity of the shards."""

    @abstractmethod
    def build(self, folder: Path) -> None:
        """Write the tokens of all splits into `folder`, through `self.writer`."""

    def writer(self, folder: Path, tokenizer: AnyTokenizer) -> ShardWriter:
        """A writer for this corpus, the tokenizer saved beside the tokens."""
        writer = ShardWriter(folder, tokenizer.vocab_size, self.source())
        writer.index["tokenizer"] = tokenizer.save(folder)
        return writer

    def prepare_data(self, verify: bool = True) -> None:
        """Build the shards where they do not exist, verify them where they do.

        `verify=False` leaves their bytes to another process of this machine to read.
        """
        if not self._prepared:
            source = self.source()
            prepare_shards(shard_folder(self.name, source), source, self.build, verify)
            self._prepared = True

    def prepare_rest(self) -> None:
        """Begin to prepare what training is not to wait for; of one process on each machine."""

    def setup(self, stage: str | None = None) -> None:
        """Open the shards."""
        if self.splits:
            return
        folder = shard_folder(self.name, self.source())
        chapters = Chapters(folder)
        splits = {"train": chapters.splits[0], **chapters.held_out}
        if self.pack == "documents" and not all(split.has_documents for split in splits.values()):
            refuse(folder / INDEX, "it does not say where documents begin, as older ones do not")
        lengths = {split: len(splits.get(split, ())) for split in SPLITS}
        ways = {"train": self.more_text, "held out": self.more_held_out}
        check_lengths(self.name, self.pack, self.seq_len, lengths, ways)
        self.splits, self.chapters = splits, chapters
        self.tokenizer = saved_tokenizer(folder, chapters.indices[0]["tokenizer"])
        counts = ", ".join(f"{split} {len(splits[split]):,}" for split in SPLITS)
        log.info("%s: %s tokens in %s", self.label, counts, folder)

    def of_documents(self) -> dict[str, Any]:
        """What `source` has besides where tokens are made of documents one by one."""
        return {"documents": "one by one"} if self.pack == "documents" else {}

    def packing(self, split: str) -> Packing:
        """Which documents lie in which window of a split."""
        if split not in self._packings:
            limit = self.eval_tokens.get(split)
            sizes = (self.seq_len, self.document_alignment)
            self._packings[split] = packing_of(self.splits[split], *sizes, limit)
        return self._packings[split]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the corpus, by name, is gone through; nothing while its size is not known."""
        epochs = self._train_windows().epochs(samples)
        return {} if epochs is None else {self.name: epochs}

    def document_lengths(self) -> list[tuple[int, float]]:
        """How long what attends to itself is in training, and its share of a window's tokens."""
        if self.pack == "documents":
            return self.packing("train").lengths()
        return [(self.seq_len, 1.0)]

    def summary(self, samples: int) -> dict[str, str]:
        """What a run of so many samples says of its data before it trains, by what it is about."""
        rows, where = {}, ""
        if self.chapters and "chapter" in self.chapters.indices[0]:
            more = "that is all" if self.chapters.complete else "more are prepared during training"
            rows["corpus"], where = f"{self.chapters.there()}; {more}", " (of the first chapter)"
        if self.pack == "documents":
            packing = self.packing("train")
            fill = f"{packing.fill:.1%} filled, the last one {packing.last_fill:.1%}"
            rows["packed documents"] = f"{len(packing):,} windows, {fill}{where}"
        return rows

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's step to its last; each depends on seed and step alone."""
        rank = self.trainer.global_rank if self.trainer else 0
        if self.trainer and self.trainer.local_rank == 0:
            self.prepare_rest()
        batches, options = self._train_batches(rank), self._loading
        return StepLoader(self._train_windows(), self.step_wait, batch_sampler=batches, **options)

    def samples_of(self, step: int, rank: int, micro_batch: int) -> list[int]:
        """The samples that a rank sees in one micro-batch of a training step, by their numbers.

        A pure function of the layout. Steps count from 1, as they do for users; the rest from 0.
        """
        return self._train_batches(rank).samples(step - 1, micro_batch)

    def text_of(self, sample: int) -> str:
        """The text of a training sample, its last label included."""
        tokens = self._train_windows()[sample]["tokens"]
        return self.decode(tokens[tokens >= 0].tolist())

    def _train_windows(self) -> Any:
        assert self.chapters is not None, "setup has not been called"
        if self._windows is None:
            packing = self.packing("train") if self.pack == "documents" else None
            sizes = (self.seq_len, self.seed, packing)
            self._windows = ChapterWindows(self.label, self.chapters, *sizes)
        return self._windows

    def _train_batches(self, rank: int) -> TrainBatches:
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1:
            raise ValueError(
                "the training data is counted in optimizer steps: set trainer.max_steps to their "
                "number (and trainer.max_epochs=-1)"
            )
        return TrainBatches(
            start_step=trainer.global_step,
            num_steps=trainer.max_steps,
            micro_batch_size=self.micro_batch_size,
            accumulate=trainer.accumulate_grad_batches,
            rank=rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> DataLoader:
        """The validation split, or its first `val_tokens`, once."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """The test split, or its first `test_tokens`, once."""
        return self._eval_loader("test")

    def _eval_windows(self, split: str) -> Any:
        if self.pack == "documents":
            return PackedEvalWindows(self.splits[split], self.packing(split))
        return EvalWindows(self.splits[split], self.seq_len, self.eval_tokens[split])

    def _eval_loader(self, split: str) -> DataLoader:
        windows = self._eval_windows(split)
        batches = EvalBatches(
            num_windows=len(windows),
            batch_size=self.micro_batch_size,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        return DataLoader(windows, batch_sampler=batches, **self._loading)

    @property
    def _loading(self) -> dict[str, Any]:
        """The options of every loader."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": leave_signals_to_the_trainer,
            "pin_memory": torch.cuda.is_available(),
            # An iterator draws a seed for its workers: from here, so that the model's random
            # numbers do not depend on how often a loader was started.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def bytes_per_token(self, split: str) -> float:
        """Mean bytes of text that a token of the split stands for."""
        return self.splits[split].bytes_per_token

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the corpus: how to read its tokens, and in which order."""
        trainer = self.trainer
        accumulated = 1 if trainer is None else trainer.accumulate_grad_batches * trainer.world_size
        return {
            "tokenizer": self.tokenizer.state(),
            "sample_order": self.sample_order(accumulated, trainer.global_step if trainer else 0),
        }

    def sample_order(self, micro_batches_per_step: int, steps: int = 0) -> dict[str, Any]:
        """What decides which samples the first `steps` see, over all ranks: corpus, seed, sizes."""
        sequences = self.micro_batch_size * micro_batches_per_step
        return self.identity(steps * sequences) | {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "sequences_per_step": sequences,
            "pack": self.pack,
            "document_alignment": self.document_alignment if self.pack == "documents" else 1,
        }

    def identity(self, samples: int) -> dict[str, Any]:
        """What tells the tokens of the first so many training samples from those of others."""
        return identity(self._train_windows().begun(samples))

    def encode(self, text: str) -> list[int]:
        """Text as ids."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids as text."""
        return self.tokenizer.decode(ids)
