"""Corpora prepared by chapters while training goes on: the same samples, whenever they come."""

import json
import shutil
import threading
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_data_modules import SIZES, cache, ready  # noqa: F401 (a fixture)

from data import preparation, waiting
from data.chapter_windows import ChapterWindows
from data.chapters import Chapters, chapter_folder
from data.datamodule import HuggingFaceDataModule
from data.mix import MixDataModule

TEXTS = [f"{i} squared is {i * i} " * (1 + i % 5) for i in range(300)]
CHAPTER = 3000


@pytest.fixture(autouse=True)
def rows(cache: Path) -> None:  # noqa: F811
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (cache.parent / "rows.jsonl").write_text("".join(rows))


def corpus(**options: Any) -> Any:
    """Its first chapter is prepared."""
    given = {"name": "json", "data_files": "rows.jsonl", "chapter_tokens": CHAPTER} | SIZES
    return ready(HuggingFaceDataModule(**given | options))


def finish(module: Any) -> None:
    module.preparation.build_rest(module.chapters.folder)


def documents(split: Any) -> list[str]:
    text = bytes(split.read(0, len(split)).tolist()).decode()
    assert text.endswith("\0")
    return text.split("\0")[:-1]


def samples(windows: ChapterWindows, numbers: range) -> list[list[int]]:
    return [windows[number]["tokens"].tolist() for number in numbers]


def test_every_document_is_in_one_chapter_and_held_out_of_the_first_alone() -> None:
    module = corpus()
    assert len(module.chapters) == 1 and not module.chapters.complete
    finish(module)
    chapters = Chapters(module.chapters.folder)
    assert chapters.complete and len(chapters) > 3
    parts = [documents(split) for split in chapters.splits]
    held = [documents(chapters.held_out[split]) for split in ("val", "test")]
    assert [len(split) >= CHAPTER for split in chapters.splits[:-1]] == [True] * (len(parts) - 1)
    assert sorted(chain(*parts, *held)) == sorted(TEXTS)
    first = len(parts[0]) + len(held[0]) + len(held[1])
    assert sorted(chain(parts[0], *held)) == sorted(TEXTS[:first])
    assert [*chain(*parts[1:])] == TEXTS[first:]


def test_a_preparation_that_was_stopped_goes_on_where_it_was(monkeypatch: Any) -> None:
    whole = corpus()
    finish(whole)
    expected = whole.identity(10**6)
    shutil.rmtree(whole.chapters.folder)
    module, build, built = corpus(), preparation.build_whole, []

    def stopped(folder: Path, write: Any) -> None:
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(folder)
        build(folder, write)

    monkeypatch.setattr(preparation, "build_whole", stopped)
    with pytest.raises(KeyboardInterrupt):
        finish(module)
    assert len(Chapters(module.chapters.folder)) == 3
    monkeypatch.setattr(preparation, "build_whole", build)
    finish(module)
    finish(module)  # nothing is left to do
    assert module.identity(10**6) == expected and expected["train_tokens"] > 4 * CHAPTER


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_samples_do_not_hang_on_how_many_chapters_are_there(pack: str) -> None:
    module = corpus(pack=pack)
    early: Any = module._train_windows()
    first = early._ends[-1]
    before, known = samples(early, range(first)), module.identity(first)
    assert module.epochs(first) == {}
    finish(module)
    late: Any = corpus(pack=pack)._train_windows()
    total = late._ends[-1]
    assert samples(late, range(first)) == before and module.identity(first) == known
    assert samples(late, range(first, total)) == samples(early, range(first, total))
    assert module.epochs(total) == {"json": 1.0} and total > 3 * first
    assert module.identity(first + 1) != known, "the second chapter has begun"
    places = [late.place(number) for number in range(total, 2 * total)]
    assert [chapter for chapter, _ in places] == [late.place(n)[0] for n in range(total)]
    if pack == "documents":  # of which an epoch has each once, in another order than the last
        epochs = [samples(late, range(e * total, (e + 1) * total)) for e in (0, 1)]
        assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
        assert len({late.place(number) for number in range(total)}) == total


def test_max_tokens_are_of_all_chapters_together() -> None:
    module = corpus(max_tokens=7000)
    finish(module)
    chapters = Chapters(module.chapters.folder)
    assert len(chapters) == 3 and 7000 <= chapters.num_tokens < 7200
    assert corpus(max_tokens=2500).chapters.complete


def test_training_waits_for_a_chapter_and_says_so(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    caplog.set_level("INFO")
    module = corpus()
    windows = module._train_windows()
    windows.preparation = SimpleNamespace(failure=lambda: None)
    writer = threading.Thread(target=lambda: (time.sleep(0.5), finish(module)))
    writer.start()
    assert waiting.wait_for(windows, [windows._ends[-1]], waiting.alone) == windows.complete
    writer.join()
    told = [record.getMessage() for record in caplog.records if "training" in record.getMessage()]
    assert (
        f"1 chapter of {len(module.splits['train']):,} training tokens prepared, all seen"
        in told[-2]
    )
    assert "training goes on after" in told[-1]


def test_a_wait_ends_when_the_time_is_over_by_the_clock_of_rank_zero() -> None:
    windows, clock, saved = corpus()._train_windows(), iter([False, True]), []
    wait = waiting.StepWait()
    wait.time_is_over = lambda: True  # of this rank, which is the second
    wait.meet = lambda own: [own._replace(time_is_over=next(clock)), own]
    wait.before_giving_up = lambda: saved.append(True)
    assert not wait.wait_for(windows, [windows._ends[-1]])
    assert wait.timed_out and saved and next(clock, None) is None


def test_a_failure_is_told_at_once_and_ends_training_once_it_is_waited_for(caplog: Any) -> None:
    windows = corpus()._train_windows()
    windows.preparation = SimpleNamespace(failure=lambda: "row 7 is broken")
    assert not waiting.wait_for(windows, [0], waiting.alone)
    assert not waiting.wait_for(windows, [1], waiting.alone)
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1 and "row 7 is broken. Training goes on with what is there: 1" in told[0]
    with pytest.raises(ChildProcessError, match=r"failed: row 7 is broken. Training has seen all"):
        waiting.wait_for(windows, [windows._ends[-1]], waiting.alone)


def test_a_first_chapter_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split has \d+ tokens.* raise data\.chapter_tokens, "):
        corpus(chapter_tokens=10)


def test_a_damaged_chapter_is_refused() -> None:
    module = corpus()
    finish(module)
    path = chapter_folder(module.chapters.folder, 2) / "train-00000.bin"
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"chapter-00002/train-00000\.bin cannot be used: its sha"):
        corpus()


def test_a_mixture_needs_weights_for_what_is_still_prepared() -> None:
    config = {"_target_": "data.datamodule.HuggingFaceDataModule", "name": "json"} | SIZES
    config |= {"data_files": "rows.jsonl", "pack": "stream", "chapter_tokens": CHAPTER}
    corpora = {"slow": config, "whole": config | {"chapter_tokens": None}}

    def mixture(**options: Any) -> Any:
        return ready(MixDataModule(**{"name": "mix", "corpora": corpora} | SIZES | options))

    with pytest.raises(ValueError, match=r"data\.weights is missing: .*those of slow are still"):
        mixture()
    module = mixture(weights={"slow": 1, "whole": 1})
    assert [*module.epochs(100)] == ["whole"] and "epochs" not in module.summary(100)["corpus slow"]
    own = module.corpora["slow"]._train_windows()._ends[-1]
    sample = next(s for s in range(10**6) if module._train_windows().schedule.place(s) == (0, own))
    mixed = module._train_windows()
    assert mixed.lacking([sample]) == [module.corpora["slow"]._train_windows()]
    assert not mixed.complete
    finish(module.corpora["slow"])
    assert not mixed.lacking([sample]) and mixed.complete
    assert torch.equal(
        module._train_windows()[sample]["tokens"],
        module.corpora["slow"]._train_windows()[own]["tokens"],
    )
    assert [*module.epochs(100)] == ["slow", "whole"]
