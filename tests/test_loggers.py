"""Is metrics.csv whole at any moment, and is a run folder one W&B run, offline, with no account?"""

import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from tiny_run import TinyData, TinyModule, fit, tiny_trainer

from callbacks import wandb_logger
from callbacks.csv_logger import RunCSVLogger, read_rows
from callbacks.samples import Samples
from callbacks.throughput import Throughput
from callbacks.wandb_logger import RunWandbLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


# metrics.csv


def test_a_row_a_step_and_the_union_of_columns(tmp_path):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.5}, step=0)
    logger.log_metrics({"train/loss": 0.1 + 0.2}, step=9)
    logger.log_metrics({"val/bpb": 2.0}, step=9)  # joins its row, brings a column
    logger.log_metrics({"val/bpb": 1.75}, step=19)
    logger.log_metrics({"train/loss": 1.25}, step=19)  # joins its row in place
    logger.log_metrics({"train/loss": 1.0625}, step=29)
    logger.log_metrics({"train/loss": 1.0}, step=29)  # the later value stands
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,train/loss,val/bpb\n0,1.5,\n9,0.3,2\n19,1.25,1.75\n29,1,\n"
    )


def test_floats_survive_in_single_precision(tmp_path):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"x": 1.2345678806304932}, step=0)
    assert float(read_rows(logger.path)[0]["x"]) == pytest.approx(1.2345678806304932, rel=1e-9)


def test_every_call_leaves_the_file_complete(tmp_path):
    logger = RunCSVLogger(tmp_path)
    for step in range(5):
        logger.log_metrics({"a": step}, step=step)
        logger.log_metrics({"b": step}, step=step)
        rows = read_rows(logger.path)
        assert rows[-1] == {"step": str(step), "a": str(step), "b": str(step)}
        assert len(rows) == step + 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("torn", ["", "2,0.", "2,0.5"])
def test_a_line_torn_by_a_kill_is_left_out(tmp_path, torn):
    first = RunCSVLogger(tmp_path)
    first.log_metrics({"a": 0.25}, step=1)
    with first.path.open("a") as file:
        file.write(torn)
    second = RunCSVLogger(tmp_path)
    second.log_metrics({"a": 0.75}, step=3)
    assert first.path.read_text() == "step,a\n1,0.25\n3,0.75\n"


def test_a_run_that_goes_on_has_no_step_twice(tmp_path):
    first = RunCSVLogger(tmp_path)
    for step in (1, 3, 5, 7):
        first.log_metrics({"a": step}, step=step)
    second = RunCSVLogger(tmp_path)
    second.drop_after(3)
    assert [row["step"] for row in read_rows(second.path)] == ["1", "3"]
    second.log_metrics({"a": 50}, step=5)
    second.log_metrics({"a": 30}, step=3)  # late: takes its place all the same
    assert second.path.read_text() == "step,a\n1,1\n3,30\n5,50\n"
    second.log_metrics({"b": 70}, step=7)
    assert second.path.read_text() == "step,a,b\n1,1,\n3,30,\n5,50,\n7,,70\n"


def test_metrics_without_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs the step of \['a'\]"):
        RunCSVLogger(tmp_path).log_metrics({"a": 1.0})


def test_a_trainer_logs_training_validation_and_test(tmp_path):
    logger = RunCSVLogger(tmp_path)
    trainer = fit(tmp_path, logger=logger)
    trainer.test(TinyModule(), TinyData(), verbose=False)
    rows = read_rows(logger.path)
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert {"train/bpb", "val/bpb"} <= set(rows[1]) and "test/bpb" in rows[3]


class Noting(Logger):
    """Stands for TensorBoard and W&B: notes the step of every metric."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[int | None]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name in metrics:
            self.steps.setdefault(name, []).append(step)


def test_every_logger_counts_the_steps_that_are_done(tmp_path):
    noting = Noting()
    trainer = fit(tmp_path, Throughput(), logger=noting, accumulate_grad_batches=2)
    trainer.test(TinyModule(), TinyData(), verbose=False)
    steps = noting.steps
    assert steps["train/loss"] == steps["perf/tokens_per_second"] == [2, 4, 6, 8]
    assert steps["val/bpb"] == [4, 8] and steps["test/bpb"] == [8]


def test_a_file_that_counts_from_zero_goes_on_counting_from_one(tmp_path):
    logger = RunCSVLogger(tmp_path)
    older = "step,train/loss,epoch,val/bpb,test/bpb\n0,5,0,,\n1,4,0,3,\n2,3,0,,\n3,2,0,1,\n"
    logger.path.write_text(older + "4,,0,,1.5\n")
    logger.drop_after(2)
    assert logger.path.read_text() == "step,train/loss,val/bpb\n1,5,\n2,4,3\n"
    logger.drop_after(2)  # killed and started once more
    logger.log_metrics({"train/loss": 2.5}, step=3)
    assert logger.path.read_text() == "step,train/loss,val/bpb\n1,5,\n2,4,3\n3,2.5,\n"
    logger.path.write_text(older + "4,,0,,1.5\n")
    trained, tested = read_rows(logger.path)[-2:]
    assert trained == {"step": "4", "train/loss": "2", "val/bpb": "1"}
    assert tested == {"step": "4", "test/bpb": "1.5"}


# W&B


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """As on a machine that has never heard of W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.finish()


def offline_runs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))


def test_one_wandb_run_for_a_run_folder(tmp_path):
    folder = tmp_path / "nsa_tiny-stdlib" / "2026-01-01"
    for attempt in (1, 2):
        logger = RunWandbLogger(folder, name="nsa_tiny-stdlib ", tags=["a"], notes="b")
        fit(folder, Samples(8), logger=logger, max_steps=8)
        run = logger.experiment
        assert (run.group, run.project, run.tags, run.notes) == (
            "nsa_tiny-stdlib",
            "nsa",
            ("a",),
            "b",
        )
        assert run.settings.mode == "offline" and run.settings.quiet
        assert run.settings.login_timeout == 60
        if attempt == 1:
            assert run.name == "nsa_tiny-stdlib"
            identity = run.id
        wandb.finish()
        assert run.id == identity == (folder / "wandb_id.txt").read_text().strip()
        assert len(offline_runs(folder)) == attempt
        assert all(name.endswith(identity) for name in offline_runs(folder))
    tables = list(folder.rglob("samples*.table.json"))
    assert tables and '["step","prompt","sample"]' in tables[0].read_text()


def test_a_long_name_is_cut(tmp_path):
    assert len(RunWandbLogger(tmp_path, name="x" * 500)._wandb_init["name"]) == 128


def test_a_run_left_open_by_an_earlier_job_is_refused(tmp_path):
    first = RunWandbLogger(tmp_path / "a")
    first.log_metrics({"x": 1.0}, step=0)
    again, refused = "already in progress", r"still open: call wandb.finish\(\)"
    with pytest.warns(UserWarning, match=again), pytest.raises(RuntimeError, match=refused):
        RunWandbLogger(tmp_path / "b").log_metrics({"x": 1.0}, step=0)


def test_a_dry_run_starts_no_wandb_run(tmp_path):
    fit(tmp_path, logger=RunWandbLogger(tmp_path), fast_dev_run=True)
    assert wandb.run is None and not (tmp_path / "wandb_id.txt").exists()


@pytest.mark.parametrize(
    ("environment", "offline", "mode"),
    [(None, True, "offline"), (None, False, "online"), ("disabled", False, "disabled")],
)
def test_the_mode_is_offline_unless_told_otherwise(
    tmp_path, monkeypatch, environment, offline, mode
):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(wandb_logger, "refuse_if_unreachable", lambda: None)
    logger = RunWandbLogger(tmp_path, offline=offline)
    assert logger._wandb_init["mode"] == mode


def test_online_without_an_account_says_so_and_does_not_ask(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_logger, "refuse_if_unreachable", lambda: None)
    with pytest.raises(ConnectionError, match=r"(?i)api.key[^$]*logger.wandb.offline=true"):
        RunWandbLogger(tmp_path, offline=False).log_metrics({"x": 1.0}, step=0)


def test_online_without_a_network_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    refused = r"W&B does not answer at http://127.0.0.1:9 .*logger.wandb.offline=true"
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=refused):
        RunWandbLogger(tmp_path, offline=False)
    assert time.monotonic() - began < 5
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # rank zero alone talks to W&B
    RunWandbLogger(tmp_path, offline=False)


def test_an_answer_of_any_kind_will_do(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # 501 to HEAD
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        wandb_logger.refuse_if_unreachable()
        server.shutdown()


def test_the_summary_has_the_result(tmp_path):
    logger = RunWandbLogger(tmp_path)
    logger.summarize({"val_bpb": 1.0})  # nothing was logged: no run is begun for it
    assert wandb.run is None
    logger.log_metrics({"x": 1.0}, step=1)
    logger.summarize({"val_bpb": 1.25, "test_bpb": None, "metric": "bpb"})
    summary = dict(logger.experiment.summary)
    assert summary["val_bpb"] == 1.25 and summary["metric"] == "bpb" and "test_bpb" not in summary


def test_trainer_log_dir_is_the_run_folder(tmp_path):
    trainer = tiny_trainer(tmp_path, [], logger=RunCSVLogger(tmp_path))
    assert trainer.log_dir == str(tmp_path)
