"""Text and documents as tokens; Hugging Face datasets as documents."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.shards import ShardWriter
from data.sources import local_files, pieces, stamp
from data.tokenizer import AnyTokenizer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

DOCUMENTS = 1000  # tokenized together
PIECES = 16  # of a text, tokenized together
SHUFFLE_BUFFER = 10_000  # documents among which a stream is shuffled


@dataclass(frozen=True)
class DatasetChoice:
    """The options that name a Hugging Face dataset; see `data.datamodule.HuggingFaceDataModule`."""

    name: str
    config: str | None
    data_files: Any
    revision: str | None
    text_column: str
    streaming: bool
    shuffle_seed: int | None

    def source(self) -> dict[str, Any]:
        """What the documents depend on, the files on this disk included."""
        files = self.data_files or []
        groups = files.values() if isinstance(files, dict) else [files]
        names = [
            name for group in groups for name in ([group] if isinstance(group, str) else group)
        ]
        return asdict(self) | {"files": stamp(local_files([self.name, *names]))}

    def texts(self, split: str) -> Iterator[str]:
        """The text of every row of a split, with a progress bar; rows without any are left out.

        Raises:
            ValueError: the split cannot be loaded, or has no such column.
        """
        rows = self._shuffled(self._load(split))
        for row in tqdm(rows, desc=f"{self.name} {split}", unit=" rows", delay=1):
            if self.text_column not in row:
                raise ValueError(
                    f"data.text_column={self.text_column!r} is no column of {self.name}: it has "
                    f"{', '.join(row)}"
                )
            if text := row[self.text_column]:
                yield text

    def _load(self, split: str) -> "Dataset | IterableDataset":
        import datasets  # takes a second to import
        from datasets.exceptions import DatasetsError

        folder = Path(self.name).expanduser()
        try:
            if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
                saved = datasets.load_from_disk(str(folder))
                data = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
                return data.to_iterable_dataset() if self.streaming else data
            return datasets.load_dataset(
                str(folder) if folder.exists() else self.name,
                self.config,
                split=split,
                data_files=self.data_files,
                revision=self.revision,
                streaming=self.streaming,
            )
        except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
            raise ValueError(
                f"data.name={self.name!r} data.config={self.config!r}: split {split!r} cannot be "
                f"loaded: {error}"
            ) from error

    def _shuffled(self, data: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
        if self.shuffle_seed is None:
            return data
        if self.streaming:
            data = cast("IterableDataset", data)
            return data.shuffle(seed=self.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        return data.shuffle(seed=self.shuffle_seed)


def write_text(
    writer: ShardWriter, tokenizer: AnyTokenizer, split: str, text: NDArray[np.uint8]
) -> None:
    """Tokenize one text [n], given as bytes, with a progress bar."""
    parts = pieces(text)
    with tqdm(total=len(text), desc=f"tokenize {split}", unit="B", unit_scale=True, delay=1) as bar:
        while batch := list(islice(parts, PIECES)):
            size = sum(map(len, batch))
            writer.append(split, tokenizer.encode_bytes(batch), size)
            bar.update(size)


def write_documents(
    writer: ShardWriter,
    tokenizer: AnyTokenizer,
    texts: Iterable[str],
    split_of: Callable[[int], str],
    max_tokens: int | None,
) -> None:
    """Tokenize documents, an end of text after each; `split_of` gives the split of a number.

    Stops at the document with which a split reaches `max_tokens`; it is kept whole. An end of text
    counts as one byte, like the line feed that would join two documents in a file.
    """
    assert tokenizer.eot is not None
    numbered = enumerate(texts)
    while batch := list(islice(numbered, DOCUMENTS)):
        encoded = tokenizer.encode_batch([text for _, text in batch])
        for (number, text), ids in zip(batch, encoded, strict=True):
            split = split_of(number)
            writer.append(split, np.array([*ids, tokenizer.eot]), len(text.encode()) + 1)
            if max_tokens is not None and writer.num_tokens(split) >= max_tokens:
                return
