"""A Hugging Face dataset as batches of documents, and what is wrong where it cannot be read."""

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data import hub
from data.documents import HELD, OFFSETS, Texts, documents, with_text
from data.lines import broken_line, csv_rows
from data.parquet import parquet_tables
from data.shuffle import shuffled, shuffled_stream
from data.sources import local_files, release, stamp

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

ROWS_VERSION = 3  # of what is taken for the rows of a split: tokens of other versions are made anew
READ = 1 << 22  # bytes of rows read at once
PART = re.compile(r"[+\[]|^all$")  # in the name of what is only a part of a split, or a sum


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
        return asdict(self) | {"files": stamp(self.files()), "rows": ROWS_VERSION}

    def files(self) -> list[Path]:
        """The files of the dataset that lie on this disk."""
        return local_files([self.name, *(n for g in self._groups().values() for n in g)])

    def check_files(self) -> None:
        """Refuse files that are named for two splits: one would be measured on the other's text."""
        seen: dict[Path | str, str] = {}
        for split, names in self._groups().items():
            for file in {*names, *local_files(names)}:
                if seen.setdefault(file, split) != split:
                    raise ValueError(f"data.data_files: {file} is in {seen[file]} and in {split}")

    def check_splits(self, names: Mapping[str, str | None]) -> None:
        """Refuse a split of the dataset that is named twice."""
        for (option, name), (other, its) in pairs(names):
            if name == its:
                refuse_shared(option, name, other, its)

    def check_slices(self, names: Mapping[str, str | None]) -> None:
        """Refuse slices and sums of splits, as in train[:90%] or train+test, that share rows."""
        if not any(PART.search(name) for two in pairs(names) for _, name in two):
            return
        sizes = {}
        for name in filter(None, names.values()):
            known = self._load(name).info.splits or {}
            sizes |= {split: info.num_examples for split, info in known.items()}
        for (option, name), (other, its) in pairs(names):
            mine, others = ranges(name, sizes), ranges(its, sizes)
            if any(a == b and max(i, k) < min(j, m) for a, i, j in mine for b, k, m in others):
                refuse_shared(option, name, other, its)

    def _groups(self) -> dict[str, list[str]]:
        files = self.data_files or []
        groups = files if isinstance(files, Mapping) else {"train": files}
        return {
            s: [names] if isinstance(names, str) else list(names) for s, names in groups.items()
        }

    def batches(self, split: str) -> Iterator[Texts]:
        """The text of a split's rows, shuffled where asked; rows without any are left out.

        Raises:
            ValueError: the split cannot be loaded, has no such column, or the column no text.
        """
        texts = self._in_order(split)
        if self.shuffle_seed is None:
            return texts
        return (shuffled_stream if self.streaming else shuffled)(texts, self.shuffle_seed)

    def _in_order(self, split: str) -> Iterator[Texts]:
        """The text of a split's rows, with a progress bar."""
        tables, mapped = self._tables(split)
        held = 0
        with tqdm(desc=f"{self.name} {split}", unit=" rows", delay=1) as bar:
            for chunk in self._chunks(split, tables):
                for batch in documents(self._texts(chunk, bar.n)):
                    yield with_text(batch)
                    held += batch.nbytes
                    if held >= HELD:
                        held = release(mapped)
                bar.update(len(chunk))
        release(mapped)

    def _tables(self, split: str) -> tuple[Iterator[pa.Table], list[str]]:
        """A split's rows, and the mapped files that they lie in.

        Files on this disk are read where they are; only a part of a split needs the library's copy.
        """
        if files := self._parquet_files(split):
            return parquet_tables(files, self.text_column), []
        data = self._load(split)
        mapped = [entry["filename"] for entry in getattr(data, "cache_files", [])]
        return tables_of(data, self.shuffle_seed), mapped

    def _chunks(self, split: str, tables: Iterator[pa.Table]) -> Iterator[pa.Array]:
        """The column of text as it lies in memory, or as it arrives."""
        while True:
            try:
                table = next(tables, None)
            except (OSError, ValueError, RuntimeError, TypeError) as error:  # a stream is read here
                self._refuse(split, error)
            if table is None:
                return
            if self.text_column not in table.column_names:
                raise ValueError(
                    f"data.text_column={self.text_column!r} is no column of {self.name}: it has "
                    f"{', '.join(table.column_names)}"
                )
            yield from table[self.text_column].chunks

    def _texts(self, chunk: pa.Array, first: int) -> Texts:
        """A part of the column of text; `first` is the number of its first row."""
        if chunk.null_count == len(chunk):
            return pa.array([], pa.string())
        if pa.types.is_dictionary(chunk.type) and chunk.type.value_type in OFFSETS:
            return chunk.dictionary_decode()
        if chunk.type not in OFFSETS:
            refuse_rows(self.text_column, chunk, first)
        return chunk

    def _load(self, split: str) -> "Dataset | IterableDataset":
        from datasets.exceptions import DatasetsError

        try:
            if self._is_saved():
                return self._saved(split)
            with nullcontext() if self.files() else hub.asked_once():
                builder = self._builder()
                if self.streaming or self._in_place(split):
                    return cast("IterableDataset", builder.as_streaming_dataset(split))
                builder.download_and_prepare()
                return cast("Dataset", builder.as_dataset(split))
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, DatasetsError) as error:
            self._refuse(split, error)

    def _in_place(self, split: str) -> bool:
        """Whether the split is whole and on this disk."""
        return bool(self.files()) and not PART.search(split)

    def _is_saved(self) -> bool:
        """Whether the name is a folder that `save_to_disk` wrote."""
        folder = Path(self.name).expanduser()
        return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()

    def _parquet_files(self, split: str) -> list[str]:
        """The files of a split that is parquet on this disk."""
        if self._is_saved() or not self._in_place(split):
            return []
        try:
            builder = self._builder()
        except (OSError, ValueError, RuntimeError) as error:
            self._refuse(split, error)
        named = (builder.config.data_files or {}) if builder.name == "parquet" else {}
        return list(named.get(split, []))

    def _builder(self) -> "DatasetBuilder":
        import datasets  # takes a second to import

        folder = Path(self.name).expanduser()
        builder = datasets.load_dataset_builder(
            str(folder) if folder.exists() else self.name,
            self.config,
            data_files=self.data_files or None,
            revision=self.revision,
        )
        if builder.name == "json":
            cast(Any, builder.config).chunksize = READ
        if builder.name == "csv" and (rows := csv_rows(self.files(), READ)):
            options = cast(Any, builder.config)
            options.chunksize = min(rows, options.chunksize)
        return builder

    def _saved(self, split: str) -> "Dataset | IterableDataset":
        import datasets

        saved = datasets.load_from_disk(str(Path(self.name).expanduser()))
        if isinstance(saved, datasets.Dataset):  # one split; a slice goes by the split's name
            saved = {re.split(r"\W", str(saved.split or "train"))[0]: saved}
        if split not in saved:
            raise ValueError(f"there is no such split; it has {', '.join(map(str, saved))}")
        data = saved[split]
        return data.to_iterable_dataset() if self.streaming else data

    def _refuse(self, split: str, error: Exception) -> NoReturn:
        reasons = [str(error)]
        if error.__cause__ is not None and str(error.__cause__) not in reasons[0]:
            reasons.append(str(error.__cause__))
        if self.name == "json" and (line := broken_line(self.files(), self.text_column)):
            reasons.append(line)
        if isinstance(error, OSError | ConnectionError) and not self.files():
            reasons.append(hub.WAY_OUT)
        raise ValueError(
            f"data.name={self.name!r} data.config={self.config!r}: split {split!r} cannot be "
            f"loaded: {'. '.join(reasons)}"
        ) from error


def pairs(names: Mapping[str, str | None]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Every two of the splits that are named."""
    return list(combinations([(option, n) for option, n in names.items() if n is not None], 2))


def ranges(name: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The rows that a name like train[:90%]+test means, as (split, first, end)."""
    from datasets import ReadInstruction

    parts = ReadInstruction.from_spec("+".join(sizes) if name == "all" else name)
    return [(part.splitname, part.from_, part.to) for part in parts.to_absolute(sizes)]


def refuse_shared(option: str, name: str, other: str, its: str) -> NoReturn:
    """Say which two splits would hold the same documents, and the way out."""
    raise ValueError(
        f"data.{option}_split={name} and data.{other}_split={its} hold the same documents: name "
        f"another split, or data.{other}_split=null to keep a fraction of the training ones out"
    )


def tables_of(
    data: "Dataset | IterableDataset", shuffle_seed: int | None = None
) -> Iterator[pa.Table]:
    """The rows of a dataset in tables, of which none is copied to make it of a certain size.

    With a seed, the files of a stream come in another order.
    """
    from datasets import Dataset

    if isinstance(data, Dataset):
        yield data.with_format("arrow")[:]
        return
    stream = data.with_format("arrow")._ex_iterable
    if shuffle_seed is not None:
        stream = stream.shuffle_data_sources(np.random.default_rng(shuffle_seed))
    if stream.iter_arrow is not None:
        yield from (table for _, table in stream.iter_arrow())
    else:
        yield from data.with_format("arrow").iter(batch_size=1)


def refuse_rows(column: str, values: pa.Array, first: int) -> NoReturn:
    """Say of a column without text what it holds, and where."""
    rows = enumerate(values.to_pylist(), first)
    found = {row: value for row, value in rows if value is not None}
    mixed = "json" in str(values.type)  # each value is then its JSON
    row = next((r for r in found if not (mixed and str(found[r]).startswith('"'))), first)
    kind = "values of several kinds" if mixed else values.type
    raise ValueError(
        f"data.text_column={column!r} must hold text and holds {kind}: row {row} (counted from 0) "
        f"is {str(found[row])[:60]}"
    )
