"""Muon beside AdamW in one optimizer, and one's own: alone, then through train.py."""

import signal
from pathlib import Path

import pytest
import torch
from forked_runs import Signal, finished, run
from squares import squares
from test_resume_matrix import TRAIN, assert_same_end, layout, load
from test_train import ADAMW, MODEL
from tiny_run import weights
from torch import nn

from nsa.training.broken_steps import skip_if_broken
from nsa.training.optimizers import build_optimizer, build_schedule
from nsa.transformer import Transformer

MUON = {"name": "muon", "momentum": 0.9, "ns_steps": 5} | ADAMW


def make_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(**{key: MODEL[key] for key in MODEL if key != "name"})


def give_gradients(model: nn.Module, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=chance)


def test_muon_has_the_hidden_matrices_and_adamw_all_else() -> None:
    model = make_model()
    groups = build_optimizer(MUON, model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [[names[id(p)] for p in group["params"]] for group in groups]
    assert sorted(name for group in grouped for name in group) == sorted(names.values())
    hidden, decay, no_decay = (set(group) for group in grouped)
    assert "layers.0.attention.to_q.weight" in hidden
    assert "head.weight" in decay and "embedding.weight" in no_decay
    assert all(p.ndim == 2 for p in groups[0]["params"])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


def test_a_matrix_moves_by_an_orthogonal_step_of_adamws_size() -> None:
    model = make_model()
    weight = model.get_parameter("layers.0.attention.to_q.weight")
    before = weight.detach().clone()
    optimizer = build_optimizer(MUON | {"weight_decay": 0.0}, model)
    give_gradients(model, 1)
    optimizer.step()
    size = 0.2 * max(weight.shape) ** 0.5 * MUON["lr"]
    singular = torch.linalg.svdvals(before - weight.detach()) / size
    # Newton-Schulz in bfloat16 leaves all but the smallest near 1.
    assert singular.max() < 1.3 and singular.median() > 0.6


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    whole, model = make_model(), make_model()
    straight, optimizer = build_optimizer(MUON, whole), build_optimizer(MUON, model)
    for step in range(4):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = build_optimizer(MUON, model)
            optimizer.load_state_dict(state)
        for one, of in ((whole, straight), (model, optimizer)):
            give_gradients(one, step)
            of.param_groups[0]["lr"] = 0.01 / (step + 1)
            of.step()
    assert torch.equal(weights(whole), weights(model))


def test_a_broken_step_changes_nothing() -> None:
    model = make_model()
    optimizer = build_optimizer(MUON, model)
    before = weights(model)
    give_gradients(model, 1)
    skip_if_broken(optimizer, torch.tensor(float("nan")))
    optimizer.step()
    assert torch.equal(weights(model), before) and not optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "lion"}, "optimizer='lion' is unknown: choose one of adamw, muon"),
        ({"momentum": 1.0}, r"optimizer\.momentum=1\.0 must be at least 0 and below 1"),
        ({"ns_steps": 0}, r"optimizer\.ns_steps=0 must lie between 1 and 99"),
        ({"nesterof": True}, "optimizer: muon takes no nesterof"),
        ({"lr": 0}, r"optimizer\.lr=0 must be a number above 0"),
    ],
)
def test_what_cannot_be_right_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(MUON | change, make_model())


def test_ones_own_optimizer_is_given_groups_and_decays_matrices_alone() -> None:
    own = {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0.5}
    optimizer = build_optimizer(own, make_model())
    assert type(optimizer) is torch.optim.SGD
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    with pytest.raises(ValueError, match="not a torch Optimizer"):
        build_optimizer(
            {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, nn.Linear(1, 1)
        )


def halving(step: int, base: float = 0.5) -> float:
    return base**step


def test_ones_own_schedule_needs_no_more_than_it_takes() -> None:
    schedule = build_schedule({"_target_": "test_optimizers.halving", "base": 0.25})
    assert schedule(2, max_steps=10) == 0.0625
    with pytest.raises(ValueError, match=r"cosine needs min_lr_ratio"):
        build_schedule({"name": "cosine", "warmup_steps": 1})


# train.py, as typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizers")
    (folder / "corpus.txt").write_text(squares(800))
    return folder


def test_muon_trains_and_goes_on_bit_for_bit_as_another_optimizer_cannot(folder: Path) -> None:
    command = [*TRAIN, *layout(1, 0, 2), "optimizer=muon"]
    whole, run_dir = folder / "whole", folder / "told"
    finished(run(folder, [*command, f"run_dir={whole}"]), folder)
    told = Signal(signal.SIGTERM, rank=0, step=5)
    assert run(folder, [*command, f"run_dir={run_dir}"], sent=told) == [143]
    assert run(folder, [*command, f"run_dir={run_dir}", "optimizer=adamw"]) == [1]
    assert "optimizer.name=adamw, the checkpoint has muon" in (folder / "run.log").read_text()
    finished(run(folder, [*command, f"run_dir={run_dir}"]), folder)
    assert_same_end(run_dir, whole)
    groups = load(whole / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert ["momentum" in group for group in groups] == [True, False, False]


def test_muon_refuses_a_model_in_parts_before_the_data_are_read(folder: Path) -> None:
    parts = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.paths=[none]"]
    run_dir = folder / "parts"
    assert run(folder, [*TRAIN, *parts, "optimizer=muon", f"run_dir={run_dir}"]) == [1]
    said = (folder / "run.log").read_text()
    assert "optimizer=muon needs whole matrices" in said and "Traceback" not in said
    assert not run_dir.exists()


def test_ones_own_optimizer_and_schedule_train(folder: Path, monkeypatch) -> None:
    (folder / "mine.py").write_text("def constant(step, warmup_steps):\n    return 0.5\n")
    monkeypatch.syspath_prepend(folder)
    run_dir = folder / "own"
    own = ["optimizer=own", "optimizer._target_=torch.optim.SGD", "+optimizer.momentum=0.9"]
    own += ["scheduler=own", "scheduler._target_=mine.constant", "trainer.max_steps=2"]
    finished(run(folder, [*TRAIN, *layout(1, 0, 1), *own, f"run_dir={run_dir}"]), folder)
    (state,) = load(run_dir / "checkpoints" / "last.ckpt")["optimizer_states"]
    group = state["param_groups"][0]
    assert (group["momentum"], group["lr"]) == (0.9, group["initial_lr"] / 2)
