"""Text to token ids and back: bytes, a named tokenizer, or a byte-level BPE trained on the spot.

All have `vocab_size`, `eot` (the id that ends a document, or None), `encode`, `encode_bytes`
(the pieces of a text), `encode_documents` and `decode`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import hub
from data.shards import file_sha256
from data.sources import local_files, stamp

Ids = NDArray[np.integer]
Bytes = NDArray[np.uint8]

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
TRAINING_CHARACTERS = 1 << 25  # a tokenizer learns from; its words are held in memory


class ByteTokenizer:
    """UTF-8 bytes as they are. Documents end with byte 0, which text does not hold."""

    vocab_size = 256
    eot = 0

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`; bytes that Python carries as surrogates come back as they were."""
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_documents(self, text: Bytes, places: Ids) -> tuple[Ids, Ids]:
        """The bytes of documents, byte 0 after each, and how many each has with it.

        Document i is text[places[i] : places[i + 1]].
        """
        return np.insert(text, places[1:], self.eot), np.diff(places) + 1

    def encode_bytes(self, pieces: list[bytes]) -> NDArray[np.integer]:
        """The pieces of a text, one after the other, byte for byte."""
        return np.frombuffer(b"".join(pieces), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; what is no UTF-8 reads as U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> dict[str, Any] | None:
        """Bytes need no file."""
        return None

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, for `restored_tokenizer`: bytes need nothing."""
        return None


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, without padding, truncation or added tokens."""

    def __init__(self, tokenizer: Tokenizer, eot: int | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.eot = eot
        if not tokenizer.get_vocab_size():
            raise ValueError("it has no tokens")
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, text: Bytes, places: Ids) -> tuple[Ids, Ids]:
        """The ids of documents, the end of text after each, and how many each has with it."""
        assert self.eot is not None
        raw, borders = text.tobytes(), itertools.pairwise(places.tolist())
        rows = self.encode_batch([raw[start:stop].decode() for start, stop in borders])
        ids = np.fromiter((i for row in rows for i in (*row, self.eot)), np.int64)
        return ids, np.array([len(row) + 1 for row in rows])

    def encode_bytes(self, pieces: list[bytes]) -> NDArray[np.integer]:
        """The ids of the pieces of a text, in one row; what is no UTF-8 reads as U+FFFD."""
        return np.concatenate(self.encode_batch([p.decode("utf-8", "replace") for p in pieces]))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> dict[str, Any] | None:
        """Keep the tokenizer beside the tokens it made; returns what the index says of it."""
        path = folder / TOKENIZER_FILE
        self.tokenizer.save(str(path))
        return {"file": TOKENIZER_FILE, "sha256": file_sha256(path), "eot": self.eot}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, for `restored_tokenizer`: the whole tokenizer.json."""
        return {"json": self.tokenizer.to_str(), "eot": self.eot}


AnyTokenizer = ByteTokenizer | SubwordTokenizer


def saved_tokenizer(folder: Path, entry: dict[str, Any] | None) -> AnyTokenizer:
    """The tokenizer that made the tokens of a folder, from its entry in the index."""
    if entry is None:
        return ByteTokenizer()
    return SubwordTokenizer(Tokenizer.from_file(str(folder / entry["file"])), entry["eot"])


def restored_tokenizer(state: dict[str, Any] | None) -> AnyTokenizer:
    """The inverse of `state`."""
    if state is None:
        return ByteTokenizer()
    return SubwordTokenizer(Tokenizer.from_str(state["json"]), state["eot"])


@dataclass(frozen=True)
class TokenizerChoice:
    """The options data.tokenizer, data.vocab_size and data.eot_token, checked before any work.

    Args:
        name: bytes, train (a byte-level BPE learned on the spot), or what `load_tokenizer` loads.
        vocab_size: the size to train; a tokenizer that is loaded may have fewer tokens, not more.
        eot_token: the token that ends a document; None: the tokenizer's own.
    """

    name: str
    vocab_size: int
    eot_token: str | None = None

    def __post_init__(self) -> None:
        if self.name == "bytes" and self.vocab_size != ByteTokenizer.vocab_size:
            raise ValueError(f"data.vocab_size={self.vocab_size} must be 256 for bytes")
        if self.name == "train" and self.vocab_size < 257:
            raise ValueError(
                f"data.vocab_size={self.vocab_size} must be at least 257 (256 bytes and the end of "
                "text) where data.tokenizer=train, for example data.vocab_size=8192"
            )
        if self.name in ("bytes", "train") and self.eot_token is not None:
            raise ValueError(
                f"data.eot_token={self.eot_token!r} is for a tokenizer that is loaded: "
                f"data.tokenizer={self.name} has its own"
            )

    def source(self) -> dict[str, Any]:
        """What the ids depend on."""
        source = asdict(self) | {"files": stamp(local_files([self.name]))}
        if self.name == "train":
            source["characters"] = TRAINING_CHARACTERS
        else:
            del source["vocab_size"]  # it does not change the ids
        return source

    def make(self, texts: Callable[[], Iterable[str]]) -> AnyTokenizer:
        """The tokenizer; `texts` gives the text to learn from, where it is learned."""
        if self.name == "bytes":
            return ByteTokenizer()
        if self.name == "train":
            return train_tokenizer(texts(), self.vocab_size)
        return load_tokenizer(self.name, self.vocab_size, self.eot_token)


def load_tokenizer(name: str, vocab_size: int, eot_token: str | None) -> SubwordTokenizer:
    """A tokenizer.json, a folder, or a name on the Hugging Face hub.

    Raises:
        ValueError: it cannot be loaded, has no fast form, or has more than `vocab_size` tokens.
    """
    try:
        loaded = _load_subword(name)
    except Exception as error:  # the libraries raise anything, Exception itself too
        raise ValueError(
            f"data.tokenizer={name!r} cannot be loaded: {error}. Give bytes, train, a "
            "tokenizer.json, a folder, or a name on the hub"
        ) from error
    if eot_token is not None:
        loaded.eot = loaded.tokenizer.token_to_id(eot_token)
        if loaded.eot is None:
            raise ValueError(
                f"data.eot_token={eot_token!r} is not a token of data.tokenizer={name!r}"
            )
    if vocab_size < loaded.vocab_size:
        raise ValueError(
            f"data.vocab_size={vocab_size} is too small: data.tokenizer={name!r} has "
            f"{loaded.vocab_size} tokens. Set data.vocab_size={loaded.vocab_size}, or more"
        )
    return loaded


def _load_subword(name: str) -> SubwordTokenizer:
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "tokenizer_config.json").exists():
        path = path / TOKENIZER_FILE
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        tokenizer = Tokenizer.from_file(str(path))
        return SubwordTokenizer(tokenizer, tokenizer.token_to_id(END_OF_TEXT))
    from transformers import AutoTokenizer  # takes seconds to import

    with nullcontext() if path.is_dir() else hub.asked_once():
        found = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    if not found.is_fast:
        raise ValueError("it has no fast form, which is what is used here")
    return SubwordTokenizer(found.backend_tokenizer, found.eos_token_id)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the end of text among them.

    It learns from the first `TRAINING_CHARACTERS` of `texts`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(_first(texts, TRAINING_CHARACTERS), trainer)
    return SubwordTokenizer(tokenizer, tokenizer.token_to_id(END_OF_TEXT))


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text
