"""Corpora as users of train.py meet them: what a run says of its data, and what it refuses."""

import random
import re
import shutil
from pathlib import Path

import forked_runs
import pytest

TINY = [
    *("trainer=cpu", "model.dim=32", "model.depth=1", "model.heads=2", "model.dim_head=16"),
    *("model.seq_len=32", "batch.micro_batch_size=4", "batch.sequences_per_step=4"),
    *("trainer.max_steps=2", "val_every_n_steps=1", "trainer.log_every_n_steps=1"),
    *("scheduler.warmup_steps=1", "callbacks.samples.new_tokens=8", "logger=csv"),
    *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "data.num_workers=0"),
]
WORDS = [
    "sparse",
    "attention",
    "selects",
    "blocks",
    "and",
    "slides",
    "over",
    "the",
    "rest",
    "of",
    "them",
]


def prose(seed: int, words: int = 4000) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def train(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of train.py and what it printed."""
    (folder / "run.log").unlink(missing_ok=True)
    (code,) = forked_runs.run(folder, [*TINY, *arguments])
    return code, (folder / "run.log").read_text()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run with a tokenizer of its own took two steps."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "plain.txt").write_text(prose(0))
    code, output = train(folder, *LEARNED, "run_dir=run")
    assert code == 0, output
    return folder


LEARNED = ("data=text", "data.paths=[plain.txt]", "data.tokenizer=train", "data.vocab_size=300")


def test_a_run_goes_on_with_the_corpus_moved(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    shutil.copy(begun / "plain.txt", tmp_path / "elsewhere.txt")
    moved = [a.replace("plain", "elsewhere") for a in LEARNED]
    code, output = train(tmp_path, *moved, "run_dir=run", "trainer.max_steps=3")
    assert code == 0 and "3 steps" in output, output


def test_the_chunked_loss_trains_as_the_plain_one(begun: Path) -> None:
    code, output = train(begun, *LEARNED, "run_dir=chunked", "cross_entropy=chunked")
    assert code == 0 and re.search("cross-entropy  chunked", output), output
    plainly, in_chunks = (losses(begun / name) for name in ("run", "chunked"))
    assert in_chunks == pytest.approx(plainly, rel=1e-5)


def losses(run: Path) -> list[float]:
    """Of training and of validation, row by row."""
    rows = forked_runs.rows_of(run)
    return [float(row[n]) for row in rows for n in ("train/loss", "val/loss") if row[n]]


def refused(output: str) -> bool:
    """Whether a run was refused with the values of the corpus and those of the checkpoint."""
    names = ("corpus", "train_tokens", "tokenizer")
    return all(re.search(rf"  {n}=.*the checkpoint has", output) for n in names)


def test_a_corpus_that_has_grown_is_refused_with_both_values(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "plain.txt").write_text(prose(0) + prose(1, 500))
    code, output = train(tmp_path, *LEARNED, "run_dir=run")
    assert code != 0 and refused(output), output


def test_a_run_that_lost_its_overrides_does_not_take_another_corpus(
    begun: Path, tmp_path: Path
) -> None:
    copy = shutil.ignore_patterns(".hydra")
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True, ignore=copy)
    code, output = train(tmp_path, "data=stdlib", "model.vocab_size=300", "run_dir=run")
    assert code != 0 and refused(output), output
