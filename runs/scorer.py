"""How an evaluation reads a split and scores a model on it.

T labels in a window; their tokens are T + 1.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from data.base import TokenDataModule
from data.mixture import MixedEvalWindows
from data.packing import PackedEvalWindows, packing_of
from data.sampler import EvalWindows
from data.tasks.datamodule import RecallDataModule
from nsa.training.label_sums import (
    AUTO,
    NOT_SCORED,
    LabelSums,
    label_sums,
    resolve_cross_entropy,
)
from nsa.transformer import Transformer, sparse_layers

Window = dict[str, Tensor]  # tokens [T + 1]; where needed also scored [T], document_starts [T]


class Scorer:
    """A model on its device, a split of its corpus, and how both are read.

    Args:
        model, corpus: as loaded.
        options: those of evaluate.py.
        window: T, labels in a window.
    """

    def __init__(
        self, model: Transformer, corpus: TokenDataModule, options: Any, window: int
    ) -> None:
        self.model, self.corpus, self.options, self.window = model.eval(), corpus, options, window
        self.device = model.embedding.weight.device
        self.metric = corpus.metric
        self.cross_entropy = resolve_cross_entropy(AUTO, model.head.out_features)
        self.layers = sparse_layers(model)

    def protocol(self, device: torch.device) -> dict[str, Any]:
        """How everything is scored."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {
            "corpus": self.corpus.name,
            "split": self.options.split,
            "metric": self.metric.name,
            "window": self.window,
            "max_tokens": self.options.max_tokens,
            "precision": self.options.precision,
            "device": name,
        }

    def autocast(self) -> torch.autocast:
        mixed = self.options.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def score(self, windows: Sequence[Window], about: str, batch: int | None = None) -> float:
        """The metric over all scored labels of some windows."""
        return self.value(*self.totals(windows, about, batch))

    def totals(
        self, windows: Sequence[Window], about: str, batch: int | None = None
    ) -> tuple[float, float, float]:
        """Nats, labels and right ones of some windows."""
        totals = torch.zeros(3, dtype=torch.float64)
        for each in self.batches(windows, about, batch):
            sums = self.sums(each, counts_correct=True)
            totals += torch.stack([part.double().cpu() for part in sums[:3] if part is not None])
        nats, labels, correct = totals.tolist()
        return nats, labels, correct

    @torch.no_grad()
    def sums(self, batch: Window, *, counts_correct: bool = False) -> LabelSums:
        """What the model scores on a batch, and on each of its labels."""
        with self.autocast():
            return label_sums(
                self.model, batch["tokens"], batch.get("scored"),
                document_starts=batch.get("document_starts"),
                counts_correct=counts_correct, cross_entropy=self.cross_entropy,
            )  # fmt: skip

    def batches(
        self, windows: Sequence[Window], about: str, batch: int | None = None
    ) -> Iterator[Window]:
        """Windows side by side on the device; progress on stderr."""
        size = batch or self.options.batch
        starts = range(0, len(windows), size)
        for start in tqdm(starts, about, leave=False, file=sys.stderr, unit="batch"):
            stop = min(start + size, len(windows))
            each = default_collate([windows[number] for number in range(start, stop)])
            yield {name: array.to(self.device) for name, array in each.items()}

    @property
    def corpora(self) -> dict[str, TokenDataModule]:
        """Those of a mixture, by their names, or the one that there is."""
        return getattr(self.corpus, "corpora", {}) or {self.corpus.name: self.corpus}

    @property
    def slides(self) -> bool:
        """Whether the split is one text, over which windows can slide."""
        return len(self.corpora) == 1 and self.corpus.pack == "stream"

    def split(self) -> Sequence[Window]:
        """The windows of the split, side by side; of a mixture, one corpus after the other."""
        if isinstance(self.corpus, RecallDataModule):
            return windows_of(self.corpus, self.options.split)
        windows = [self.windows(corpus) for corpus in self.corpora.values()]
        return windows[0] if len(windows) == 1 else MixedEvalWindows(windows)  # type: ignore

    def windows(self, corpus: TokenDataModule) -> Sequence[Window]:
        """Those of one corpus of text, packed as in training."""
        split, limit = corpus.splits[self.options.split], self.options.max_tokens
        if corpus.pack == "documents":
            packing = packing_of(split, self.window, corpus.document_alignment, limit)
            return PackedEvalWindows(split, packing)  # type: ignore[return-value]
        return EvalWindows(split, self.window, limit)  # type: ignore[return-value]

    def sample(self) -> list[Window]:
        """`sample_windows` windows, evenly spread; the last one, which may be short, if all are."""
        windows = self.split()
        count = min(self.options.sample_windows, len(windows))
        return [windows[number * len(windows) // count] for number in range(count)]

    def value(
        self, nats: float, labels: float, correct: float, corpus: TokenDataModule | None = None
    ) -> float:
        """Totals in the metric of the data; those of one corpus of a mixture by its own bytes."""
        per_token = (corpus or self.corpus).bytes_per_token(self.options.split)
        return self.metric.of(nats / labels, correct / labels, per_token)


def windows_of(task: RecallDataModule, split: str) -> Sequence[Window]:
    """Of validation or test; training is endless."""
    loader = task.val_dataloader() if split == "val" else task.test_dataloader()
    return loader.dataset  # type: ignore[return-value]


class SlidingWindows:
    """Window number -> tokens from number·stride on; all but the first score their last labels."""

    def __init__(self, scorer: Scorer, stride: int) -> None:
        split, limit = scorer.corpus.splits[scorer.options.split], scorer.options.max_tokens
        self.split, self.window, self.stride = split, scorer.window, stride
        self.num_tokens = len(split) if limit is None else min(limit, len(split))

    def __len__(self) -> int:
        beyond_first = self.num_tokens - 1 - self.window
        return 1 + max(0, -(-beyond_first // self.stride))

    def __getitem__(self, number: int) -> Window:
        start = number * self.stride
        read = self.split.read(start, min(start + self.window + 1, self.num_tokens))
        tokens = torch.full((self.window + 1,), NOT_SCORED)
        tokens[: len(read)] = torch.from_numpy(read)
        first = self.window - self.stride if number else 0
        return {"tokens": tokens, "scored": torch.arange(self.window) >= first}
