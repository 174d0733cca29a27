"""One run, killed again and again at random moments, ends with the weights of one left alone.

    python tests/soak.py [--kills 20] [--seed 0]      make soak; about five minutes on two cores

Every fifth kill comes at any moment of a start, the others somewhere in training: in a step, in a
validation, or while a checkpoint is being written.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from squares import squares
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SAVED_EVERY = 10
TRAIN = (
    *("trainer=cpu", "trainer.log_every_n_steps=1", f"val_every_n_steps={SAVED_EVERY}"),
    *("model.dim=32", "model.depth=2", "model.heads=2", "model.dim_head=16", "model.seq_len=64"),
    *("model.dropout=0.1", "batch.sequences_per_step=4", "batch.micro_batch_size=2"),
    *("scheduler.warmup_steps=10", "callbacks.samples.new_tokens=4", "test=false"),
    *("data=text", "data.paths=[corpus.txt]", "data.val_tokens=1000", "data.num_workers=2"),
)


def start(folder: Path, run_dir: str, steps: int) -> subprocess.Popen[str]:
    """The run's command line, always the same, in a process group of its own."""
    environment = os.environ | {"NSA_DATA_DIR": str(folder / "data"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *TRAIN, f"trainer.max_steps={steps}"]
    return subprocess.Popen(
        [*command, f"run_dir={run_dir}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a run; its output if it did not end well."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}\n{output[-4000:]}")


def kill_somewhere(process: subprocess.Popen[str], chance: random.Random, starting: bool) -> int:
    """Kill the process group at a random moment; returns the last step it had shown."""
    step, target = 0, chance.randrange(1, 2 * SAVED_EVERY)
    if starting:
        threading.Timer(chance.uniform(0, 10), os.killpg, (process.pid, signal.SIGKILL)).start()
    assert process.stdout is not None
    shown = 0
    for line in process.stdout:
        if line.startswith("step "):
            step = int(line.split()[1].partition("/")[0])
            shown += 1
        if shown == target and not starting:
            time.sleep(chance.uniform(0, 0.2))
            os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        sys.exit(f"the run ended at step {step}, before it could be killed: raise --steps")
    return step


def last_checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus.txt").write_text(squares(3000))
        finish(start(folder, "whole", options.steps))
        bar = tqdm(range(options.kills), desc=f"kills (seed {options.seed})", file=sys.stdout)
        for number in bar:
            process = start(folder, "killed", options.steps)
            step = kill_somewhere(process, chance, starting=number % 5 == 4)
            bar.set_postfix(step=step)
        finish(start(folder, "killed", options.steps))
        whole, killed = (last_checkpoint(folder / run) for run in ("whole", "killed"))
    same = [torch.equal(w, killed["state_dict"][k]) for k, w in whole["state_dict"].items()]
    print(
        f"{options.kills} kills in {whole['global_step']} steps: "
        f"{sum(same)} of {len(same)} tensors equal to those of a run left alone, bit for bit"
    )
    sys.exit(not all(same) or whole["global_step"] != killed["global_step"])


if __name__ == "__main__":
    main()
