"""One tokenizer for the corpora of a mixture, trained on text of all of them by their weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from data.shards import build_whole, lock_of, make_cache, shard_folder
from data.tokenizer import TOKENIZER_FILE, TRAINING_CHARACTERS, train_tokenizer
from runs.file_lock import held

Texts = Callable[[], Iterable[str]]


def shared_tokenizer(
    texts: Mapping[str, Texts], weights: Mapping[str, float], vocab_size: int, source: Any
) -> Path:
    """The tokenizer.json in the data cache; trained once for a `source`, by one process.

    Each corpus gives the first of its training texts, as many characters as is its share of
    `TRAINING_CHARACTERS`, or all that it has.
    """
    folder = shard_folder("tokenizer", {"source": source, "weights": weights, "size": vocab_size})
    make_cache(folder.parent)
    with held(lock_of(folder)):
        if not folder.exists():
            whole = sum(weights.values())
            parts = {n: int(TRAINING_CHARACTERS * weights[n] / whole) for n in texts}
            sample = chain.from_iterable(first(texts[n](), parts[n]) for n in texts)
            build_whole(folder, train_tokenizer(sample, vocab_size).save)
    return folder / TOKENIZER_FILE


def first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first so many characters of texts."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return
