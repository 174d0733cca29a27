"""Do several GPUs learn what one learns, also across SIGTERM, another strategy, and a dead rank?

`python -m benchmarks.probes.several_gpus` runs train.py: 50 steps of nsa_small on one GPU, with DDP
and with FSDP2 on all, at the same global batch, and prints how far their losses are apart. Then a
run on all GPUs is ended by SIGTERM, goes on with half of them, and so on: with 8, 4 and 2, or with
2, 1 and 2, under another strategy each time. Its losses are compared with those of one GPU. Then
one rank of a run is killed: how long do the others take to end? Last nsa_medium at 65,536 tokens,
sharded and recomputed.
"""

import argparse
import csv
import os
import re
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

    def start(self, name: str, words: Sequence[str]) -> subprocess.Popen:
        """train.py in the folder `name`; what it prints goes to `name`.log."""
        command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), "data=text"]
        command += [f"data.paths=[{self.text}]", f"run_dir={self.folder / name}"]
        environment = os.environ | {"NSA_DATA_DIR": str(self.folder / "data")}
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [*command, *QUIET, *words, *self.extra],
                cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def run(self, name: str, words: Sequence[str], until: int | None = None) -> str:
        """Train in the folder `name`, to the end or until step `until`; how it ended."""
        began = time.monotonic()
        process = self.start(name, words)
        try:
            while process.poll() is None and time.monotonic() - began < self.seconds:
                time.sleep(0.2)
                if until is not None and last_step(self.folder / name) >= until:
                    process.send_signal(signal.SIGTERM)
                    until = None
        finally:
            if process.poll() is None:
                process.kill()
        lines = self.lines(name)
        said = [line for line in lines if "at once" in line or "CUDA graphs" in line]
        print("\n".join(line.strip() for line in said[-2:]))
        if process.returncode not in (0, 143):
            print("\n".join(lines[-25:]))
        spent = time.monotonic() - began
        return f"exit {process.returncode}, step {last_step(self.folder / name)}, {spent:.0f} s"

    def lines(self, name: str) -> list[str]:
        """What a run printed."""
        return (self.folder / f"{name}.log").read_text().splitlines()

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


def all_gpus() -> int:
    return torch.cuda.device_count() or 2


def devices(strategy: str, count: int) -> list[str]:
    """The words for a strategy; without GPUs, to try this script out, those for processes."""
    if torch.cuda.is_available():
        trainer = "gpu" if count == 1 else strategy
    else:
        trainer = "cpu" if count == 1 else "ddp_cpu"
    return [f"trainer={trainer}", f"trainer.devices={count}"]


def together(runs: Runs, steps: int, table: list[str]) -> None:
    """One GPU, DDP and FSDP2 side by side."""
    for strategy in ("one", "ddp", "fsdp"):
        count = 1 if strategy == "one" else all_gpus()
        words = ["model=nsa_small", f"trainer.max_steps={steps}", *devices(strategy, count)]
        how = runs.run(strategy, words)
        gaps = "" if strategy == "one" else apart(runs.losses(strategy), runs.losses("one"))
        table.append(f"{strategy}: {how}; against one GPU: {gaps}")
        print(table[-1], flush=True)


def interrupted(runs: Runs, steps: int, table: list[str]) -> None:
    """All GPUs, SIGTERM, half of them, SIGTERM, a quarter (of two: one, then both): one curve."""
    every = all_gpus()
    counts = (every, every // 2, every // 4 or every)
    plan = zip(("ddp", "fsdp", "ddp" if every > 2 else "fsdp"), counts, strict=True)
    words = ["model=nsa_small", f"trainer.max_steps={steps}"]
    ends = [
        runs.run("broken", [*words, *devices(strategy, count)], until)
        for (strategy, count), until in zip(plan, (steps // 3, 2 * steps // 3, None), strict=True)
    ]
    gaps = apart(runs.losses("broken"), runs.losses("one"))
    table.append(f"on {counts} GPUs: {'; '.join(ends)}; against one GPU: {gaps}")
    print(table[-1], flush=True)


def killed(runs: Runs, table: list[str]) -> None:
    """The last rank is killed, and in another run the first: when are all of them gone?"""
    for which in ("last", "first"):
        name = f"{which}-rank-killed"
        words = ["model=nsa_small", "trainer.max_steps=100000", *devices("ddp", all_gpus())]
        process = runs.start(name, words)
        try:
            began = time.monotonic()
            while last_step(runs.folder / name) < 5 and time.monotonic() - began < runs.seconds:
                time.sleep(0.2)
            ranks = [process.pid, *launched_by(process.pid)]
            os.kill(ranks[-1] if which == "last" else ranks[0], signal.SIGKILL)
            began = time.monotonic()
            while (process.poll() is None or any(map(alive, ranks[1:]))) and not overdue(began):
                time.sleep(0.2)
            spent = time.monotonic() - began
        finally:
            process.kill()
        known = ("is gone", "terminated with code", "Error:")
        said = [line[:160] for line in runs.lines(name) if any(word in line for word in known)]
        gone = f"{which} of {len(ranks)} ranks killed: all gone after {spent:.1f} s"
        table.append(f"{gone}; {said[-1:]}")
        print(table[-1], flush=True)


def launched_by(leader: int) -> list[int]:
    """The other ranks of a run. Its first process has children of its own, which load samples and
    compile kernels; the latter inherit its LOCAL_RANK=0.
    """
    listed = ["ps", "-o", "pid=", "--ppid", str(leader)]
    children = subprocess.run(listed, capture_output=True, text=True).stdout.split()
    given = {child: Path("/proc", child, "environ").read_bytes() for child in children}
    return [
        int(child)
        for child, variables in given.items()
        if re.search(rb"(?:^|\0)LOCAL_RANK=[1-9]", variables)
    ]


def alive(process: int) -> bool:
    state = Path("/proc", str(process), "stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def overdue(began: float) -> bool:
    return time.monotonic() - began > 120


def long(runs: Runs, table: list[str]) -> None:
    """65,536 tokens, sharded, with recomputation."""
    words = ["model=nsa_medium", "model.seq_len=65536"]
    words += [f"batch.sequences_per_step={all_gpus()}"]
    words += ["trainer.max_steps=6", "activation_checkpointing=full", *devices("fsdp", all_gpus())]
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
    folder = Path(tempfile.mkdtemp(prefix="several-gpus-"))
    runs = Runs(folder, 100, options.override)
    table: list[str] = []
    checks: list[Callable[[], None]] = [
        lambda: together(runs, options.steps, table),
        lambda: interrupted(runs, options.steps, table),
        lambda: killed(runs, table),
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
