"""The corpora: enwik8, the standard library, text files, Hugging Face datasets."""

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import enwik8, sources
from data.background import Background
from data.base import TokenDataModule
from data.checks import check_at_least, check_fractions
from data.documents import check_eot, write_files, write_text
from data.huggingface import DatasetChoice
from data.plain_text import Decoding, check_text
from data.preparation import Preparation
from data.shards import cache_root
from data.sources import unpacked
from data.token_split import SPLITS
from data.tokenizer import ByteTokenizer, TokenizerChoice


class Enwik8DataModule(TokenDataModule):
    """enwik8 by the byte: the first 90 % to train on, 5 to validate, 5 to test.

    Args:
        path: a local copy (plain, .gz, .bz2, .xz, .zst or .zip); None: download it, once.
    """

    def __init__(self, *, path: str | None = None, **numbers: Any) -> None:
        super().__init__(**numbers)
        TokenizerChoice("bytes", self.vocab_size)  # refuses another size
        if path is not None:
            sources.expand("data.path", [path])
        self.path = path

    def source(self) -> dict[str, Any]:
        return {"corpus": "enwik8", "sha256": enwik8.SHA256}

    def build(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            corpus = enwik8.unpack(self.path, cache_root() / "downloads", Path(scratch) / "enwik8")
            cuts = [len(corpus) * percent // 100 for percent in (0, 90, 95, 100)]
            with self.writer(folder, ByteTokenizer()) as writer:
                for split, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
                    write_text(writer, ByteTokenizer(), split, corpus[start:stop])


class StdlibDataModule(TokenDataModule):
    """The source text of the running Python's standard library, by the byte; needs no network.

    Whole files go to a split, about 90, 5 and 5 % of the bytes, one after the other in the order of
    their paths. Tests and generated tables are left out. With `pack="documents"` a file is a
    document, and ends with the end of text.
    """

    has_documents = True

    def __init__(self, **numbers: Any) -> None:
        super().__init__(**numbers)
        TokenizerChoice("bytes", self.vocab_size)  # refuses another size

    def source(self) -> dict[str, Any]:
        sizes = [[name, file.stat().st_size] for name, file in sources.stdlib_files().items()]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
        source = {"corpus": "stdlib", "python": platform.python_version(), "files": digest}
        return source | self.of_documents()

    def build(self, folder: Path) -> None:
        files = sources.stdlib_files()
        sizes = {name: file.stat().st_size for name, file in files.items()}
        splits = sources.split_files(sizes, val=0.05, test=0.05)
        with self.writer(folder, ByteTokenizer()) as writer:
            if self.pack == "documents":
                by_file = {file: splits[name] for name, file in files.items()}
                write_files(writer, ByteTokenizer(), by_file, watch=None)
                return
            for name, file in files.items():
                text = np.fromfile(file, np.uint8)
                writer.append(splits[name], text, len(text))


class TextDataModule(TokenDataModule):
    """Text files of one's own, read as one stream: file follows file, with nothing between them.

    With `pack="documents"` each file is a document and ends with the end of text; the fractions of
    `paths` are then of whole files.

    Args:
        paths: files or globs, plain, .gz, .bz2, .xz, .zst or .zip (of one file).
        val_paths, test_paths: the same for the other splits. Where empty, the split is cut off the
            end of `paths`: train, then val, then test.
        val_fraction, test_fraction: of the bytes of `paths`, for a split without paths.
        tokenizer: see `data.tokenizer.TokenizerChoice`; with train it learns from the train split.
    """

    has_documents = True
    more_text = "name more files in data.paths"
    more_held_out = "raise data.val_fraction and data.test_fraction"

    def __init__(
        self,
        *,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        test_paths: str | list[str] | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        tokenizer: str = "bytes",
        **numbers: Any,
    ) -> None:
        super().__init__(**numbers)
        self.tokenizer_choice = TokenizerChoice(tokenizer, self.vocab_size)
        self.fractions = check_fractions(val_fraction, test_fraction)
        if not paths:
            raise ValueError(
                "data.paths is empty: name files or globs, as in data.paths=[book.txt]"
            )
        self.files: dict[str, list[Path]] = {}
        for option, given in (
            ("paths", paths),
            ("val_paths", val_paths),
            ("test_paths", test_paths),
        ):
            patterns = [given] if isinstance(given, str) else list(given or [])
            self.files[option] = sources.expand(f"data.{option}", patterns)
            for file in self.files[option]:
                check_text(f"data.{option}", file)
            for other in [name for name in self.files if name != option]:
                if shared := {*self.files[other]} & {*self.files[option]}:
                    raise ValueError(f"data.{option}: {min(shared)} is in data.{other}, too")

    def source(self) -> dict[str, Any]:
        return {
            "corpus": "text",
            "files": {option: sources.stamp(files) for option, files in self.files.items()},
            "fractions": self.fractions,
            "tokenizer": self.tokenizer_choice.source(),
            **self.of_documents(),
        }

    def build(self, folder: Path) -> None:
        if self.pack == "documents":
            self._build_documents(folder)
            return
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            texts = self._texts(Path(scratch))
            training = sources.pieces(texts["train"])
            tokenizer = self.tokenizer_choice.make(lambda: sources.decoded(training))
            with self.writer(folder, tokenizer) as writer:
                for split, text in texts.items():
                    write_text(writer, tokenizer, split, text)

    def training_texts(self) -> Iterator[str]:
        """The text of the train split, in pieces: what a tokenizer learns from."""
        if self.pack == "documents":
            training = [file for file, split in self._splits_of_files().items() if split == "train"]
            yield from sources.decoded(chain.from_iterable(map(unpacked, training)))
            return
        with tempfile.TemporaryDirectory(dir=cache_root()) as scratch:
            yield from sources.decoded(sources.pieces(self._texts(Path(scratch))["train"]))

    def _build_documents(self, folder: Path) -> None:
        splits = self._splits_of_files()
        tokenizer = self.tokenizer_choice.make(self.training_texts)
        check_eot(tokenizer, self.tokenizer_choice.name)
        decoding = Decoding()
        watch = None if self.tokenizer_choice.name == "bytes" else decoding.count
        with self.writer(folder, tokenizer) as writer:
            write_files(writer, tokenizer, splits, watch)
        decoding.check()

    def _splits_of_files(self) -> dict[Path, str]:
        """File -> split: those named for one, and a fraction of `paths` for each of the others."""
        named = {s: self.files[f"{s}_paths"] for s in ("val", "test")}
        cut = {s: 0.0 if named[s] else fraction for s, fraction in self.fractions.items()}
        sizes = {str(file): file.stat().st_size for file in self.files["paths"]}
        splits = {Path(f): s for f, s in sources.split_files(sizes, **cut).items()}
        return splits | {file: s for s, files in named.items() for file in files}

    def _texts(self, scratch: Path) -> dict[str, NDArray[np.uint8]]:
        """The bytes of each split, mapped from one joined file per list of paths."""
        decoding = Decoding()
        watch = None if self.tokenizer_choice.name == "bytes" else decoding.count
        whole = sources.join(self.files["paths"], scratch / "paths", watch)
        texts, stop = {}, len(whole)
        for split in ("test", "val"):
            if files := self.files[f"{split}_paths"]:
                texts[split] = sources.join(files, scratch / split, watch)
            else:
                size = int(len(whole) * self.fractions[split])
                start = sources.character_start(whole, stop - size)
                texts[split], stop = whole[start:stop], start
        decoding.check()
        return {"train": whole[:stop], "val": texts["val"], "test": texts["test"]}


class HuggingFaceDataModule(TokenDataModule):
    """A Hugging Face dataset with a column of text: a document a row, an end of text after each.

    Args:
        name: a dataset on the hub; a builder (json, parquet, csv, text) with `data_files`; a
            folder, also one that `save_to_disk` wrote.
        config: the dataset's configuration, where it has several.
        data_files: files, globs or URLs, or a mapping from split to these.
        revision: branch, tag or commit of a dataset on the hub.
        train_split, val_split, test_split: the dataset's names for them. None: a fraction of the
            training documents is kept out of training.
        val_fraction, test_fraction: of the training documents, for a split without a name.
        text_column: the column.
        streaming: take rows as they arrive, without a copy of the dataset on this disk. Files on
            this disk are always read where they are, but for parts of splits (train[:90%]).
        max_tokens: end a split with the document that reaches so many tokens; None: take all.
        chapter_tokens: training begins with so many tokens, while the next ones are prepared, and
            so on, chapter by chapter; what is held out by fractions is of the first chapter. None:
            all is prepared first.
        shuffle_seed: shuffle the documents before they are written (a stream: its files, and the
            documents of each 16 MB); None: keep their order.
        tokenizer, eot_token: see `data.tokenizer.TokenizerChoice`; train learns from the documents
            of the train split.
    """

    has_documents = True

    def __init__(
        self,
        *,
        name: str | None,
        config: str | None = None,
        data_files: Any = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        text_column: str = "text",
        streaming: bool = False,
        max_tokens: int | None = None,
        chapter_tokens: int | None = None,
        shuffle_seed: int | None = None,
        tokenizer: str = "bytes",
        eot_token: str | None = None,
        **numbers: Any,
    ) -> None:
        if not name:
            raise ValueError(
                "data.name is missing: name a dataset, as in data.name=roneneldan/TinyStories, "
                "or a builder with files, as in data.name=json data.data_files=corpus.jsonl"
            )
        super().__init__(name=name, **numbers)
        for option, value in (("max_tokens", max_tokens), ("chapter_tokens", chapter_tokens)):
            if value is not None:
                check_at_least(f"data.{option}", value, 1)
        dataset = DatasetChoice(
            name, config, data_files, revision, text_column, streaming, shuffle_seed
        )
        split_names = {"train": train_split, "val": val_split, "test": test_split}
        self.preparation = Preparation(
            dataset,
            TokenizerChoice(tokenizer, self.vocab_size, eot_token),
            split_names,
            check_fractions(val_fraction, test_fraction),
            max_tokens,
            chapter_tokens,
        )
        limit = "data.max_tokens" if chapter_tokens is None else "data.chapter_tokens"
        self.more_text = f"raise {limit}, or take a larger dataset"
        self.more_held_out = f"raise {limit}, data.val_fraction or data.test_fraction"
        dataset.check_files()
        dataset.check_splits(split_names)

    def source(self) -> dict[str, Any]:
        return self.preparation.source()

    def build(self, folder: Path) -> None:
        self.preparation.build(folder)

    def training_texts(self) -> Iterator[str]:
        """The documents of the train split: what a tokenizer learns from."""
        return self.preparation.training_texts()

    def prepare_rest(self) -> None:
        windows = self._train_windows()
        if windows.preparation is None and not windows.chapters.complete:
            work = partial(self.preparation.build_rest, windows.chapters.folder)
            windows.preparation = Background(work)

    def teardown(self, stage: str) -> None:
        """Training is over: nobody waits for more of the corpus."""
        if stage == "fit" and self._windows is not None:
            self._windows.stop_preparation()
