"""Shards hold what was written, and a file that does not is refused by name."""

import json
import multiprocessing
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.shards import ShardWriter, cache_root, open_shards, prepare_shards, token_dtype

SOURCE = {"corpus": "numbers"}
TOKENS = np.arange(1000) * 7 % 300


def build(folder: Path) -> None:
    """1,000 tokens to train on, in pieces of 90, and 100 to validate."""
    with ShardWriter(folder, vocab_size=300, source=SOURCE) as writer:
        for start in range(0, 1000, 90):
            piece = TOKENS[start : start + 90]
            writer.append("train", piece, num_bytes=2 * len(piece))
        writer.append("val", TOKENS[:100], num_bytes=100)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared folder whose train split lies in four shards."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 256)
    prepare_shards(tmp_path / "numbers", SOURCE, build)
    return tmp_path / "numbers"


def test_tokens_come_back_across_shards(folder: Path) -> None:
    index, splits = open_shards(folder)
    train = splits["train"]
    assert [path.name for path in train.files] == [f"train-{i:05d}.bin" for i in range(4)]
    assert len(train) == 1000
    assert (train.read(0, 1000) == TOKENS).all()
    for start, stop in ((0, 1), (255, 257), (250, 800), (999, 1000), (512, 768), (5, 5)):
        assert (train.read(start, stop) == TOKENS[start:stop]).all()
    assert train.read(990, 2000).tolist() == TOKENS[990:].tolist()
    assert train.read(0, 3).dtype == np.int64
    assert (train.bytes_per_token, splits["val"].bytes_per_token) == (2.0, 1.0)
    assert index["vocab_size"] == 300


def test_a_full_last_shard_leaves_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 250)
    prepare_shards(tmp_path / "numbers", SOURCE, build)
    assert len(list((tmp_path / "numbers").glob("train-*.bin"))) == 4


def test_ids_are_stored_in_the_smallest_type() -> None:
    sizes = {256: 1, 257: 2, 65_536: 2, 65_537: 4}
    assert {vocab: token_dtype(vocab).itemsize for vocab in sizes} == sizes


def test_files_are_mapped_by_each_process_for_itself(folder: Path) -> None:
    _, splits = open_shards(folder)
    train = splits["train"]
    assert not train._maps
    train.read(0, 10)
    assert len(train._maps) == 1
    copy = pickle.loads(pickle.dumps(train))
    assert not copy._maps
    assert (copy.read(0, 1000) == TOKENS).all()


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["train-00002.bin", "val-00000.bin", "index.json"])
def test_prepare_refuses_damage_by_name(folder: Path, damage, name: str) -> None:
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"{folder / name} cannot be used: .* Delete the folder"):
        prepare_shards(folder, SOURCE, build)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_opening_refuses_a_shard_of_another_size(folder: Path, damage) -> None:
    damage(folder / "train-00002.bin")
    with pytest.raises(ValueError, match=r"train-00002\.bin cannot be used"):
        open_shards(folder)


def test_a_foreign_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json .* was made from .*'numbers'.*'letters'"):
        prepare_shards(folder, {"corpus": "letters"}, build)
    (folder / "index.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(ValueError, match=r"index\.json .* not an index of format"):
        open_shards(folder)


def test_a_deleted_folder_is_rebuilt(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    prepare_shards(folder, SOURCE, build)
    assert (open_shards(folder)[1]["train"].read(0, 1000) == TOKENS).all()


def test_what_a_failed_or_killed_build_leaves_is_not_used(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        build(folder)
        raise OSError("the disk is full")

    folder = tmp_path / "numbers"
    with pytest.raises(OSError, match="the disk is full"):
        prepare_shards(folder, SOURCE, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.lock"]
    (tmp_path / "numbers.part").mkdir()  # as SIGKILL leaves it
    (tmp_path / "numbers.part" / "train-00000.bin").write_bytes(b"half")
    prepare_shards(folder, SOURCE, build)
    assert len(open_shards(folder)[1]["train"]) == 1000


def test_the_index_is_missing_until_all_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="no network"),
        ShardWriter(tmp_path, vocab_size=300, source=SOURCE) as writer,
    ):
        writer.append("train", TOKENS, 1000)
        raise OSError("no network")
    assert not (tmp_path / "index.json").exists()


def test_threads_that_prepare_at_once_build_once(tmp_path: Path) -> None:
    builds = []

    def counted(folder: Path) -> None:
        builds.append(folder)
        build(folder)

    folder = tmp_path / "numbers"
    threads = [
        threading.Thread(target=prepare_shards, args=(folder, SOURCE, counted)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (open_shards(folder)[1]["train"].read(0, 1000) == TOKENS).all()


def test_processes_that_prepare_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "numbers"
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=prepare_shards, args=(folder, SOURCE, build)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (open_shards(folder)[1]["train"].read(0, 1000) == TOKENS).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "numbers.lock"]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("NSA_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path("/home/someone/.cache/nsa")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_root() == Path("/cache/nsa")
    monkeypatch.setenv("NSA_DATA_DIR", "~/corpora")
    assert cache_root() == Path("/home/someone/corpora")
