"""Do the callbacks work in two processes: files from rank zero alone, tokens of both?"""

from pathlib import Path

from forked_runs import Done, python

SCRIPT = """
import sys
from pathlib import Path
from callbacks.attention_statistics import AttentionStatistics
from callbacks.csv_logger import RunCSVLogger
from callbacks.guard import Guard
from callbacks.loss_plot import LossPlot
from callbacks.loss_spikes import LossSpikes
from callbacks.progress_bar import StepProgressBar
from callbacks.provenance import Provenance
from callbacks.rewind_metrics import RewindMetrics
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
    Throughput(), LossSpikes(), Guard(), Provenance(), RewindMetrics(), AttentionStatistics(4),
    Samples(4), saver, LossPlot(), StepProgressBar(),
]
fit(
    folder, *callbacks, module=Checked(), logger=RunCSVLogger(folder),
    devices=2, strategy="ddp_fork", use_distributed_sampler=False,
)
"""


BROKEN = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from callbacks.guard import Guard
from callbacks.loss_spikes import LossSpikes
from breaking_run import BreakingModule, fit
from nsa.training.broken_steps import skip_if_broken

class Agreeing(BreakingModule):
    def on_train_end(self):
        for weight in self.parameters():
            first, second = self.all_gather(weight.detach())
            assert torch.equal(first, second)

def train(folder, *callbacks, **options):
    torch.manual_seed(3)
    module = Agreeing(**options)
    both = {"devices": 2, "strategy": "ddp_fork", "accumulate_grad_batches": 2}
    fit(folder, *callbacks, module=module, **both)
    return module.state_dict()

def sharded(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, parts = nn.Linear(4, 3), nn.Linear(4, 3)
    parts.load_state_dict(whole.state_dict())
    fully_shard(parts)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (whole, parts)]
    for step in range(4):
        batches = torch.randn(2, 5, 4)
        for module, optimizer in zip((whole, parts), optimizers):
            optimizer.zero_grad()
            batch = batches.flatten(0, 1) if module is whole else batches[rank]
            loss = module(batch).square().mean()
            (loss * float("nan") if step == 2 and rank == 1 else loss).backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            skip_if_broken(optimizer, norm.full_tensor() if module is parts else norm)
            if module is whole and step == 2:
                continue  # one rank's is broken: what both should do
            optimizer.step()
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b.full_tensor())
    assert [state["step"] for state in optimizers[1].state.values()] == [3, 3]
    dist.destroy_process_group()

folder = Path(sys.argv[1])
multiprocessing.start_processes(sharded, (folder,), nprocs=2, start_method="fork")
breaks = {(2, 1, 0): "nan", (4, 1, 1): "impossible", (6, 1, 1): "spike"}
skipped = train(folder, LossSpikes(window=6), Guard(2), breaks=breaks)
expected = train(folder, breaks={(6, 1, 1): "spike"}, left_out={2, 4})
for name, weight in expected.items():
    assert torch.equal(skipped[name], weight), name
try:
    train(folder / "stopped", Guard(0), breaks=breaks)
except Exception as error:
    print(error)
"""


def run(script: str, folder: Path) -> Done:
    return python(script, str(folder), environment={"NSA_DATA_DIR": str(folder / "cache")})


def test_what_breaks_on_one_rank_is_skipped_on_all_and_named(tmp_path):
    """With whole weights and with sharded ones; the spike of step 6 is of the same rank."""
    done = run(BROKEN, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    named = "step 2, whose loss is nan (rank 1, micro-batch 0: samples 10–11)"
    assert done.stderr.count(f"skipped {named}") == 2  # rank zero's, of either run
    assert "skipped step 4, whose loss is inf (rank 1, micro-batch 1: samples 30–31)" in done.stderr
    assert (
        "skipped steps, 1, is above callbacks.guard.skip_budget=0" in done.stdout
        and f"  {named}" in done.stdout
    )
    files = sorted((tmp_path / "spikes").iterdir())
    assert [file.name for file in files] == ["step_2.txt", "step_4.txt", "step_6.txt"]
    lines = files[2].read_text().splitlines()
    cells = [line.split() for line in lines[5:9]]
    assert [(*row[:2], row[3]) for row in cells] == [
        ("0", "0", "40–41"),
        ("0", "1", "44–45"),
        ("1", "0", "42–43"),
        ("1", "1", "46–47"),
    ]
    assert lines[1].startswith(f"loss {sum(float(row[2]) for row in cells) / 4:.2f}")
    assert lines[10] == "--- sample 46, of rank 1, micro-batch 1"


def test_two_processes_write_one_run_folder(tmp_path):
    done = run(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 8/8") == 2  # one process's lines: the step and its validation
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"metrics.csv", "loss.png", "step_8.txt", "versions.json", "step_8.ckpt"}
    assert expected <= files
    assert not list(tmp_path.glob("resume_*"))
