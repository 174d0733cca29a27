"""Do several GPUs learn what one learns, also across SIGTERM and another strategy?

`python -m benchmarks.probes.two_gpus` runs train.py: 50 steps of nsa_small on one GPU, with DDP and
with FSDP2, at the same global batch, and prints how far their losses are apart. Then a run with
DDP is ended by SIGTERM, goes on with one GPU, is ended again, and goes on with FSDP2: its losses
against those of one GPU. Last nsa_medium at 65,536 tokens, sharded and recomputed.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LINES = 400_000  # of made-up text
QUIET = (
    *("logger=csv", "test=false", "val_every_n_steps=1000000", "trainer.limit_val_batches=2"),
    *("trainer.num_sanity_val_steps=0", "callbacks.samples=null", "callbacks.loss_plot=null"),
    *("callbacks.attention_statistics=null", "trainer.log_every_n_steps=1"),
)


class Runs:
    """Runs of train.py in folders of their own, on the same text."""

    def __init__(self, folder: Path, seconds: float, extra: Sequence[str]) -> None:
        self.folder, self.seconds, self.extra = folder, seconds, extra
        self.text = folder / "text.txt"
        self.text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(LINES)))

    def run(self, name: str, words: Sequence[str], until: int | None = None) -> str:
        """Train in the folder `name`, to the end or until step `until`; how it ended."""
        run = self.folder / name
        command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), "data=text"]
        command += [f"data.paths=[{self.text}]", f"run_dir={run}", *QUIET, *words, *self.extra]
        began = time.monotonic()
        environment = os.environ | {"NSA_DATA_DIR": str(self.folder / "data")}
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None and time.monotonic() - began < self.seconds:
                    time.sleep(0.2)
                    if until is not None and last_step(run) >= until:
                        process.send_signal(signal.SIGTERM)
                        until = None
            finally:
                if process.poll() is None:
                    process.kill()
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        said = [line for line in lines if "at once" in line or "CUDA graphs" in line]
        print("\n".join(line.strip() for line in said[-2:]))
        if process.returncode not in (0, 143):
            print("\n".join(lines[-25:]))
        spent = time.monotonic() - began
        return f"exit {process.returncode}, step {last_step(run)}, {spent:.0f} s"

    def losses(self, name: str) -> dict[int, float]:
        return {int(row["step"]): float(row["train/loss"]) for row in rows_of(self.folder / name)}


def rows_of(run: Path) -> list[dict[str, str]]:
    path = run / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


def last_step(run: Path) -> int:
    rows = rows_of(run)
    return int(rows[-1]["step"]) + 1 if rows else 0


def apart(losses: dict[int, float], others: dict[int, float]) -> str:
    """Differences of the losses of two runs, over the steps that both have."""
    steps = sorted(losses.keys() & others.keys())
    if not steps:
        return "no step in common"
    gaps = [abs(losses[step] - others[step]) for step in steps]
    return (
        f"{len(steps)} steps, loss {losses[steps[0]]:.4f} to {losses[steps[-1]]:.4f}; apart: mean "
        f"{sum(gaps) / len(gaps):.5f}, at most {max(gaps):.5f}, first ten {max(gaps[:10]):.5f}"
    )


def devices(strategy: str) -> list[str]:
    """The words for a strategy; those of `cpu` are for trying this script out."""
    known = {
        "one": ["trainer=gpu", "trainer.devices=1"],
        "ddp": ["trainer=ddp", "trainer.devices=2"],
        "fsdp": ["trainer=fsdp", "trainer.devices=2"],
    }
    if torch.cuda.is_available():
        return known[strategy]
    return {"one": ["trainer=cpu"], "ddp": ["trainer=ddp_cpu"], "fsdp": ["trainer=ddp_cpu"]}[
        strategy
    ]


def together(runs: Runs, steps: int, table: list[str]) -> None:
    """One GPU, DDP and FSDP2 side by side."""
    for strategy in ("one", "ddp", "fsdp"):
        words = ["model=nsa_small", f"trainer.max_steps={steps}", *devices(strategy)]
        how = runs.run(strategy, words)
        gaps = "" if strategy == "one" else apart(runs.losses(strategy), runs.losses("one"))
        table.append(f"{strategy}: {how}; against one GPU: {gaps}")
        print(table[-1], flush=True)


def interrupted(runs: Runs, steps: int, table: list[str]) -> None:
    """DDP, SIGTERM, one GPU, SIGTERM, FSDP2: one curve."""
    words = ["model=nsa_small", f"trainer.max_steps={steps}"]
    plan = (("ddp", steps // 3), ("one", 2 * steps // 3), ("fsdp", None))
    ends = [runs.run("broken", [*words, *devices(how)], until) for how, until in plan]
    gaps = apart(runs.losses("broken"), runs.losses("one"))
    table.append(f"ddp, one GPU, fsdp: {'; '.join(ends)}; against one GPU: {gaps}")
    print(table[-1], flush=True)


def long(runs: Runs, table: list[str]) -> None:
    """65,536 tokens, sharded, with recomputation."""
    words = ["model=nsa_medium", "model.seq_len=65536", "batch.sequences_per_step=2"]
    words += ["trainer.max_steps=6", "activation_checkpointing=full", *devices("fsdp")]
    how = runs.run("long", words)
    rows = rows_of(runs.folder / "long")
    memory = [row["perf/memory_gib"] for row in rows if row.get("perf/memory_gib")]
    table.append(f"fsdp, 65,536 tokens, recomputed: {how}; GiB {memory[-1:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=4.5)
    parser.add_argument("--override", nargs="*", default=[], help="more words for train.py")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="two-gpus-"))
    runs = Runs(folder, 100, options.override)
    table: list[str] = []
    checks: list[Callable[[], None]] = [
        lambda: together(runs, options.steps, table),
        lambda: interrupted(runs, options.steps, table),
        lambda: long(runs, table),
    ]
    for check in checks:
        if time.monotonic() > stop:
            table.append("no time left for the rest")
            break
        try:
            check()
        except Exception as error:
            traceback.print_exc()
            table.append(f"failed: {type(error).__name__}: {str(error)[:300]}")
    print("\n" + "\n".join(table))


if __name__ == "__main__":
    main()
