"""How a step is divided: what fits is taken, all ranks agree, and trying leaves no trace."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import Counting, make_module, make_trainer
from tiny_run import OF_LIGHTNING, weights

from nsa.training import micro_batch
from nsa.training.micro_batch import Memory
from runs import division
from runs.division import Room, StepDivision, share_of
from runs.strategies import FSDP2Strategy

pytestmark = OF_LIGHTNING
GIB = 2**30
CPU = torch.device("cpu")


class Device:
    """A device on which sequences take `each` bytes, and more than `size` is too much.

    `once` is what libraries take, and keep, at the first step.
    """

    def __init__(self, each: int, size: int, rest: int = 0, once: int = 0) -> None:
        self.each, self.size, self.rest, self.once = each, size, rest, once
        self.asked: list[int] = []

    def peak_of(self, trial: Any, device: torch.device) -> int:
        sequences = trial.args[-1]
        self.asked.append(sequences)
        trial()  # a real one
        peak = self.rest + sequences * self.each + (self.once if len(self.asked) == 1 else 0)
        if peak > self.size:
            raise torch.OutOfMemoryError("out of memory")
        return peak


def memory_of(device: Device, **options: Any) -> Memory | None:
    model = make_module().model
    return micro_batch.memory_of(model, CPU, nullcontext, peak_of=device.peak_of, **options)


# What fits


@pytest.mark.parametrize(
    ("share", "room", "expected"),
    [(16, 15, 4), (16, 18, 8), (16, 17, 4), (16, 34, 16), (12, 15, 6), (7, 15, 1), (16, 3, 1)],
)
def test_the_largest_part_of_a_share_that_fits_is_taken(share, room, expected) -> None:
    """Two bytes of weights and the like, two a sequence; equal parts alone."""
    assert micro_batch.on_gpu(share, Memory(2, 2), room) == expected


def test_a_trial_of_one_and_of_two_sequences_tells_the_memory_of_any_number() -> None:
    device = Device(each=5 * GIB, size=80 * GIB, rest=3 * GIB, once=20 * GIB)
    weights_bytes = sum(p.numel() * 4 for p in make_module().model.parameters())
    memory = memory_of(device)
    assert device.asked[-2:] == [1, 2]
    assert memory == Memory(3 * GIB + 2 * weights_bytes, 5 * GIB)  # AdamW's moments were not there
    shared = memory_of(device, shards=4)
    assert memory is not None  # three quarters of weights, gradients and moments are elsewhere
    assert shared == Memory(memory.fixed - 3 * weights_bytes, 5 * GIB)


def test_where_two_do_not_fit_one_is_taken_and_where_one_does_not_it_is_known() -> None:
    memory = memory_of(Device(each=50 * GIB, size=80 * GIB))
    assert memory is not None and micro_batch.on_gpu(16, memory, 70 * GIB) == 1
    assert 50 * GIB <= memory.of(1) < 51 * GIB
    assert memory_of(Device(each=90 * GIB, size=80 * GIB)) is None
    assert micro_batch.on_gpu(16, None, 70 * GIB) == 1


@pytest.mark.parametrize(
    ("share", "seq_len", "expected"), [(8, 256, 8), (32, 1024, 32), (16, 8192, 4), (16, 10**6, 1)]
)
def test_on_a_cpu_tokens_count(share: int, seq_len: int, expected: int) -> None:
    assert micro_batch.on_cpu(share, seq_len) == expected


@pytest.mark.parametrize("mode", ["none", "full"])
def test_trying_leaves_no_trace(mode: str) -> None:
    module = make_module()
    before, state = weights(module), torch.get_rng_state()
    options = {"activation_checkpointing": mode, "peak_of": Device(1, 100).peak_of}
    micro_batch.memory_of(module.model, CPU, nullcontext, **options)
    assert torch.equal(weights(module), before) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())
    assert all(block.checkpoint is None for block in module.model.blocks)


# How a step is divided


@pytest.mark.parametrize(("world_size", "expected"), [(1, 32), (4, 8)])
def test_a_step_is_shared_by_all_processes(world_size: int, expected: int) -> None:
    assert share_of(32, world_size) == expected


@pytest.mark.parametrize("step", [6, 2])
def test_a_step_that_cannot_be_shared_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"sequences_per_step={step} must be a multiple of the 4"):
        share_of(step, 4)


def divided(folder: Path, size: int | str, **options: Any) -> tuple[Any, list[Room | None]]:
    """A run of two steps of eight sequences: its trainer, and what was announced."""
    announced: list[Room | None] = []
    division = StepDivision(8, size, val_every_n_steps=2, announce=announced.append)
    settings = {"max_steps": 2, "check_val_every_n_epoch": None, "callbacks": [division]} | options
    trainer = make_trainer(folder, **settings)
    torch.manual_seed(0)
    trainer.fit(make_module(), datamodule=Counting())
    return trainer, announced


@pytest.mark.parametrize(("size", "at_once"), [(8, 8), (3, 2), (100, 8), ("auto", 8)])
def test_a_run_takes_what_it_was_told(tmp_path: Path, size: int | str, at_once: int) -> None:
    trainer, announced = divided(tmp_path, size)
    assert trainer.datamodule.micro_batch_size == at_once
    assert trainer.accumulate_grad_batches == 8 // at_once
    assert trainer.val_check_interval == 2 * trainer.accumulate_grad_batches
    assert announced == [None]


def test_the_choice_changes_no_weight_and_no_metric(tmp_path: Path, monkeypatch) -> None:
    """Chosen as 4 of 8, it is the run that was told so."""
    told, _ = divided(tmp_path, 4)
    weights_bytes = 4 * told.lightning_module.model.num_params
    device = Device(each=100, size=2 * weights_bytes + 700)
    monkeypatch.setattr(micro_batch, "room_of", lambda *_: device.size)
    monkeypatch.setattr(micro_batch, "peak_on_gpu", device.peak_of)
    monkeypatch.setattr(division, "choose", division.choose_by_trial)
    chosen, announced = divided(tmp_path, "auto")
    assert chosen.datamodule.micro_batch_size == 4
    assert announced == [Room(2 * weights_bytes + 400, device.size)]
    assert torch.equal(weights(told.lightning_module), weights(chosen.lightning_module))
    assert told.callback_metrics == chosen.callback_metrics


def test_all_ranks_take_what_fits_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(division.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(division, "gathered", lambda number: [number, 2])
    assert division.least(8) == 2


def test_only_fsdp_shares_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shards: list[int] = []
    monkeypatch.setattr(micro_batch, "room_of", lambda *_: 10)
    monkeypatch.setattr(
        micro_batch, "memory_of", lambda *_, **options: shards.append(options["shards"])
    )
    for strategy in ("auto", FSDP2Strategy()):
        devices = 1 if strategy == "auto" else 2
        trainer: Any = make_trainer(tmp_path, strategy=strategy, devices=devices)
        monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda", 0))
        assert division.choose(trainer, make_module(), 8) == (1, None)
    assert shards == [1, 2]
