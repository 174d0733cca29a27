"""A signal saves the run at the end of the step it came in; the resume matrix does it for ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from forked_runs import ROOT, Signal, finished, run
from squares import squares
from tiny_run import OF_LIGHTNING, TinyModule, fit

from callbacks.csv_logger import read_rows
from callbacks.preemption import Preempted, Preemption
from callbacks.signals import SIGNALS, leave_on_signals
from callbacks.step_checkpoint import StepCheckpoint

pytestmark = OF_LIGHTNING


class SignalAt(TinyModule):
    """Signals its own process in a micro-batch, or in a validation, of an optimizer step."""

    def __init__(self, step: int, which: signal.Signals, where: str = "training") -> None:
        super().__init__()
        self.when = (where, step)
        self.which = which

    def training_step(self, batch, batch_idx):
        if (("training", self.global_step)) == self.when:
            self.when = ("sent", 0)
            os.kill(os.getpid(), self.which)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if (("validation", self.global_step)) == self.when:
            os.kill(os.getpid(), self.which)
        super().validation_step(batch, batch_idx)


@pytest.fixture(autouse=True)
def signals_are_heard():
    """Also where whoever started the tests has them ignored, as a shell does in the background."""
    before = {which: signal.getsignal(which) for which in SIGNALS}
    for which in SIGNALS:
        default = signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL
        signal.signal(which, default)
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


def saver(folder: Path, every: int = 100) -> StepCheckpoint:
    options = {"monitor": "step", "mode": "max", "auto_insert_metric_name": False}
    return StepCheckpoint(
        dirpath=folder,
        filename="step_{step}",
        every_n_train_steps=every,
        save_last="link",
        enable_version_counter=False,
        **options,
    )


@pytest.mark.parametrize("which", SIGNALS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_signal_saves_at_the_end_of_its_step(
    tmp_path: Path, which: signal.Signals, accumulate: int
) -> None:
    interrupt = which == signal.SIGINT
    # A second Ctrl-C is left to the system: nothing of this process can be in its way.
    after = signal.SIG_DFL if interrupt else signal.getsignal(which)
    with pytest.raises(Preempted, match="saved after step 3") as told:
        fit(
            tmp_path,
            saver(tmp_path),
            Preemption(),
            module=SignalAt(2, which),
            accumulate_grad_batches=accumulate,
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert signal.getsignal(which) == after
    assert told.value.exit_code == (130 if interrupt else 143)


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        trainer = fit(tmp_path, saver(tmp_path), Preemption(), module=SignalAt(2, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.global_step == 8


@pytest.mark.parametrize(("where", "step"), [("training", 3), ("validation", 4)])
def test_a_validation_that_is_due_is_finished_first(tmp_path: Path, where: str, step: int) -> None:
    """The run knows its result: it is not measured again where the run goes on."""
    measured = []

    class Measured(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                measured.append(trainer.global_step)

    module = SignalAt(step, signal.SIGTERM, where)
    with pytest.raises(Preempted, match="saved after step 4"):
        fit(tmp_path, saver(tmp_path), Preemption(), Measured(), module=module)
    assert measured == [4]
    fit(tmp_path, saver(tmp_path), Measured(), ckpt_path=tmp_path / "last.ckpt")
    assert measured == [4, 8]


def test_the_last_step_ends_a_run_as_always(tmp_path: Path) -> None:
    module = SignalAt(7, signal.SIGTERM)
    trainer = fit(tmp_path, saver(tmp_path), Preemption(), module=module)
    assert trainer.global_step == 8


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_training_a_signal_ends_the_program_at_once(
    tmp_path: Path, which: signal.Signals, code: int
) -> None:
    class SignalInSanityCheck(TinyModule):
        def validation_step(self, batch, batch_idx):
            os.kill(os.getpid(), which)

    leave_on_signals()
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, saver(tmp_path), Preemption(), module=SignalInSanityCheck())
    assert end.value.code == code and not list(tmp_path.glob("*.ckpt"))


def test_a_run_that_is_preempted_often_keeps_no_more_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 5):
        ckpt_path = tmp_path / "last.ckpt" if step > 1 else None
        with pytest.raises(Preempted):
            fit(
                tmp_path,
                saver(tmp_path),
                Preemption(),
                module=SignalAt(step - 1, signal.SIGTERM),
                ckpt_path=None if ckpt_path is None else ckpt_path.resolve(),
            )
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "step_5.ckpt"}


def test_it_needs_what_saves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep that one too, or drop both"):
        fit(tmp_path, Preemption())


# Through train.py

TRAIN = (
    *("trainer=cpu", "trainer.max_steps=6", "trainer.log_every_n_steps=1", "val_every_n_steps=3"),
    *("trainer.num_sanity_val_steps=0", "data.val_tokens=400", "data.test_tokens=400"),
    *("model.dim=16", "model.depth=1", "model.heads=2", "model.dim_head=8", "model.seq_len=32"),
    *("batch.sequences_per_step=4", "batch.micro_batch_size=4", "scheduler.warmup_steps=2"),
    *("logger=csv", "callbacks.samples.new_tokens=2", "data=text", "data.paths=[corpus.txt]"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(squares(800))
    return tmp_path


def test_ctrl_c_and_a_closed_terminal_save_the_run_until_it_is_finished(folder: Path) -> None:
    command = [*TRAIN, "run_dir=outputs/mine", "float32_matmul_precision=medium"]
    mine, log = folder / "outputs" / "mine", folder / "run.log"
    twice = Signal(signal.SIGINT, 0, 0, times=2)
    assert run(folder, command, sent=twice) == [-signal.SIGINT]
    assert "Ctrl-C again ends at once, without saving" in log.read_text()
    assert not list(mine.glob("checkpoints/*.ckpt"))
    for which, step, code in ((signal.SIGINT, 1, 130), (signal.SIGHUP, 3, 143)):
        assert run(folder, command, sent=Signal(which, 0, step)) == [code], log.read_text()[-3000:]
        assert (mine / "checkpoints" / f"step_{step + 1}.ckpt").is_file()
        told = f"told to end: saved after step {step + 1}; it goes on with run_dir="
        assert told in log.read_text()
        (mine / "loss.png").unlink()
    finished(run(folder, command), folder)
    assert [row["step"] for row in read_rows(mine / "metrics.csv")] == list("123456")
    assert "finished" not in log.read_text() and "Traceback" not in log.read_text()
    assert "precision  32-true, float32 products: medium" in log.read_text()
    log.unlink()
    finished(run(folder, command), folder)
    assert "this run is finished: 6 of trainer.max_steps=6 steps are done" in log.read_text()


LOADER = """
import time
from data.loader_signals import leave_signals_to_the_trainer
leave_signals_to_the_trainer(0)
print("serving", flush=True)
time.sleep(60)
"""


def test_a_loader_obeys_its_trainer_alone() -> None:
    command = [sys.executable, "-c", LOADER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as loader:
        assert loader.stdout.readline() == b"serving\n"
        stranger = f"kill -TERM {loader.pid}; kill -USR1 {loader.pid}"
        subprocess.run(["sh", "-c", stranger], check=True)
        with pytest.raises(subprocess.TimeoutExpired):
            loader.wait(timeout=0.5)
        loader.terminate()
        assert loader.wait(timeout=20) == 0
