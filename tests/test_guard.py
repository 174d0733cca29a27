"""Does a broken number leave the run as it was, and do too many of them end it in good order?"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from breaking_run import BreakingModule, fit
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from tiny_run import OF_LIGHTNING, weights
from torch import nn

from callbacks.csv_logger import RunCSVLogger, read_rows
from callbacks.guard import Guard
from callbacks.step_checkpoint import StepCheckpoint
from nsa.training.broken_steps import breaking_its_gradient, skip_if_broken
from runs import checkpoint_faults

pytestmark = OF_LIGHTNING


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path / "cache"))


def trained(folder: Path, *callbacks: Callback, **options: Any) -> tuple[Any, dict]:
    """Weights, and all that the optimizer and the schedule have become."""
    names = ("breaks", "left_out", "fused")
    torch.manual_seed(3)
    module = BreakingModule(**{name: options.pop(name) for name in names if name in options})
    trainer = fit(folder, *callbacks, module=module, **options)
    assert trainer.global_step == trainer.max_steps
    schedule = trainer.lr_scheduler_configs[0].scheduler.state_dict()
    return module, {"optimizer": trainer.optimizers[0].state_dict(), "schedule": schedule}


def saver(folder: Path, every: int = 100) -> StepCheckpoint:
    options: Any = {"monitor": "step", "mode": "max", "save_last": "link", "save_top_k": -1}
    options |= {"auto_insert_metric_name": False, "enable_version_counter": False}
    return StepCheckpoint(folder, "step_{step}", every_n_train_steps=every, **options)


# a broken step changes nothing


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # of the reference
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", ["nan", "impossible", "overflowing"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_run_goes_on_as_if_a_broken_step_had_been_left_out(tmp_path, step, how, fused):
    """Weights, moments, step counts and learning rate to the bit; the break is in one of three."""
    options: Any = {"fused": fused, "accumulate_grad_batches": 3, "gradient_clip_val": 1.0}
    broken, state = trained(tmp_path, breaks={(step, 0, 1): how}, **options)
    reference, expected = trained(tmp_path, left_out={step}, **options)
    for weight, wanted in zip(broken.parameters(), reference.parameters(), strict=True):
        assert torch.equal(weight, wanted) and torch.isfinite(weight).all()
    assert state["schedule"] == expected["schedule"]
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for index, moments in expected["optimizer"]["state"].items():
        assert moments["step"] == 5
        for name, value in moments.items():
            assert torch.equal(state["optimizer"]["state"][index][name], value), name


class Watch(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(weights(pl_module))


def test_a_broken_step_leaves_the_weights_and_the_next_one_moves_them(tmp_path):
    watch = Watch()
    trained(tmp_path, watch, breaks={(3, 0, 0): "nan"})
    moved = [not torch.equal(*pair) for pair in zip(watch.weights, watch.weights[1:], strict=False)]
    assert moved == [True, False, True, True, True]


def test_a_good_loss_and_its_gradient_stay_as_they_are():
    loss = torch.tensor(2.5, requires_grad=True)
    breaking_its_gradient(loss).backward()
    assert loss.grad == 1.0 and breaking_its_gradient(loss) == 2.5


def test_a_fused_checkpoint_goes_on_unfused_and_the_other_way_round(tmp_path):
    """The optimizer's state says how it steps, whatever the config does."""
    for fused in (True, False):
        folder = tmp_path / str(fused)
        trained(folder, saver(folder), max_steps=2, fused=fused)
        options: Any = {"breaks": {(4, 0, 0): "nan"}, "ckpt_path": folder / "last.ckpt"}
        module, _ = trained(folder, saver(folder), fused=not fused, **options)
        assert all(torch.isfinite(weight).all() for weight in module.parameters())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("broken", [False, True])
def test_a_gpu_is_not_waited_for(broken):
    layer = nn.Linear(4, 4, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    before = layer.weight.detach().clone()
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = layer(torch.ones(2, 4, device="cuda")).square().mean()
        breaking_its_gradient(loss / 0 if broken else loss).backward()
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        skip_if_broken(optimizer, norm)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(layer.weight, before) == broken
    assert [float(state["step"]) for state in optimizer.state.values()] == [1 - broken] * 2


# the guard


def test_skipped_steps_are_named_counted_and_logged(tmp_path, caplog):
    breaks = {(2, 0, 1): "nan", (4, 0, 0): "impossible", (5, 0, 0): "overflowing"}
    trained(
        tmp_path, Guard(), breaks=breaks, accumulate_grad_batches=2, logger=RunCSVLogger(tmp_path)
    )
    assert [record.getMessage() for record in caplog.records if "skipped" in record.message] == [
        "skipped step 2, whose loss is nan (rank 0, micro-batch 1: samples 6–7); "
        "1 skipped so far, of 10 at most",
        "skipped step 4, whose loss is inf (rank 0, micro-batch 0: samples 12–13); "
        "2 skipped so far, of 10 at most",
        "skipped step 5, whose gradient norm is inf, every loss being finite (samples 16–19); "
        "3 skipped so far, of 10 at most",
    ]
    rows = read_rows(tmp_path / "metrics.csv")
    counts = {row["step"]: row.get("optim/skipped_steps") for row in rows}
    assert counts == {"2": "1", "4": "2", "5": "3", "6": None}  # logged as it grows


def test_a_run_without_a_broken_step_hears_nothing_of_the_guard(tmp_path, caplog):
    trained(tmp_path, Guard(skip_budget=0), logger=RunCSVLogger(tmp_path))
    assert "skipped" not in caplog.text
    assert not any("optim/skipped_steps" in row for row in read_rows(tmp_path / "metrics.csv"))


def test_more_than_the_budget_ends_the_run_with_a_checkpoint_it_can_go_on_from(tmp_path):
    breaks = {(2, 0, 0): "nan", (4, 0, 0): "impossible"}
    last = tmp_path / "last.ckpt"
    message = (
        r"the number of skipped steps, 2, is above callbacks\.guard\.skip_budget=1\. .*\n"
        r"  step 2, whose loss is nan \(rank 0, micro-batch 0: samples 2–3\)\n"
        r"  step 4, whose loss is inf \(rank 0, micro-batch 0: samples 6–7\)\n"
        r"If they follow one another, the weights have diverged: start again with a lower "
        r"optimizer\.lr .*\. If not, go on behind these samples with a larger budget; "
        rf"the newest checkpoint is {last}$"
    )
    with pytest.raises(FloatingPointError, match=message):
        trained(tmp_path, Guard(skip_budget=1), saver(tmp_path), breaks=breaks)
    assert checkpoint_faults.find_fault(last) is None
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == 4
    assert all(torch.isfinite(weight).all() for weight in content["state_dict"].values())
    module, _ = trained(tmp_path, Guard(skip_budget=2), saver(tmp_path), ckpt_path=last)
    whole, _ = trained(tmp_path / "whole", Guard(), breaks=breaks)
    for weight, wanted in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, wanted)


def test_a_run_that_goes_on_counts_from_where_it_was(tmp_path, caplog):
    """Also what was skipped, but not yet read, when the checkpoint was written."""
    options: Any = {"breaks": {(2, 0, 0): "nan", (5, 0, 0): "nan"}}
    trained(tmp_path, Guard(1, every_n_steps=100), saver(tmp_path, 3), max_steps=4, **options)
    last = tmp_path / "step_3.ckpt"
    assert torch.load(last, weights_only=True)["callbacks"]["Guard"] == {"count": 1}
    with pytest.raises(FloatingPointError, match=r"skipped steps, 2, is above .*=1"):
        trained(tmp_path, Guard(1), saver(tmp_path, 3), ckpt_path=last, **options)
    trained(tmp_path, Guard(2), saver(tmp_path, 3), ckpt_path=last, **options)
    assert "2 skipped so far, of 2 at most" in caplog.text


def test_the_guard_reads_late_but_names_the_step(tmp_path):
    watch = Watch()
    with pytest.raises(FloatingPointError, match="step 2, whose loss is nan"):
        trained(tmp_path, Guard(0, every_n_steps=4), watch, breaks={(2, 0, 0): "nan"})
    assert len(watch.weights) == 3  # the guard precedes the watch, and stops step 4


def test_the_end_of_a_run_is_read_too(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 6.*\n.*no checkpoint was written yet"):
        trained(tmp_path, Guard(0, every_n_steps=4), breaks={(6, 0, 0): "nan"})


def test_the_guard_reads_at_every_step_on_a_cpu_and_at_log_points_elsewhere():
    for device, every in (("cpu", 1), ("meta", None)):
        guard = Guard()
        module: Any = SimpleNamespace(device=torch.device(device))
        guard.on_train_start(SimpleNamespace(global_step=0), module)  # type: ignore[arg-type]
        assert guard.every_n_steps == every


class Breaker(Callback):
    """The gradient was finite, the update was not."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 2:
            pl_module.model.head.weight.data[3] = math.inf


def test_the_guard_keeps_broken_weights_out_of_checkpoints(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2)
    message = r"not finite after step 2, 1 of \d+, model\.head\.weight first.*no checkpoint was"
    with pytest.raises(FloatingPointError, match=message):
        trained(tmp_path, Guard(), Breaker(), saving)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="skip_budget=-1 of Guard must be at least 0"):
        Guard(skip_budget=-1)


# a scaler skips steps of its own


class Halvings(Callback):
    """The scale after every step."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def on_train_batch_end(self, trainer, *args):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize(("backoff", "counted"), [(2.0**-30, 0), (2.0**-50, 1)])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_scale_that_is_too_high_is_no_broken_step(tmp_path, backoff, counted):
    """Unless it was no scale to speak of: then the gradient is broken whatever the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=backoff)
    plugin: Any = MixedPrecision("16-mixed", "cpu", scaler)
    guard, halvings = Guard(), Halvings()
    trained(tmp_path, guard, halvings, fused=False, plugins=[plugin])
    assert halvings.scales == [2.0**40 * backoff] * 6  # the first step's, and no other
    assert guard.count == counted


def test_a_broken_loss_under_a_scaler_is_counted_and_skipped(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin: Any = MixedPrecision("16-mixed", "cpu", scaler)
    guard, halvings, watch = Guard(), Halvings(), Watch()
    breaks = {(3, 0, 0): "impossible"}
    trained(tmp_path, guard, halvings, watch, breaks=breaks, fused=False, plugins=[plugin])
    assert halvings.scales == [4.0, 4.0, 2.0, 2.0, 2.0, 2.0] and guard.count == 1
    assert torch.equal(watch.weights[1], watch.weights[2])
