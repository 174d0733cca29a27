"""Do the callbacks work in two processes: files from rank zero alone, tokens of both?"""

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys
from pathlib import Path
from callbacks.attention_statistics import AttentionStatistics
from callbacks.csv_logger import RunCSVLogger
from callbacks.guard import Guard
from callbacks.loss_plot import LossPlot
from callbacks.progress_bar import StepProgressBar
from callbacks.provenance import Provenance
from callbacks.resume import Resume
from callbacks.samples import Samples
from callbacks.step_checkpoint import StepCheckpoint
from callbacks.throughput import Throughput
from tiny_run import TOKENS_PER_MICRO_BATCH, TinyModule, fit

class Checked(TinyModule):
    def on_fit_end(self):
        counted = self.trainer.callbacks[0]._tokens
        assert counted == 2 * 8 * TOKENS_PER_MICRO_BATCH, counted

folder = Path(sys.argv[1])
common = {"dirpath": folder / "checkpoints", "auto_insert_metric_name": False}
saver = StepCheckpoint(
    filename="step_{step}", monitor="step", mode="max", every_n_train_steps=4, save_last="link",
    **common
)
callbacks = [
    Throughput(), Guard(), Provenance(), Resume(), AttentionStatistics(4), Samples(4), saver,
    LossPlot(), StepProgressBar(),
]
fit(
    folder, *callbacks, module=Checked(), logger=RunCSVLogger(folder),
    devices=2, strategy="ddp_fork", use_distributed_sampler=False,
)
"""


BROKEN = """
import math, sys
from pathlib import Path
from callbacks.guard import Guard
from tiny_run import TinyModule, fit

class Broken(TinyModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_rank == 1 and self.global_step == 2 else loss

options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
fit(Path(sys.argv[1]), Guard(), module=Broken(), **options)
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    options: Any = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
    return subprocess.run(command, env=environment, **options)


def test_a_loss_that_breaks_on_one_rank_stops_all(tmp_path):
    done = run(BROKEN, tmp_path)
    assert done.returncode != 0 and "the loss is nan at step 3" in done.stderr


def test_two_processes_write_one_run_folder(tmp_path):
    done = run(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 8/8") == 2  # one process's lines: the step and its validation
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"metrics.csv", "loss.png", "step_8.txt", "versions.json", "step_8.ckpt"}
    assert expected <= files
    assert not list(tmp_path.glob("resume_*"))
