"""Documents packed into windows: nothing lost, nothing twice, no label across a border."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_data_modules import SIZES, attach, cache, ready, text  # noqa: F401 (a fixture)
from torch import Tensor

from data.datamodule import Enwik8DataModule, HuggingFaceDataModule, StdlibDataModule
from data.packing import Packing, Parts, best_fit
from data.shards import ShardWriter, open_shards
from data.token_split import TokenSplit

LENGTHS = (1, 2, 15, 16, 17, 40, 3, 7, 9, 33, 1, 5, 64, 12, 12, 12, 100, 2, 30)


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    """Documents of `LENGTHS`, whose tokens count up: a token says where it is from."""
    with ShardWriter(tmp_path, vocab_size=1000, source={"corpus": "numbers"}) as writer:
        for length in LENGTHS:
            start = writer.num_tokens("train")
            writer.begin_documents("train", np.array([start]))
            writer.append("train", np.arange(start, start + length), length)
    return open_shards(tmp_path)[1]["train"]


def packing(split: TokenSplit, seq_len: int, alignment: int) -> Packing:
    return Packing(Parts.of(split.documents(), seq_len), seq_len, alignment)


@pytest.mark.parametrize("seq_len", [1, 16, 30, 64, 512])
@pytest.mark.parametrize("alignment", [1, 4, 16, 64])
def test_every_label_of_a_document_is_scored_once_and_sees_its_document_alone(
    split: TokenSplit, seq_len: int, alignment: int
) -> None:
    borders = split.documents()
    document_of = np.searchsorted(borders, np.arange(len(split)), side="right") - 1
    packed, labels = packing(split, seq_len, alignment), []
    for number in range(len(packed)):
        window = packed.read(split, number)
        tokens, starts = window["tokens"].numpy(), window["document_starts"].numpy()
        assert (starts.dtype, tokens.shape, starts.shape) == (np.int32, (seq_len + 1,), (seq_len,))
        assert (starts % alignment == 0).all() and (starts <= np.arange(seq_len)).all()
        for place in np.flatnonzero(window["scored"]):
            seen = tokens[starts[place] : place + 2]  # up to the label
            assert (np.diff(seen) == 1).all() and len({*document_of[seen]}) == 1
            labels.append(int(tokens[place + 1]))
        real = tokens[:-1] >= 0
        assert (tokens[:-1][real & (starts == np.arange(seq_len))] >= 0).all()
    firsts = {*borders[:-1].tolist()}
    assert sorted(labels) == [token for token in range(len(split)) if token not in firsts]


def test_a_document_is_cut_where_it_is_longer_than_a_window_alone(split: TokenSplit) -> None:
    parts = Parts.of(split.documents(), 16)
    starts = split.documents()
    for first, length in zip(starts[:-1], LENGTHS, strict=True):
        own = parts.labels[(parts.first >= first) & (parts.first < first + length)]
        assert own.sum() == length - 1
        assert len(own) == -(-(length - 1) // 16) and (own[:-1] == 16).all()


def test_documents_behind_one_another_fill_a_window(split: TokenSplit) -> None:
    packed = packing(split, 128, 1)
    assert packed.fill == pytest.approx(sum(n for n in LENGTHS if n > 1) / (128 * len(packed)))
    assert len(packed) == 3
    assert packing(split, 128, 16).fill < packed.fill
    assert 0 < packed.last_fill <= 1


def test_lengths_are_those_of_the_parts_and_their_share(split: TokenSplit) -> None:
    packed = packing(split, 64, 16)
    lengths = packed.lengths(groups=5)
    assert sum(share for _, share in lengths) == pytest.approx(packed.fill)
    slots = np.minimum(packed.parts.labels + 1, 64)
    mean = sum(length * share for length, share in lengths) / packed.fill
    assert mean == pytest.approx((slots * slots).sum() / slots.sum(), rel=0.02)
    assert [length for length, _ in lengths] == sorted(length for length, _ in lengths)


def first_fit(sizes: NDArray[np.int64], room: int) -> int:
    """Bins by best fit, the largest first, one thing at a time."""
    left: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [i for i, each in enumerate(left) if each >= size]
        if fitting:
            left[min(fitting, key=left.__getitem__)] -= size
        else:
            left.append(room - size)
    return len(left)


@pytest.mark.parametrize(("number", "room"), [(1, 1), (50, 10), (300, 100), (2000, 17)])
def test_packing_is_best_fit(number: int, room: int) -> None:
    sizes = np.random.default_rng(number).integers(1, room + 1, number)
    bins = best_fit(sizes, room)
    assert sorted(np.concatenate(bins).tolist()) == list(range(number))
    assert max(sizes[each].sum() for each in bins) <= room
    assert len(bins) == first_fit(sizes, room)


def test_a_million_documents_are_packed_in_no_time() -> None:
    sizes = np.random.default_rng(0).geometric(1 / 60, 1_000_000).clip(1, 1024)
    bins = best_fit(sizes, 1024)
    assert sizes.sum() / (len(bins) * 1024) > 0.999


# Datamodules


def write_corpus(folder: Path) -> None:
    rows = [{"text": f"{i} squared is {i * i}" * (1 + i % 9)} for i in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "files").mkdir()
    for i, row in enumerate(rows[:60]):
        (folder / "files" / f"{i}.txt").write_text(row["text"])


def of_rows(**options: Any) -> HuggingFaceDataModule:
    local = {"name": "json", "data_files": "rows.jsonl", "pack": "documents", "seq_len": 64}
    return aligned(HuggingFaceDataModule(**SIZES | local | options))


def of_files(**options: Any) -> Any:
    held_out = {"val_fraction": 0.1, "test_fraction": 0.1}
    packed = {"paths": "files/*.txt", "pack": "documents", "seq_len": 64}
    return aligned(text(**held_out | packed | options))


def aligned(module: Any) -> Any:
    module.document_alignment = 8  # as a run sets it, of its model
    return module


def texts_of(windows: list[dict[str, Tensor]]) -> list[str]:
    """The documents in some windows, each up to its end of text or to the window's."""
    found = []
    for window in windows:
        tokens, starts = window["tokens"], window["document_starts"]
        for start in starts.unique().tolist():
            own = torch.cat([tokens[:-1][starts == start], tokens[-1:]])
            ids = [i for i in own.tolist() if i >= 0]
            found.append(bytes(ids).split(b"\0")[0].decode())
    return found


@pytest.mark.parametrize("corpus", [of_rows, of_files])
def test_rows_and_files_are_documents(tmp_path: Path, corpus: Any) -> None:
    write_corpus(tmp_path)
    module = ready(corpus(seq_len=512))
    numbers = []
    for split in ("train", "val", "test"):
        windows = module._eval_windows(split)
        for each in texts_of([windows[i] for i in range(len(windows))]):
            number = int(each.split(" ")[0])
            assert each == f"{number} squared is {number * number}" * (1 + number % 9)
            numbers.append(number)
    assert sorted(numbers) == list(range(200 if corpus is of_rows else 60))


def test_loaders_give_documents_on_any_layout(tmp_path: Path) -> None:
    write_corpus(tmp_path)

    def samples(micro: int, world: int, start: int = 0) -> list[list[Any]]:
        steps: list[list[Any]] = [[] for _ in range(start, 6)]
        for rank in range(world):
            module = ready(of_rows(micro_batch_size=micro))
            attach(module, step=start, accumulate=8 // micro // world, rank=rank, world=world)
            for i, batch in enumerate(module.train_dataloader()):
                assert {n: x.shape for n, x in batch.items()} == {
                    "tokens": (micro, 65), "scored": (micro, 64), "document_starts": (micro, 64),
                }  # fmt: skip
                steps[i * micro * world // 8] += batch["tokens"].tolist()
        return [sorted(step) for step in steps]

    whole = samples(8, 1)
    assert samples(2, 2) == whole and samples(4, 1, start=4) == whole[4:]


def test_validation_is_limited_and_padded_with_windows_without_labels(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    module = ready(of_rows(val_tokens=100, micro_batch_size=5))
    attach(module)
    batches = list(module.val_dataloader())
    scored = sum(batch["scored"].sum() for batch in batches)
    documents = int((module.splits["val"].documents() < 100).sum())
    assert scored == 100 - documents
    assert all(len(batch["tokens"]) == 5 for batch in batches)


def test_a_run_is_told_how_full_its_windows_are(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    module = ready(of_rows())
    told = module.summary(0)["packed documents"]
    assert told.startswith(f"{len(module.packing('train'))} windows, ") and "% filled" in told
    assert ready(of_rows(pack="stream")).summary(0) == {}
    assert module.sample_order(1)["pack"] == "documents"
    assert module.sample_order(1)["document_alignment"] == 8


def test_what_has_no_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.pack=documents: data=enwik8 does not know where"):
        Enwik8DataModule(name="enwik8", pack="documents", **SIZES)
    with pytest.raises(ValueError, match=r"data\.pack=files must be one of stream, documents"):
        StdlibDataModule(name="stdlib", pack="files", **SIZES)


def test_a_cache_without_borders_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """As an earlier version made it; as a stream it is read as ever."""
    write_corpus(tmp_path)
    ready(of_rows())
    (folder,) = (tmp_path / "cache").glob("json-*/")
    index = json.loads((folder / "index.json").read_text())
    for entry in index["splits"].values():
        (folder / entry.pop("documents")["file"]).unlink()
    (folder / "index.json").write_text(json.dumps(index))
    assert ready(of_rows(pack="stream")).splits
    with pytest.raises(ValueError, match=r"does not say where documents begin.*Delete the folder"):
        ready(of_rows())


def test_damaged_borders_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    ready(of_rows())
    (path,) = (tmp_path / "cache").glob("json-*/train.documents")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"train\.documents cannot be used: its sha256 is"):
        ready(of_rows())
