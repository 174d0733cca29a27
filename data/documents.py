"""Text and documents as tokens, in batches of about `BATCH` bytes: a corpus is never held whole."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from data.permutation import mix
from data.shards import ShardWriter
from data.sources import Watch, join, pieces, release
from data.token_split import SPLITS
from data.tokenizer import AnyTokenizer

BATCH = 1 << 20  # bytes of documents tokenized together; a longer document is cut
MOST = 1 << 14  # documents tokenized together: of short ones, what is kept for each counts
PIECES = 8  # of a text, tokenized together
HELD = 1 << 25  # bytes read of mapped files before their memory is given back

Texts: TypeAlias = pa.StringArray | pa.LargeStringArray
OFFSETS: dict[Any, type[np.integer]] = {pa.string(): np.int32, pa.large_string(): np.int64}
SplitOf = Callable[[NDArray[np.uint64]], NDArray[np.str_]]  # of documents by their numbers


def documents(texts: Texts) -> Iterator[Texts]:
    """Documents in batches of at most `BATCH` bytes, without a copy; a longer one comes alone."""
    places = offsets(texts)
    start = 0
    while start < len(texts):
        most = places[start + 1 : start + 1 + MOST]
        stop = start + int(np.searchsorted(most, int(places[start]) + BATCH, side="right"))
        stop = max(stop, start + 1)
        yield texts[start:stop]
        start = stop


def with_text(texts: Texts) -> Texts:
    """The documents that are not empty; null has no bytes."""
    filled = np.diff(offsets(texts)) > 0
    return texts if filled.all() else texts.filter(pa.array(filled))


def offsets(texts: Texts) -> NDArray[np.integer]:
    """Where each document of an array begins in its bytes, and where the last one ends: [n + 1]."""
    every = np.frombuffer(texts.buffers()[1], OFFSETS[texts.type])
    return every[texts.offset : texts.offset + len(texts) + 1]


def text_bytes(texts: Texts) -> NDArray[np.uint8]:
    """The bytes of documents, one after the other, without a copy."""
    places = offsets(texts)
    return np.frombuffer(texts.buffers()[2] or b"", np.uint8)[places[0] : places[-1]]


def text_strings(texts: Texts) -> Iterator[str]:
    """Documents as strings, a long one in pieces."""
    for start, stop in pairwise(offsets(texts).tolist()):
        document = np.frombuffer(texts.buffers()[2], np.uint8)[start:stop]
        yield from (piece.decode() for piece in pieces(document))


def write_text(
    writer: ShardWriter, tokenizer: AnyTokenizer, split: str, text: NDArray[np.uint8]
) -> None:
    """Tokenize one text [n], given as bytes, with a progress bar."""
    parts, held = pieces(text), 0
    mapped = [str(text.filename)] if isinstance(text, np.memmap) else []
    with tqdm(total=len(text), desc=f"tokenize {split}", unit="B", unit_scale=True, delay=1) as bar:
        while batch := list(islice(parts, PIECES)):
            size = sum(map(len, batch))
            writer.append(split, tokenizer.encode_bytes(batch), size)
            bar.update(size)
            held += size
            if held >= HELD:
                held = release(mapped)


def write_document(
    writer: ShardWriter, tokenizer: AnyTokenizer, split: str, text: NDArray[np.uint8]
) -> None:
    """Tokenize one document [n], in pieces, and the end of text after it."""
    writer.begin_documents(split, np.array([writer.num_tokens(split)]))
    write_text(writer, tokenizer, split, text)
    writer.append(split, np.array([tokenizer.eot]), 1)


def write_files(
    writer: ShardWriter, tokenizer: AnyTokenizer, splits: Mapping[Path, str], watch: Watch | None
) -> None:
    """Each file, packed or plain, as a document of its split; `watch` is shown every block.

    A file is mapped, unpacked, from the folder of the tokens: one may be larger than the memory.
    """
    with tempfile.TemporaryDirectory(dir=writer.folder) as scratch:
        for file, split in tqdm(splits.items(), desc="tokenize", unit=" files", delay=1):
            text = join([file], Path(scratch) / "document", watch)
            if len(text):
                write_document(writer, tokenizer, split, text)


class Unread:
    """Documents that are still to be written; of a batch as many may be taken as are wanted.

    Args:
        batches: all documents.
        taken: of these, how many from the first on were taken before.
    """

    def __init__(self, batches: Iterable[Texts], taken: int = 0) -> None:
        self.taken = 0
        self._batches, self._rest = iter(batches), None
        while self.taken < taken and (batch := self.next()) is not None:
            self.take(min(len(batch), taken - self.taken))

    def next(self) -> Texts | None:
        """The next documents, [n]; None at the end."""
        if self._rest is None:
            self._rest = next(self._batches, None)
        return self._rest

    def take(self, count: int) -> None:
        """Leave out the first `count` of those that `next` gave."""
        assert self._rest is not None
        self.taken += count
        self._rest = self._rest[count:] if count < len(self._rest) else None


def write_documents(
    writer: ShardWriter,
    tokenizer: AnyTokenizer,
    unread: Unread,
    split_of: SplitOf,
    max_tokens: int | None,
) -> None:
    """Tokenize documents, an end of text after each; `split_of` gives the splits of numbers.

    Stops at the document with which a split reaches `max_tokens`; it is kept whole. An end of text
    counts as one byte, like the line feed that would join two documents in a file. A document of
    more than `BATCH` bytes is tokenized in pieces, cut between characters.
    """
    while (batch := unread.next()) is not None:
        splits = split_of(np.arange(unread.taken, unread.taken + len(batch), dtype=np.uint64))
        if len(text_bytes(batch)) > BATCH:
            write_document(writer, tokenizer, splits[0], text_bytes(batch))
            kept = 1
        else:
            kept = write_batch(writer, tokenizer, batch, splits, max_tokens)
        unread.take(kept)
        full = max_tokens is not None and max(map(writer.num_tokens, named(splits))) >= max_tokens
        if kept < len(batch) or full:
            return


def write_batch(
    writer: ShardWriter,
    tokenizer: AnyTokenizer,
    batch: Texts,
    splits: NDArray[np.str_],
    max_tokens: int | None,
) -> int:
    """Tokenize documents until a split has `max_tokens`; returns how many were taken."""
    ids, sizes = tokenizer.encode_documents(text_bytes(batch), offsets(batch) - offsets(batch)[0])
    kept = len(batch)
    for split in named(splits) if max_tokens is not None else ():
        reached = writer.num_tokens(split) + np.cumsum(sizes * (splits == split)) >= max_tokens
        kept = min(kept, int(reached.argmax()) + 1) if reached.any() else kept
    num_bytes = np.diff(offsets(batch))[:kept] + 1
    splits, sizes = splits[:kept], sizes[:kept]
    for split in named(splits):
        chosen = splits == split
        tokens = ids[: sizes.sum()]
        tokens = tokens if chosen.all() else tokens[np.repeat(chosen, sizes)]
        ends = writer.num_tokens(split) + np.cumsum(sizes[chosen])
        writer.begin_documents(split, ends - sizes[chosen])
        writer.append(split, tokens, int(num_bytes[chosen].sum()))
    return kept


def only(split: str) -> SplitOf:
    """Every document in one split."""
    return lambda numbers: np.full(len(numbers), split)


def drawn_splits(numbers: NDArray[np.uint64], fractions: Mapping[str, float]) -> NDArray[np.str_]:
    """The splits of documents, drawn from their numbers alone; train is what is left."""
    draws = mix(numbers) / 2**64
    splits = np.full(len(numbers), "train")
    below = 0.0
    for split, fraction in fractions.items():
        splits[(below <= draws) & (draws < below + fraction)] = split
        below += fraction
    return splits


def check_eot(tokenizer: AnyTokenizer, name: str) -> None:
    """Refuse a tokenizer that has nothing to end a document with."""
    if tokenizer.eot is None:
        raise ValueError(
            f"data.tokenizer={name!r} names no end of text, which documents are joined by: "
            "set data.eot_token"
        )


def named(splits: NDArray[np.str_]) -> list[str]:
    """The splits that documents are in."""
    return [split for split in SPLITS if (splits == split).any()]
