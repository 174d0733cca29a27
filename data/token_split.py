"""One split of a corpus, read as a single sequence of tokens."""

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")


class TokenSplit:
    """One split as a single sequence of tokens, in however many shards it lies.

    Shards are mapped when first read, so that every loader worker opens its own.

    `has_documents` says whether it is known where documents begin.
    """

    def __init__(self, folder: Path, dtype: str, entry: dict[str, Any]) -> None:
        self.dtype = np.dtype(dtype)
        self.bytes_per_token: float = entry["bytes_per_token"]
        self.files = [folder / shard["file"] for shard in entry["shards"]]
        self.starts = [0]
        for shard in entry["shards"]:
            self.starts.append(self.starts[-1] + shard["tokens"])
        self._maps: dict[int, NDArray[np.integer]] = {}
        found = entry.get("documents")
        self._documents = folder / found["file"] if found else None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    @property
    def has_documents(self) -> bool:
        return self._documents is not None

    def documents(self) -> NDArray[np.int64]:
        """The tokens at which documents begin, and the end of the last one: [n + 1]."""
        assert self._documents is not None, "of a corpus without documents"
        return np.append(np.fromfile(self._documents, "<i8"), len(self))

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the split, cut off at its end."""
        pieces = [np.empty(0, np.int64)]
        stop = min(stop, len(self))
        while start < stop:
            shard = bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[shard + 1])
            first = self.starts[shard]
            pieces.append(self._map(shard)[start - first : end - first].astype(np.int64))
            start = end
        return np.concatenate(pieces)

    def _map(self, shard: int) -> NDArray[np.integer]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.files[shard], self.dtype, mode="r")
        return self._maps[shard]
