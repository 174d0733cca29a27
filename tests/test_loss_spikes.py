"""Does a loss that jumps leave behind which samples it was, and is ordinary noise left alone?"""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from breaking_run import ROWS, BreakingModule, fit
from lightning.pytorch import Callback
from tiny_run import OF_LIGHTNING

from callbacks.csv_logger import RunCSVLogger, read_rows
from callbacks.every_step import Step
from callbacks.loss_spikes import LossSpikes
from callbacks.step_checkpoint import StepCheckpoint

pytestmark = OF_LIGHTNING


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "cache"))


class Seen(Callback):
    """The texts of every micro-batch, as they came."""

    def __init__(self) -> None:
        self.texts: list[list[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.texts.append([bytes(row).decode() for row in batch["tokens"].tolist()])


def run(folder: Path, *callbacks: Callback, breaks: dict, **options: Any) -> None:
    torch.manual_seed(3)
    options = {"max_steps": 12, "log_every_n_steps": 1} | options
    fit(folder, *callbacks, module=BreakingModule(breaks), **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("spikes/*"))


@pytest.mark.parametrize("every", [None, 5])
def test_a_spike_is_written_with_its_samples_and_their_text(tmp_path, every, caplog):
    seen, logger = Seen(), RunCSVLogger(tmp_path)
    spikes = LossSpikes(window=8, every_n_steps=every)
    options: Any = {"accumulate_grad_batches": 2, "logger": logger}
    run(tmp_path, seen, spikes, breaks={(9, 0, 1): "spike"}, **options)
    assert names(tmp_path) == ["step_9.txt"]
    text = (tmp_path / "spikes" / "step_9.txt").read_text()
    lines = text.splitlines()
    rows = read_rows(logger.path)
    before = torch.tensor([float(row["train/loss"]) for row in rows[:8]], dtype=torch.float64)
    median = before.quantile(0.5)
    deviation = 1.4826 * (before - median).abs().quantile(0.5)
    loss, norm = (float(rows[8][name]) for name in ("train/loss", "optim/grad_norm"))
    assert lines[:5] == [
        "step 9",
        f"loss {loss:.4f}, usual {median:.4f} ± {deviation:.4f}",
        f"gradient norm {norm:.4g}, before clipping",
        "",
        "rank  micro-batch      loss  samples",
    ]
    first, second = (line.split() for line in lines[5:7])
    assert (first[:2], first[3]) == (["0", "0"], "32–33")
    assert (second[:2], second[3]) == (["0", "1"], "34–35")
    assert (float(first[2]) + float(second[2])) / 2 == pytest.approx(loss, abs=1e-4)
    told = "".join(
        f"\n--- sample {34 + i}, of rank 0, micro-batch 1\n{seen.texts[17][i]}\n"
        for i in range(ROWS)
    )
    assert text.endswith(told)
    read_at = "9" if every is None else "10"
    assert {row["step"]: row.get("train/loss_spikes") for row in rows}[read_at] == "1"
    assert sum("train/loss_spikes" in row for row in rows) == 1
    assert f"the loss of step 9 is {loss:.4f}: see {tmp_path}/spikes/step_9.txt" in caplog.text


def test_a_run_without_a_spike_leaves_nothing(tmp_path):
    run(tmp_path, LossSpikes(window=4), breaks={}, logger=RunCSVLogger(tmp_path))
    assert not (tmp_path / "spikes").exists()
    assert not any("train/loss_spikes" in row for row in read_rows(tmp_path / "metrics.csv"))


def test_a_step_that_is_not_finite_is_written_whenever_it_comes(tmp_path):
    breaks = {(2, 0, 0): "nan", (3, 0, 0): "overflowing"}
    run(tmp_path, LossSpikes(window=8, every_n_steps=5), breaks=breaks)
    assert names(tmp_path) == ["step_2.txt", "step_3.txt"]
    first, second = (tmp_path / "spikes" / name for name in names(tmp_path))
    assert "loss nan, usual unknown yet\ngradient norm nan" in first.read_text()
    assert "gradient norm inf" in second.read_text()


def test_reports_are_bounded_over_restarts_and_spikes_are_not(tmp_path):
    breaks = {(step, 0, 0): "nan" for step in (2, 3, 5, 8, 9)}
    common: Any = {"auto_insert_metric_name": False, "monitor": "step", "mode": "max"}
    saver = StepCheckpoint(tmp_path, "step_{step}", every_n_train_steps=6, **common)
    spikes = LossSpikes(max_reports=4, every_n_steps=100)
    run(tmp_path, spikes, saver, breaks=breaks, max_steps=6)
    assert names(tmp_path) == [f"step_{step}.txt" for step in (2, 3, 5)]
    saver = StepCheckpoint(tmp_path, "step_{step}", every_n_train_steps=6, **common)
    spikes = LossSpikes(max_reports=4)
    run(tmp_path, spikes, saver, breaks=breaks, ckpt_path=tmp_path / "step_6.ckpt")
    assert names(tmp_path) == [f"step_{step}.txt" for step in (2, 3, 5, 8)]
    assert spikes.count == 5


def found(losses: list[float], **options: Any) -> list[int]:
    """The steps, from 0, that are called spikes."""
    spikes, steps = LossSpikes(**options), []
    trainer: Any = SimpleNamespace(is_global_zero=False, loggers=[], callback_metrics={})
    trainer.default_root_dir = "nowhere"
    for i, loss in enumerate(losses):
        before = spikes.count
        spikes.on_steps(trainer, None, [Step(i + 1, [[loss]], 1.0, broken=False)])  # type: ignore[arg-type]
        steps += [i] * (spikes.count - before)
    return steps


def noise(steps: int, slope: float = 0.0) -> list[float]:
    chance = random.Random(0)
    return [3.0 - slope * step + chance.gauss(0, 0.1) for step in range(steps)]


def test_noise_is_no_spike_and_neither_is_a_fall():
    assert found(noise(3000)) == []
    assert found(noise(3000, slope=0.01)) == []
    assert found([3.0 - 0.1 * (step > 500) + n for step, n in enumerate(noise(1000))]) == []


def test_a_jump_is_measured_in_deviations_of_the_window_before():
    losses = noise(300)
    losses[200] = 3.0 + 0.9
    losses[210] = 3.0 + 0.9  # the first does not hide the second
    assert found(losses) == [200, 210]
    assert found(losses, threshold=15.0) == []
    losses[30] = 100.0
    assert found(losses) == [200, 210]  # half of a window of 100 must be known
    assert found(losses, window=60) == [30, 200, 210]


def test_a_higher_level_is_soon_the_usual_one():
    steps = found([n + 2.0 * (step >= 200) for step, n in enumerate(noise(500))])
    assert steps[0] == 200 and len(steps) == steps[-1] - 199 <= 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0 of LossSpikes must be above 0"),
        ({"window": 1}, "window=1 of LossSpikes must be at least 2"),
        ({"max_reports": 0}, "max_reports=0 of LossSpikes must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossSpikes(**options)
