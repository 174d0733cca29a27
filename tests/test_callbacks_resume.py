"""Do checkpoints, metrics.csv and the callbacks of conf/callbacks carry a run across a kill?"""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import OmegaConf
from tiny_run import OF_LIGHTNING, TinyModule, fit

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.csv_logger import RunCSVLogger, read_rows
from callbacks.early_stopping import MetricEarlyStopping
from callbacks.rewind_metrics import RewindMetrics
from callbacks.step_checkpoint import RunCheckpoint, StepCheckpoint

CONF = Path(__file__).parent.parent / "conf"

pytestmark = OF_LIGHTNING


class Killed(Exception):
    """Stands for a SIGKILL: nothing after it runs, no callback hears of it."""


class Mortal(TinyModule):
    """Dies in the forward pass of a step."""

    def __init__(self, dies_at: int | None = None) -> None:
        super().__init__()
        self.dies_at = dies_at

    def training_step(self, batch, batch_idx):
        if self.global_step + 1 == self.dies_at:
            raise Killed
        return super().training_step(batch, batch_idx)


def savers(folder: Path, every: int) -> list[ModelCheckpoint]:
    common: Any = {"auto_insert_metric_name": False, "enable_version_counter": False}
    best = RunCheckpoint(folder, "best_{step}", monitor="val/bpb", **common)
    last = StepCheckpoint(
        folder,
        "step_{step}",
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=every,
        save_last="link",
        **common,
    )
    return [best, last]


def run(folder: Path, every: int, **options: Any) -> TinyModule:
    torch.manual_seed(5)
    module = Mortal(options.pop("dies_at", None))
    try:
        fit(folder, RewindMetrics(), *savers(folder, every), module=module, **options)
    except Killed:
        assert module.dies_at is not None
    return module


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.ckpt")}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [4, 3])  # with the validations, and between them
def test_a_killed_run_ends_as_one_never_interrupted(tmp_path, every, accumulate):
    ends = []
    for kind in ("whole", "killed"):
        folder = tmp_path / kind
        options: Any = {
            "max_steps": 14,
            "accumulate_grad_batches": accumulate,
            "num_sanity_val_steps": 0,
        }
        if kind == "killed":
            run(folder, every, dies_at=11, logger=RunCSVLogger(folder), **options)
            last = (folder / "last.ckpt").resolve()
            assert last.name == f"step_{8 if every == 4 else 9}.ckpt"
            options["ckpt_path"] = folder / "last.ckpt"
        module = run(folder, every, logger=RunCSVLogger(folder), **options)
        rows = read_rows(folder / "metrics.csv")
        ends.append((module.state_dict(), rows, names(folder)))
    (whole, rows, files), (killed, killed_rows, killed_files) = ends
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert rows == killed_rows
    assert [int(row["step"]) for row in rows] == sorted({int(row["step"]) for row in rows})
    assert files == killed_files  # no best checkpoint is forgotten
    assert "step_14.ckpt" in files  # the end is saved, on no cadence


def test_a_step_that_is_saved_anew_takes_the_place_of_its_own_file(tmp_path):
    best, last = savers(tmp_path, 2)
    trainer = fit(tmp_path, best, last)
    kept = names(tmp_path)
    assert {"step_6.ckpt", "step_8.ckpt"} <= kept
    (tmp_path / "step_8.ckpt").unlink()
    last.save(trainer)
    assert names(tmp_path) == kept


def test_a_resumed_run_knows_the_validation_of_the_step_it_goes_on_from(tmp_path):
    run(tmp_path, 4, max_steps=4)
    content = torch.load(tmp_path / "step_4.ckpt", weights_only=True)
    states = [state for key, state in content["callbacks"].items() if "val/bpb" in key]
    assert states[0]["best_model_path"].endswith("best_4.ckpt")


def test_a_run_from_before_data_named_their_metric_keeps_its_best_score(tmp_path):
    former = EarlyStopping("val/bpb")
    fit(tmp_path, *savers(tmp_path, 4), former, max_steps=4)
    naming: Any = {"auto_insert_metric_name": False, "enable_version_counter": False}
    best, stopper = BestCheckpoint(tmp_path, "best_{step}", **naming), MetricEarlyStopping()
    options: Any = {"ckpt_path": tmp_path / "last.ckpt", "max_steps": 5, "limit_val_batches": 0}
    fit(tmp_path, best, savers(tmp_path, 4)[1], stopper, **options)
    assert best.best_model_score == stopper.best_score == former.best_score
    assert math.isfinite(former.best_score) and best.best_model_path == str(
        tmp_path / "best_4.ckpt"
    )


def test_step_checkpoints_are_kept_by_number(tmp_path):
    run(tmp_path, 2)
    assert names(tmp_path) == {"step_6.ckpt", "step_8.ckpt", "best_8.ckpt", "last.ckpt"}
    assert (tmp_path / "last.ckpt").readlink() == Path("step_8.ckpt")


def test_a_finished_run_can_be_made_longer(tmp_path):
    module = run(tmp_path / "whole", 3, max_steps=14)
    run(tmp_path / "longer", 3, max_steps=10)
    last = tmp_path / "longer" / "last.ckpt"
    assert last.resolve().name == "step_10.ckpt"
    longer = run(tmp_path / "longer", 3, max_steps=14, ckpt_path=last)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, longer.state_dict()[name])


def test_metrics_of_a_lost_timeline_are_dropped(tmp_path):
    """Rows of validations that the resumed run has no more do not stay."""
    run(tmp_path, 3, dies_at=6, logger=RunCSVLogger(tmp_path))
    RunCSVLogger(tmp_path).log_metrics({"train/loss": 9.0}, step=5)
    RunCSVLogger(tmp_path).log_metrics({"test/bpb": 9.0}, step=5)
    path = tmp_path / "last.ckpt"
    run(tmp_path, 3, ckpt_path=path, logger=RunCSVLogger(tmp_path), log_every_n_steps=4)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4", "8"]
    assert not any("test/bpb" in row for row in rows)


# conf/callbacks


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*overrides])


@pytest.fixture
def default(tmp_path) -> Any:
    cfg = composed(f"run_dir='{tmp_path}'", "val_every_n_steps=4")
    return cfg.callbacks


def test_the_default_callbacks_fill_a_run_folder(tmp_path, default):
    callbacks = [instantiate(node) for node in default.values()]
    fit(tmp_path, *callbacks, logger=RunCSVLogger(tmp_path))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    best = next(file for file in files if "best" in file)
    assert best.startswith("checkpoints/best_step_8_bpb_")
    expected = {
        "checkpoints/step_4.ckpt",
        "checkpoints/step_8.ckpt",
        "checkpoints/last.ckpt",
        "metrics.csv",
        "loss.png",
        "samples/step_4.txt",
        "samples/step_8.txt",
        "versions.json",
        "git.json",
        "command.txt",
    }
    assert expected <= files
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 8


def test_best_is_the_checkpoint_that_lightning_takes_for_best(tmp_path, default):
    callbacks = [instantiate(node) for node in default.values()]
    trainer = fit(tmp_path, *callbacks, logger=RunCSVLogger(tmp_path))
    assert trainer.checkpoint_callback.monitor == "val/bpb"  # type: ignore[union-attr]


def test_yaml_spells_every_option_of_our_own_callbacks(default):
    for name, node in default.items():
        kind = get_class(node._target_)
        if not issubclass(kind, ModelCheckpoint):  # whose options are Lightning's
            options = set(inspect.signature(kind).parameters)
            assert set(node) - {"_target_"} == options, name


def test_early_stopping_is_a_choice(tmp_path, default):
    assert "early_stopping" not in default
    cfg = composed("callbacks=early_stopping", f"run_dir='{tmp_path}'")
    assert set(cfg.callbacks) == {*default, "early_stopping"}
    stopper = instantiate(cfg.callbacks.early_stopping, patience=2)
    assert isinstance(stopper, EarlyStopping)
    module = TinyModule()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    trainer = fit(tmp_path, stopper, module=module, max_steps=100)
    assert trainer.global_step == 12  # validations at 4, 8 and 12


def test_callbacks_can_be_dropped(tmp_path):
    assert composed("callbacks=none").callbacks == {}
    cfg = composed("~callbacks.samples", "callbacks.loss_plot=null")
    assert "samples" not in cfg.callbacks and cfg.callbacks.loss_plot is None


def test_logger_choices(tmp_path):
    default = composed("run_dir=x/y").logger
    assert set(default) == {"csv", "wandb"}
    options = set(inspect.signature(get_class(default.wandb._target_)).parameters)
    assert set(default.wandb) - {"_target_"} == options
    assert default.wandb.offline
    assert set(composed("logger=csv").logger) == {"csv"}
    board = composed("logger=tensorboard", f"run_dir='{tmp_path}'").logger
    assert set(board) == {"csv", "tensorboard"}
    fit(tmp_path, logger=[instantiate(node) for node in board.values()])
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert read_rows(tmp_path / "metrics.csv")
    assert OmegaConf.is_config(board)
