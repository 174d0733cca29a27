"""Documents in another order, a pure function of a seed; few of them are in memory at once."""

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.documents import BATCH, HELD, Texts, documents, offsets, text_bytes
from data.permutation import mix, permuted_each
from data.shards import cache_root

WINDOW = 1 << 24  # bytes of documents that are shuffled in memory
BUCKETS = 64
DRAWN = 1 << 14  # places in the order, computed at once


def shuffled(batches: Iterable[Texts], key: int) -> Iterator[Texts]:
    """All documents in another order.

    Each is written to a bucket, drawn from its number; then the buckets are read one by one, and
    their documents shuffled in memory. A bucket that is too large for that is divided again.
    Buckets are nameless files in the cache folder.
    """
    with ExitStack() as opened:
        new = partial(tempfile.TemporaryFile, dir=cache_root())
        files = [opened.enter_context(new()) for _ in range(2 * BUCKETS)]
        buckets = [Bucket(*two) for two in zip(files[::2], files[1::2], strict=True)]
        _scatter(batches, buckets, key)
        for number, bucket in enumerate(buckets):
            own_key = mix(number, key)
            if bucket.size > WINDOW and bucket.count > 1:
                yield from shuffled(bucket.batches(), own_key)
            elif bucket.count:
                yield from gathered(bucket.read(), own_key)
            bucket.close()


def _scatter(batches: Iterable[Texts], buckets: list["Bucket"], key: int) -> None:
    number = 0
    for batch in batches:
        numbers = np.arange(number, number + len(batch), dtype=np.uint64)
        number += len(batch)
        drawn = (mix(key, numbers) % len(buckets)).astype(np.int64)
        texts = taken(batch, np.argsort(drawn, kind="stable"))
        stops = np.cumsum(np.bincount(drawn, minlength=len(buckets)))
        for bucket in set(drawn.tolist()):
            buckets[bucket].write(texts[stops[bucket - 1] if bucket else 0 : stops[bucket]])


def shuffled_stream(batches: Iterable[Texts], key: int) -> Iterator[Texts]:
    """Documents as they arrive, shuffled among those of each `WINDOW` bytes."""
    held, size, number = [], 0, 0
    for batch in batches:
        held.append(batch.cast(pa.large_string()))
        size += len(text_bytes(batch))
        if size >= WINDOW:
            yield from gathered(pa.concat_arrays(held), mix(key, number))
            held, size, number = [], 0, number + 1
    if held:
        yield from gathered(pa.concat_arrays(held), mix(key, number))


def gathered(texts: Texts, key: int) -> Iterator[Texts]:
    """The documents in an order that `key` chooses, in batches of at most `BATCH` bytes."""
    sizes = np.diff(offsets(texts))
    for start in range(0, len(texts), DRAWN):
        numbers = np.arange(start, min(start + DRAWN, len(texts)), dtype=np.uint64)
        order = permuted_each(numbers, len(texts), key).astype(np.int64)
        while len(order):
            count = max(1, int(np.searchsorted(np.cumsum(sizes[order]), BATCH, side="right")))
            yield taken(texts, order[:count])
            order = order[count:]


def taken(texts: Texts, order: NDArray[np.int64]) -> Texts:
    """The documents with the numbers `order`; a single one is not copied."""
    return texts[order[0] : order[0] + 1] if len(order) == 1 else texts.take(pa.array(order))


class Bucket:
    """Documents in two files: their bytes, one after the other, and where each ends."""

    def __init__(self, texts: BinaryIO, ends: BinaryIO) -> None:
        self.count = self.size = 0
        self.texts, self.ends = texts, ends
        self.ends.write(np.int64(0).tobytes())

    def write(self, texts: Texts) -> None:
        """Add documents."""
        places = offsets(texts).astype(np.int64)
        self.ends.write((places[1:] - places[0] + self.size).tobytes())
        self.texts.write(text_bytes(texts).data)
        self.count += len(texts)
        self.size += int(places[-1] - places[0])

    def read(self) -> Texts:
        """All of its documents, mapped; there is at least one."""
        return self._mapped()[0]

    def batches(self) -> Iterator[Texts]:
        """Its documents in batches, whose memory is given back as they are read."""
        texts, maps = self._mapped()
        held = 0
        for batch in documents(texts):
            yield batch
            held += len(text_bytes(batch))
            if held >= HELD:
                held = 0
                for mapped in maps:
                    mapped.madvise(mmap.MADV_DONTNEED)  # it stays in the file

    def close(self) -> None:
        """Remove the files; what is mapped stays until it is let go."""
        self.texts.close()
        self.ends.close()

    def _mapped(self) -> tuple[Texts, list[mmap.mmap]]:
        maps = []
        for file in (self.ends, self.texts):
            file.flush()
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        buffers = [pa.py_buffer(mapped) for mapped in maps]
        return pa.LargeStringArray.from_buffers(self.count, *buffers), maps
