"""Hugging Face datasets and tokenizers, all of them local: no test here needs a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from transformers import PreTrainedTokenizerFast

from data.datamodule import HuggingFaceDataModule, TextDataModule
from data.huggingface import DatasetChoice, tables_of
from data.parquet import PORTION, parquet_tables
from data.tokenizer import (
    END_OF_TEXT,
    SubwordTokenizer,
    TokenizerChoice,
    load_tokenizer,
    train_tokenizer,
)

WORDS = ("sparse", "attention", "selects", "blocks", "grüße", "世界", "and", "slides", "over\n")
DOCUMENTS = [
    f"document {i}: " + " ".join(np.random.default_rng(i).choice(WORDS, 20)) for i in range(300)
]
SIZES: dict[str, Any] = {"vocab_size": 256, "seq_len": 16, "micro_batch_size": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    rows = [{"text": d, "number": i} for i, d in enumerate(DOCUMENTS)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "cache"


def hf(**options: Any) -> HuggingFaceDataModule:
    local = {"name": "json", "data_files": "corpus.jsonl"}
    module = HuggingFaceDataModule(**local | SIZES | options)
    module.prepare_data()
    module.setup()
    return module


def documents(module: HuggingFaceDataModule, split: str) -> list[str]:
    """The documents of a split, read back from its tokens."""
    tokens, eot = module.splits[split], module.tokenizer.eot
    ids = tokens.read(0, len(tokens))
    ends = np.flatnonzero(ids == eot)
    assert ends[-1] == len(ids) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [module.decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]


def everything(module: HuggingFaceDataModule) -> list[str]:
    """The documents of all splits, sorted."""
    return sorted(d for split in module.splits for d in documents(module, split))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_every_document_is_in_one_split_and_ends_with_its_token(
    streaming: bool, tokenizer: str
) -> None:
    vocab_size = {"bytes": 256, "train": 400}[tokenizer]
    module = hf(streaming=streaming, tokenizer=tokenizer, vocab_size=vocab_size)
    found = {split: documents(module, split) for split in ("train", "val", "test")}
    assert sorted(found["train"] + found["val"] + found["test"]) == sorted(DOCUMENTS)
    assert 5 < len(found["val"]) < 30 and 5 < len(found["test"]) < 30
    numbers = [DOCUMENTS.index(d) for d in found["train"]]
    assert numbers == sorted(numbers)
    for split in found:
        size = sum(len(d.encode()) + 1 for d in found[split])
        tokens = len(module.splits[split])
        assert module.bytes_per_token(split) == pytest.approx(size / tokens)
    assert (module.bytes_per_token("train") == 1) == (tokenizer == "bytes")


def test_streaming_and_reading_make_the_same_tokens() -> None:
    read, streamed = (
        hf(tokenizer="train", vocab_size=300),
        hf(tokenizer="train", vocab_size=300, streaming=True),
    )
    for split, tokens in read.splits.items():
        n = len(tokens)
        assert (tokens.read(0, n) == streamed.splits[split].read(0, n)).all()


def test_a_trained_tokenizer_is_kept_with_its_tokens(cache: Path) -> None:
    module = hf(tokenizer="train", vocab_size=400)
    text = "sparse attention: grüße 世界 <&>\n"
    assert module.decode(module.encode(text)) == text
    assert len(module.encode(text)) < len(text.encode())
    assert module.vocab_size == 400
    (saved,) = cache.glob("json-*/tokenizer.json")
    again = load_tokenizer(str(saved), 400, None)
    assert again.encode(text) == module.encode(text)
    saved.write_text(saved.read_text().replace("attention", "attentiom", 1))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used: its sha256"):
        hf(tokenizer="train", vocab_size=400)


@pytest.mark.parametrize("streaming", [False, True])
def test_max_tokens_ends_a_split_with_the_document_that_reaches_it(streaming: bool) -> None:
    module = hf(streaming=streaming, max_tokens=8000)
    found = documents(module, "train")
    assert 8000 <= len(module.splits["train"]) < 8000 + len(found[-1].encode()) + 1
    assert len(found) < 200


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_shuffled_where_asked(streaming: bool) -> None:
    kept = hf(streaming=streaming)
    shuffled = hf(streaming=streaming, shuffle_seed=0)
    assert everything(kept) == everything(shuffled) == sorted(DOCUMENTS)
    assert documents(kept, "train") != documents(shuffled, "train")
    assert documents(shuffled, "train") != documents(
        hf(streaming=streaming, shuffle_seed=1), "train"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_the_dataset_are_taken_by_name(tmp_path: Path, streaming: bool) -> None:
    whole = datasets.Dataset.from_dict({"body": DOCUMENTS})
    parts = {"train": (0, 200), "validation": (200, 250), "test": (250, 300)}
    saved = datasets.DatasetDict({n: whole.select(range(*p)) for n, p in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    options = {"name": "saved", "data_files": None, "text_column": "body", "streaming": streaming}
    module = hf(**options, val_split="validation", test_split="test")
    found = [documents(module, split) for split in ("train", "val", "test")]
    assert found == [DOCUMENTS[:200], DOCUMENTS[200:250], DOCUMENTS[250:]]
    partly = hf(**options, val_split="validation")
    assert documents(partly, "val") == DOCUMENTS[200:250]
    assert set(documents(partly, "train") + documents(partly, "test")) == set(DOCUMENTS[:200])
    with pytest.raises(ValueError, match=r"data\.name='saved' .*'dev' cannot be loaded"):
        hf(**options, val_split="dev")


def test_files_by_split_and_other_builders(tmp_path: Path) -> None:
    for name, part in (("a", DOCUMENTS[:200]), ("b", DOCUMENTS[200:])):
        datasets.Dataset.from_dict({"text": part}).to_parquet(tmp_path / f"{name}.parquet")
    files = {"train": "a.parquet", "heldout": ["b.parquet"]}
    module = hf(name="parquet", data_files=files, val_split="heldout", test_fraction=0.1)
    assert documents(module, "val") == DOCUMENTS[200:]
    assert set(documents(module, "train") + documents(module, "test")) == set(DOCUMENTS[:200])


def test_a_name_on_the_hub_is_asked_for_with_config_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Builder:
        name = "a builder of its own"

        def download_and_prepare(self) -> None:
            asked.append("copied")

        def as_dataset(self, split: str) -> datasets.Dataset:
            asked.append(split)
            return datasets.Dataset.from_dict({"text": DOCUMENTS})

    def load_dataset_builder(*args: Any, revision: str, **_: Any) -> Builder:
        asked.append((args, revision))
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    hf(name="some/corpus", data_files=None, config="en", revision="v2", train_split="all")
    assert asked == [(("some/corpus", "en"), "v2"), "copied", "all"]


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    before = documents(hf(), "train")
    rows = [json.dumps({"text": d.upper()}) for d in DOCUMENTS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    assert documents(hf(), "train") == [d.upper() for d in before]


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": t} for d in DOCUMENTS for t in (d, "", None)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    module = hf()
    assert everything(module) == sorted(DOCUMENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": None}, r"data\.name is missing"),
        ({"name": "nobody/nothing", "data_files": None}, r"'nobody/nothing' .* cannot be loaded"),
        ({"data_files": "no.jsonl"}, r"data\.name='json' .* cannot be loaded: .*no\.jsonl"),
        ({"train_split": "dev"}, r"'dev' cannot be loaded"),
        ({"text_column": "body"}, r"text_column='body' is no column .* it has text, number"),
        ({"max_tokens": 0}, r"data\.max_tokens=0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0"),
        ({"val_fraction": 0.0}, r"the val split has 0 tokens.* raise .*data\.val_fraction"),
        ({"eot_token": "</s>"}, r"eot_token='</s>' is for a tokenizer that is loaded"),
        ({"tokenizer": "no/such"}, r"data\.tokenizer='no/such' cannot be loaded"),
        ({"tokenizer": "no.json"}, r"data\.tokenizer='no\.json' .*: there is no file"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf(**options)


@pytest.fixture(scope="module")
def trained() -> SubwordTokenizer:
    return train_tokenizer(DOCUMENTS, 350)


def test_a_tokenizer_is_loaded_from_a_file_or_a_folder(
    trained: SubwordTokenizer, tmp_path: Path
) -> None:
    text = DOCUMENTS[0]
    trained.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "bare").mkdir()
    trained.tokenizer.save(str(tmp_path / "bare" / "tokenizer.json"))
    PreTrainedTokenizerFast(
        tokenizer_object=trained.tokenizer, eos_token=END_OF_TEXT, model_max_length=8
    ).save_pretrained(tmp_path / "full")
    for name in ("tokenizer.json", "bare", "full"):
        loaded = load_tokenizer(name, 350, None)
        assert loaded.encode(text) == trained.encode(text)
        assert (loaded.eot, loaded.vocab_size) == (trained.eot, 350)
        assert documents(hf(tokenizer=name, vocab_size=512), "train")
    with pytest.raises(ValueError, match=r"vocab_size=349 is too small.* has 350 tokens"):
        load_tokenizer("bare", 349, None)


def test_the_end_of_text_can_be_named_and_must_be_known(
    trained: SubwordTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    trained.tokenizer.save(str(path))
    path.write_text(path.read_text().replace(END_OF_TEXT, "<end>"))
    with pytest.raises(ValueError, match=r"names no end of text.* set data\.eot_token"):
        hf(tokenizer=str(path), vocab_size=350)
    module = hf(tokenizer=str(path), vocab_size=350, eot_token="<end>")
    assert module.decode([module.tokenizer.eot]) == "<end>"
    with pytest.raises(ValueError, match=r"eot_token='<stop>' is not a token of"):
        hf(tokenizer=str(path), vocab_size=350, eot_token="<stop>")


@pytest.mark.parametrize("tokenizer", ["train", "tokenizer.json"])
def test_text_files_take_the_same_tokenizers(
    trained: SubwordTokenizer, tmp_path: Path, tokenizer: str
) -> None:
    trained.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "book.txt").write_text("\n".join(DOCUMENTS))
    sizes = SIZES | {"vocab_size": 350}
    module = TextDataModule(name="text", paths=["book.txt"], tokenizer=tokenizer, **sizes)
    module.prepare_data()
    module.setup()
    read = {name: module.decode(s.read(0, len(s))) for name, s in module.splits.items()}
    assert read["train"] + read["val"] + read["test"] == "\n".join(DOCUMENTS)
    for name, split in module.splits.items():
        size = len(read[name].encode())
        assert module.bytes_per_token(name) == pytest.approx(size / len(split))
    assert module.bytes_per_token("train") > 1.5


def test_a_tokenizer_that_is_trained_sees_only_the_train_split() -> None:
    texts = list(hf(tokenizer="train", vocab_size=300).preparation.training_texts())
    assert sorted(texts) == sorted(documents(hf(), "train"))


def test_the_choice_of_a_tokenizer_names_what_ids_depend_on(tmp_path: Path) -> None:
    assert TokenizerChoice("train", 300).source() != TokenizerChoice("train", 301).source()
    (tmp_path / "tokenizer.json").write_text("{}")
    before = TokenizerChoice("tokenizer.json", 300).source()
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert TokenizerChoice("tokenizer.json", 300).source() != before


def rows(folder: Path, *values: Any) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": v}) + "\n" for v in values))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1), r"data\.text_column='text' must hold text and holds int64: row 0 .* is 0"),
        (([], ["a"]), r"holds list.*: row 0"),
        (({"x": 1},), r"holds struct<x: int64>: row 0"),
        (("a", "b", 5, {"x": 1}), r"holds values of several kinds: row 2 .* is 5"),
        ((None, True), r"holds bool: row 1 .* is True"),
        (("a", "\ud800"), r"rows\.jsonl line 2: .*surrogates not allowed"),
    ],
)
def test_rows_that_are_no_text_are_refused_with_the_first(
    tmp_path: Path, streaming: bool, values: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hf(data_files=rows(tmp_path, *values), streaming=streaming)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = Path(rows(tmp_path, *DOCUMENTS[:3]))
    path.write_text(path.read_text() + '{"text": "cut')
    with pytest.raises(ValueError, match=r"rows\.jsonl line 4: Unterminated string"):
        hf(data_files="rows.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"val_split": "validation"},
            r"'validation' cannot be loaded: .*no such split.* has train",
        ),
        ({"train_split": "all", "val_split": "dev"}, r"'all' cannot be loaded.* it has train"),
    ],
)
def test_a_saved_dataset_is_one_split(tmp_path: Path, options: dict, message: str) -> None:
    datasets.Dataset.from_list([{"text": d} for d in DOCUMENTS]).save_to_disk(tmp_path / "one")
    assert documents(hf(name="one", data_files=None), "val")
    with pytest.raises(ValueError, match=message):
        hf(name="one", data_files=None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_split": "train"}, r"train_split=train and data\.val_split=train hold the same"),
        ({"val_split": "a", "test_split": "a"}, r"val_split=a and data\.test_split=a hold"),
        ({"val_split": "train[90%:]"}, r"train_split=train and data\.val_split=train\[90%:\] hold"),
        ({"train_split": "train[:91%]", "val_split": "train[-10%:]"}, r"hold the same documents"),
        ({"train_split": "all", "val_split": "train[:10]"}, r"hold the same documents"),
        (
            {"data_files": {"train": "corpus.jsonl", "dev": "c*.jsonl"}, "val_split": "dev"},
            r"data\.data_files: .*corpus\.jsonl is in train and in dev",
        ),
    ],
)
def test_no_document_is_trained_on_and_measured(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf(**options)


def test_slices_that_do_not_meet_are_taken() -> None:
    module = hf(train_split="train[:80%]", val_split="train[80%:90%]", test_split="train[90%:]")
    found = [documents(module, split) for split in ("train", "val", "test")]
    assert found == [DOCUMENTS[:240], DOCUMENTS[240:270], DOCUMENTS[270:]]


@pytest.mark.parametrize("content", ["", "{}", "[]", "{broken", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.tokenizer='tokenizer\.json' cannot be loaded"):
        hf(tokenizer="tokenizer.json")


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_any_length_keep_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, streaming: bool
) -> None:
    monkeypatch.setattr("data.documents.BATCH", 200)  # some documents are longer, some share it
    texts = [d * (1 + i % 4) for i, d in enumerate(DOCUMENTS)]
    sizes = {"tokenizer": tokenizer, "vocab_size": 256 if tokenizer == "bytes" else 300}
    module = hf(data_files=rows(tmp_path, *texts), streaming=streaming, **sizes)
    assert everything(module) == sorted(texts)
    for split, tokens in module.splits.items():
        size = sum(len(d.encode()) + 1 for d in documents(module, split))
        assert module.bytes_per_token(split) == pytest.approx(size / len(tokens))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("http_proxy", raising=False)
    for settings in (constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*\. Without a network, take files"):
        hf(name="nobody/nothing", data_files=None)
    with pytest.raises(ValueError, match=r"data\.tokenizer='nobody/nothing' cannot be loaded"):
        hf(tokenizer="nobody/nothing", vocab_size=300)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("http://127.0.0.1:9 cannot be reached" in message for message in messages) == 2
    assert not any("Retrying" in message for message in messages)
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # another may answer


def test_no_more_of_a_corpus_is_held_than_arrives_at_once(tmp_path: Path) -> None:
    """Short rows first: how large rows are, the first ones do not tell."""
    sizes = [10] * 300 + [1 << 19] * 60
    rows = [{"text": "x" * size, "number": i} for i, size in enumerate(sizes)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data_files": "mixed.jsonl", "split": "train"}
    stream = datasets.load_dataset("json", **options, streaming=True)
    arrived = [table.nbytes for table in tables_of(stream)]
    assert len(arrived) > 2 and max(arrived) < sum(arrived) / 2


def test_csv_is_read_by_bytes_and_not_by_rows(tmp_path: Path) -> None:
    long = [f"{i}, " + "long " * 50_000 for i in range(24)]  # 6 MB, in what was one portion
    lines = "".join(f'{i},"{text}"\n' for i, text in enumerate(long))
    (tmp_path / "a.csv").write_text(f"id,text\n{lines}")
    choice = DatasetChoice("csv", None, "a.csv", None, "text", False, None)
    tables, _ = choice._tables("train")
    assert [len(table) for table in tables] == [16, 8]
    assert everything(hf(name="csv", data_files="a.csv")) == sorted(long)


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """The library decodes whole row groups; this file is one."""
    texts = pa.array([f"{i:05d} " * 10_000 for i in range(300)])
    pq.write_table(pa.table({"text": texts, "i": range(300)}), tmp_path / "corpus.parquet")
    tables = list(parquet_tables(["corpus.parquet"], "text"))
    assert pa.concat_tables(tables)["text"].combine_chunks() == texts
    assert max(table.nbytes for table in tables) < 2 * PORTION
    assert next(parquet_tables(["corpus.parquet"], "body")).column_names == ["text", "i"]


def test_parquet_columns_of_categories_are_text(tmp_path: Path) -> None:
    texts = pa.array(DOCUMENTS).dictionary_encode()
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")
    assert everything(hf(name="parquet", data_files="corpus.parquet")) == sorted(DOCUMENTS)
