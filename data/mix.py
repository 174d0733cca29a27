"""Several corpora as one, each with its share of the samples."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from data.base import TokenDataModule
from data.mixture import PERIOD, MixedEvalWindows, MixedTrainWindows, Schedule, quotas
from data.shared_tokenizer import shared_tokenizer
from data.token_split import SPLITS

SHARED = ("vocab_size", "seq_len", "num_workers", "val_tokens", "test_tokens", "seed", "pack")


class MixDataModule(TokenDataModule):
    """A mixture of corpora: of any number of samples, each corpus has its share.

    What all corpora share is set here: tokenizer, vocabulary, seed, packing, and how many tokens of
    each validation and test split are scored. A validation loss is that of all their splits
    together; that of each is logged by its name.

    Args:
        corpora: configs of datamodules by their names, as `conf/data` has them.
        weights: each corpus's share of the samples, of any sum; None: by its training tokens.
        tokenizer: of all corpora that have one to choose, see `data.tokenizer.TokenizerChoice`;
            with train, one is trained on all of them, by their weights. None: each one's own. They
            must come to the same.
    """

    has_documents = True  # each corpus says for itself

    def __init__(
        self,
        *,
        corpora: Mapping[str, Mapping[str, Any]],
        weights: Mapping[str, float] | None = None,
        tokenizer: str | None = None,
        **numbers: Any,
    ) -> None:
        super().__init__(**numbers)
        check_names(corpora, weights)
        if tokenizer == "train" and not weights:
            raise ValueError(
                "data.tokenizer=train learns from each corpus of a mixture by its weight: give "
                "data.weights"
            )
        self._shared = {name: numbers[name] for name in SHARED if numbers.get(name) is not None}
        self._configs, self.tokenizer_name = corpora, tokenizer
        self.corpora = self._made(tokenizer)
        self.weights = dict(weights or {})
        self.quotas: dict[str, int] = {}
        self._mixed: MixedTrainWindows | None = None

    def source(self) -> dict[str, Any]:
        return {"corpus": "mix", "corpora": {n: c.source() for n, c in self.corpora.items()}}

    def build(self, folder: Path) -> None:
        """Never called: each corpus has shards of its own."""
        raise AssertionError("a mixture has no shards to build")

    def _made(self, tokenizer: str | None) -> dict[str, TokenDataModule]:
        """All corpora; those that have a tokenizer to choose with this one, unless it is None."""
        modules = {}
        for name, config in self._configs.items():
            chosen = (
                {} if tokenizer is None or "tokenizer" not in config else {"tokenizer": tokenizer}
            )
            modules[name] = made(f"data.corpora.{name}", config, self._shared | chosen)
            modules[name].label = name
        return modules

    def prepare_data(self, verify: bool = True) -> None:
        """Train the tokenizer where one is wanted, then prepare each corpus."""
        if self.tokenizer_name == "train" and not self._prepared:
            modules: dict[str, Any] = self.corpora  # all have one to choose: bytes are refused
            texts = {name: corpus.training_texts for name, corpus in modules.items()}
            path = shared_tokenizer(texts, self.weights, self.vocab_size, self.source())
            self.corpora, self._prepared = self._made(str(path)), True
        for name, corpus in self.corpora.items():
            with refusals_of(name):
                corpus.prepare_data(verify)

    def setup(self, stage: str | None = None) -> None:
        """Open all corpora, and settle their shares."""
        if self.quotas:
            return
        for name, corpus in self.corpora.items():
            corpus.document_alignment = self.document_alignment
            with refusals_of(name):
                corpus.setup(stage)
        first, *others = self.corpora
        self.tokenizer = self.corpora[first].tokenizer
        for name in others:
            if self.corpora[name].tokenizer.state() != self.tokenizer.state():
                raise ValueError(
                    f"data.corpora: {name} and {first} are split into different tokens: give all "
                    "of them one data.tokenizer"
                )
        self.quotas = quotas(self.weights or self._sizes())

    def _sizes(self) -> dict[str, int]:
        """The training tokens of each corpus."""
        for name, corpus in self.corpora.items():
            if corpus.chapters is None or not corpus.chapters.complete:
                raise ValueError(
                    f"data.weights is missing: corpora are weighed by their tokens without it, and "
                    f"those of {name} are still being prepared (data.corpora.{name}.chapter_tokens)"
                )
        return {n: c.chapters.num_tokens for n, c in self.corpora.items() if c.chapters}

    def prepare_rest(self) -> None:
        for corpus in self.corpora.values():
            corpus.prepare_rest()

    def teardown(self, stage: str) -> None:
        for corpus in self.corpora.values():
            corpus.teardown(stage)

    def identity(self, samples: int) -> dict[str, Any]:
        """Of the corpora, each after its own of the samples."""
        drawn = dict(zip(self.corpora, self._train_windows().schedule.drawn(samples), strict=True))
        found = {name: corpus.identity(drawn[name]) for name, corpus in self.corpora.items()}
        return {
            "corpus": found,
            "train_tokens": sum(each["train_tokens"] for each in found.values()),
            "quotas": dict(self.quotas),
        }

    def _share(self, name: str, samples: int) -> int:
        """How many of so many samples are of a corpus, to within a period."""
        return samples * self.quotas[name] // PERIOD

    def bytes_per_token(self, split: str) -> float:
        """Of training as its samples are drawn; of the other splits as they are together."""
        modules = self.corpora.values()
        if split == "train":
            shares = [self.quotas[name] / PERIOD for name in self.corpora]
        else:
            sizes = [len(corpus.splits[split]) for corpus in modules]
            shares = [size / sum(sizes) for size in sizes]
        return sum(
            share * corpus.bytes_per_token(split)
            for share, corpus in zip(shares, modules, strict=True)
        )

    def document_lengths(self) -> list[tuple[int, float]]:
        return [
            (length, share * self.quotas[name] / PERIOD)
            for name, corpus in self.corpora.items()
            for length, share in corpus.document_lengths()
        ]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each corpus has been gone through, to within a period."""
        return {
            name: part
            for name, corpus in self.corpora.items()
            for part in corpus.epochs(self._share(name, samples)).values()
        }

    def summary(self, samples: int) -> dict[str, str]:
        """Shares and epochs of the corpora, and how they are packed."""
        epochs, rows = self.epochs(samples), {}
        for name, corpus in self.corpora.items():
            own = corpus.summary(0).get("packed documents")
            parts = [f"{self.quotas[name] / PERIOD:.2%} of the samples"]
            parts += [f"{epochs[name]:.3g} epochs"] if name in epochs else []
            rows[f"corpus {name}"] = ", ".join(parts + ([own] if own else []))
        return rows

    def _train_windows(self) -> MixedTrainWindows:
        if self._mixed is None:
            windows = [corpus._train_windows() for corpus in self.corpora.values()]
            schedule = Schedule(list(self.quotas.values()), self.seed)
            self._mixed = MixedTrainWindows(windows, schedule)
        return self._mixed

    def _eval_windows(self, split: str) -> MixedEvalWindows:
        return MixedEvalWindows([corpus._eval_windows(split) for corpus in self.corpora.values()])


def made(option: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> TokenDataModule:
    """The corpus of a config; what it refuses itself with is said of its option."""
    try:
        corpus = instantiate(config, micro_batch_size=1, **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise ValueError(f"{option}: {error.__cause__}") from error
        raise
    if not corpus.is_text:
        raise ValueError(f"{option} is a task, not a corpus: take text")
    return corpus


@contextmanager
def refusals_of(name: str) -> Iterator[None]:
    """What a corpus refuses is said of it by its name: another one may be of the same kind."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.corpora.{name}: {error}") from error


def check_names(corpora: Mapping[str, Any], weights: Mapping[str, float] | None) -> None:
    """Refuse no corpora, names that stand for something else, and weights of others."""
    if not corpora:
        raise ValueError(
            "data.corpora is empty: name corpora, as in +data@data.corpora.code=stdlib "
            "+data@data.corpora.books=text data.corpora.books.paths=[books/*.txt]"
        )
    if taken := [name for name in corpora if name in ("loss", *SPLITS) or "/" in name]:
        raise ValueError(f"data.corpora.{taken[0]}: call it something else, it names its losses")
    if weights and set(weights) != set(corpora):
        raise ValueError(
            f"data.weights names {', '.join(weights)}, data.corpora {', '.join(corpora)}: give a "
            "weight for each corpus, or none at all to weigh them by their tokens"
        )
