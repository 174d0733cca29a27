"""data.chapter_tokens through train.py: training begins first, and what is late changes nothing."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forked_runs import Signal, finished, rows_of, run
from test_packed_runs import TRAIN, on, output

CORPUS = (
    *(*TRAIN, "data=hf", "data.name=json", "data.chapter_tokens=700", "data.pack=documents"),
    *("data.val_tokens=200", "data.val_fraction=.2", "data.test_fraction=.2"),
)
SLOW = """  # late.jsonl is opened once training has logged a step
import builtins, os, time
opened = builtins.open
def slow(file, *args, **options):
    give_up = time.monotonic() + 60
    while str(file).endswith("late.jsonl") and not os.path.exists(os.environ["LOGGED"]):
        assert time.monotonic() < give_up, "training does not begin"
        time.sleep(0.05)
    return opened(file, *args, **options)
builtins.open = slow
"""


def write(path: Path, numbers: range, end: str = "") -> None:
    rows = [json.dumps({"text": f"{i} squared is {i * i} " * (1 + i % 7)}) + "\n" for i in numbers]
    path.write_text("".join(rows) + end)


def losses(run_dir: Path) -> list[str]:
    return [row[name] for row in rows_of(run_dir) for name in ("train/loss", "val/loss")]


def test_training_begins_before_its_data_are_there_and_goes_on_without_them(tmp_path: Path) -> None:
    write(tmp_path / "early.jsonl", range(40))
    write(tmp_path / "late.jsonl", range(40, 200))
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    options = [*CORPUS, "data.data_files=[early.jsonl,late.jsonl]"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    slow = {"PYTHONPATH": str(tmp_path), "LOGGED": str(whole / "metrics.csv")}
    finished(run(tmp_path, [*options, f"run_dir={whole}"], environment=slow), tmp_path)
    assert "1 chapter of 7" in output(tmp_path) and "more are prepared during" in output(tmp_path)

    told = Signal(signal.SIGTERM, rank=0, step=4)
    assert run(tmp_path, [*options, f"run_dir={parts}"], sent=told) == [143]
    chapters = [*(tmp_path / "data").glob("json-*/chapter-*")]
    assert chapters
    for each in chapters:
        shutil.rmtree(each)
    command = [*options, *on(2), f"run_dir={parts}"]
    finished(run(tmp_path, command, ranks=2, launcher="srun"), tmp_path)
    assert [bool(loss) for loss in losses(parts)] == [bool(loss) for loss in losses(whole)]
    for got, want in zip(losses(parts), losses(whole), strict=True):
        assert not want or float(got) == pytest.approx(float(want), abs=2e-6)


ENDLESS = """  # late.jsonl is never opened; once training has seen all there is, it is told to end
import builtins, os, signal, time
opened, metrics, steps = builtins.open, os.environ["METRICS"], int(os.environ["STEPS"])
def never(file, *args, **options):
    if str(file).endswith("late.jsonl"):
        while not os.path.exists(metrics) or opened(metrics).read().count("\\n") <= steps:
            time.sleep(0.2)
        time.sleep(0.3)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1000)
    return opened(file, *args, **options)
builtins.open = never
"""


def test_a_run_that_waits_ends_at_once_and_goes_on(tmp_path: Path) -> None:
    """On two ranks of which one is told to, with loader processes, after a validation."""
    write(tmp_path / "early.jsonl", range(20))
    write(tmp_path / "late.jsonl", range(20, 200))
    (tmp_path / "sitecustomize.py").write_text(ENDLESS)
    mine = tmp_path / "run"
    options = [*CORPUS, "data.data_files=[early.jsonl,late.jsonl]", *on(2), f"run_dir={mine}"]
    options += ["data.num_workers=2", "callbacks.checkpoint_last.every_n_train_steps=50"]
    endless = {"PYTHONPATH": f"{tmp_path}", "METRICS": f"{mine}/metrics.csv", "STEPS": "3"}
    began = time.monotonic()
    codes = run(tmp_path, options, ranks=2, launcher="srun", environment=endless)
    assert codes == [143, 143] and time.monotonic() - began < 100, output(tmp_path)
    assert "told to end: saved after step 3; it goes on with run_dir=" in output(tmp_path)
    finished(run(tmp_path, options, ranks=2, launcher="srun"), tmp_path)
    trained = [row["step"] for row in rows_of(mine) if row["train/loss"]]
    assert trained == [*"123456"]
    assert [row["step"] for row in rows_of(mine) if row["val/loss"]] == ["3", "6"]


def test_a_run_that_waits_ends_when_its_time_is_over(tmp_path: Path) -> None:
    write(tmp_path / "early.jsonl", range(20))
    write(tmp_path / "late.jsonl", range(20, 200))
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    mine = tmp_path / "run"
    options = [*CORPUS, "data.data_files=[early.jsonl,late.jsonl]", f"run_dir={mine}"]
    options += ["data.chapter_tokens=250", "data.num_workers=2", "val_every_n_steps=50"]
    options += ["trainer.max_time=00:00:00:01"]
    slow = {"PYTHONPATH": f"{tmp_path}", "LOGGED": f"{tmp_path / 'never'}"}
    finished(run(tmp_path, options, environment=slow), tmp_path)
    assert "training ended after step 1 of 6: trainer.max_time is over" in output(tmp_path)
    assert [row["step"] for row in rows_of(mine) if row["val/loss"]] == ["1"]
    saved = torch.load(mine / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["Timer"]["time_elapsed"]["train"] >= 1, "its wait counts"
    assert saved["global_step"] == 1


def test_what_breaks_during_training_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    """Its last step is saved: the run goes on once the file is mended."""
    write(tmp_path / "early.jsonl", range(60))
    write(tmp_path / "late.jsonl", range(60, 70), '{"text": "cut')
    options = [*CORPUS, "data.data_files=[early.jsonl,late.jsonl]", "data.pack=stream"]
    options += ["val_every_n_steps=50", f"run_dir={tmp_path / 'run'}"]
    assert run(tmp_path, [*options, "trainer.max_steps=50"]) == [1]
    assert "preparing the next chapter failed: data.name='json'" in output(tmp_path)
    assert "late.jsonl line 11: Unterminated string" in output(tmp_path)
    assert "Training has seen all there is: " in output(tmp_path)
    steps = len(rows_of(tmp_path / "run"))
    assert "Traceback" not in output(tmp_path) and steps > 3
    assert (tmp_path / "run" / "checkpoints" / f"step_{steps}.ckpt").is_file()
    write(tmp_path / "late.jsonl", range(60, 200))
    finished(run(tmp_path, [*options, f"trainer.max_steps={steps + 1}"]), tmp_path)
    assert [row["step"] for row in rows_of(tmp_path / "run")][-2:] == [str(steps), str(steps + 1)]
