"""What a user gets who types train.py: speed, memory and start-up of presets.

`python -m benchmarks.presets --minutes 8` runs each preset through train.py for some steps, on text
made up here, with its dense twin; `--strategies ddp fsdp` on several GPUs. Rows go to results.csv
(suite `presets`), a short table is printed last. Each job is one process, as a user's is; compile
caches are kept, so the second run of a job shows what a machine shows that has run it before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure, train_step
from benchmarks.step_trace import STARTED
from callbacks.throughput import peak_flops_of

ROOT = Path(__file__).parents[1]
LINES = 700_000  # of made-up text, about 20 MB
QUIET = (
    *("logger=csv", "test=false", "val_every_n_steps=1000000", "trainer.limit_val_batches=1"),
    *("trainer.num_sanity_val_steps=0", "callbacks.samples=null"),
    *("callbacks.attention_statistics=null", "callbacks.loss_plot=null"),
    # Without callbacks.preemption Lightning has all ranks agree on SIGTERM in every micro-batch. It
    # needs callbacks.checkpoint_last, which saves once, at the end.
    "callbacks.checkpoint_best=null",
    "+callbacks.trace._target_=benchmarks.step_trace.StepTrace",
)
MEDIUM_TOKENS = 131_072  # a step
LONGEST = (131_072, 262_144)  # tokens of a sequence
VOCABULARY = 32_768  # of these, though the text is bytes: the loss is then the chunked one


class Job(NamedTuple):
    """A run: its name in the table, how many steps, and the words after `train.py`."""

    name: str
    tokens: int  # of a sequence
    sequences: int  # a step
    steps: int
    overrides: tuple[str, ...]


def presets() -> list[Job]:
    """The presets as they ship, each with its dense twin; then lengths, twin by twin.

    The longest, one sequence a step, keep no activations but the blocks' inputs.
    """
    jobs = []
    for size, tokens, sequences, steps in (("small", 1024, 32, 200), ("medium", 8192, 16, 30)):
        for kind in ("nsa", "dense"):
            name = f"{kind}_{size}"
            jobs.append(Job(name, tokens, sequences, steps, (f"model={name}",)))
    for tokens in train_step.EXAMPLE_LENGTHS:
        sequences = train_step.EXAMPLE_TOKENS // tokens
        words = ("model=nsa_small", *train_step.EXAMPLE, f"model.seq_len={tokens}")
        words += (f"batch.sequences_per_step={sequences}",)
        jobs.append(Job("nsa_example", tokens, sequences, 300, words))
    for tokens in (4096, 16384, 32768, 65536):
        sequences = MEDIUM_TOKENS // tokens
        sizes = (f"model.seq_len={tokens}", f"batch.sequences_per_step={sequences}")
        for kind in ("nsa", "dense"):
            name = f"{kind}_medium"
            jobs.append(Job(name, tokens, sequences, 24, (f"model={name}", *sizes)))
    for tokens in LONGEST:
        for name in ("nsa_large", "dense_large", "nsa_medium", "dense_medium"):
            words = (f"model={name}", f"model.seq_len={tokens}", "batch.sequences_per_step=1")
            words += ("activation_checkpointing=full", f"model.vocab_size={VOCABULARY}")
            jobs.append(Job(name, tokens, 1, 12, words))
    return jobs


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted({job.name for job in presets()})
    parser.add_argument("--presets", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of a sequence; default: all")
    parser.add_argument(
        "--strategies", nargs="+", choices=("one", "ddp", "fsdp"), default=["one"],
        help="one: a single GPU; ddp and fsdp: all GPUs of this machine",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--job-seconds", type=float, default=150.0, help="for one run")
    parser.add_argument("--twice", action="store_true", help="each job again, with warm caches")
    parser.add_argument("--override", nargs="*", default=[], help="more words for train.py")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    return parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> list[tuple[Job, str]]:
    """Jobs and strategies, in the order in which they run."""
    jobs = [
        job
        for job in presets()
        if job.name in options.presets and (not options.tokens or job.tokens in options.tokens)
    ]
    times = 2 if options.twice else 1
    return [(job, how) for job in jobs for how in options.strategies for _ in range(times)]


def command_of(job: Job, strategy: str, folder: Path, override: Sequence[str]) -> list[str]:
    """The command line of a run."""
    text = folder / "text.txt"
    devices = [f"trainer={strategy}"]
    if strategy == "one":
        on_gpu = torch.cuda.is_available()
        devices = ["trainer=gpu", "trainer.devices=1"] if on_gpu else ["trainer=cpu"]
    run = folder / "run"
    return [
        *(sys.executable, "-W", "ignore", str(ROOT / "train.py"), *job.overrides, *devices),
        *("data=text", f"data.paths=[{text}]", f"run_dir={run}", *QUIET),
        *(f"+callbacks.trace.folder={run}", f"trainer.max_steps={job.steps}", *override),
    ]


def write_text(folder: Path) -> None:
    """What runs are trained on."""
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(LINES)))


def take(job: Job, strategy: str, folder: Path, options: argparse.Namespace, left: float) -> Any:
    """Run a job: what it measured, or what went wrong."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    environment = os.environ | {
        "NSA_DATA_DIR": str(folder / "data"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        STARTED: str(time.time()),
    }
    log = folder / "log.txt"
    with log.open("w") as out:
        try:
            done = subprocess.run(
                command_of(job, strategy, folder, options.override),
                cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT,
                timeout=min(left, options.job_seconds),
            )  # fmt: skip
            status = "ok" if done.returncode == 0 else f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            status = "out of time"
    words = log.read_text()
    for line in words.splitlines():
        if any(word in line for word in ("at once", "expected", "CUDA graphs", "Error")):
            print(f"    {line.strip()[:200]}")
    if status != "ok":
        print("\n".join(words.splitlines()[-25:]))
    found = folder / "run" / "step_trace.json"
    return {"status": status} | (json.loads(found.read_text()) if found.exists() else {})


def row_of(job: Job, strategy: str, figures: dict[str, Any], devices: int) -> dict[str, Any]:
    """A line of results.csv, and what has no column there."""
    row: dict[str, Any] = {
        "suite": "presets",
        "op": job.name,
        "backend": strategy if devices == 1 else f"{strategy} x {devices}",
        "tokens": job.tokens,
        "batch": job.sequences,
        "dtype": "bf16-mixed" if torch.cuda.is_available() else "float32",
        "status": figures["status"],
    }
    if "step_ms" in figures:
        row |= {
            name: figures[name] for name in ("step_ms", "peak_mib", "gpu_busy") if name in figures
        }
        row["tokens_per_second"] = 1e3 * job.sequences * job.tokens / figures["step_ms"]
        row["mfu"] = mfu(figures, row["tokens_per_second"], devices)
        row["check"] = f"start-up {figures['start_up_s']:.1f} s"
    return row


def mfu(figures: dict[str, Any], tokens_per_second: float, devices: int) -> float | None:
    """Model FLOPs utilisation, where the GPU's peak is known."""
    peak = peak_flops_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return peak and tokens_per_second * figures["flops_per_token"] / (peak * devices)


def table(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """A line a run."""
    lines = []
    for row, figures in rows:
        name = f"{row['op']} {row['tokens']} x {row['batch']} {row['backend']}"
        if "step_ms" not in row:
            lines.append(f"{name}: {row['status']}")
            continue
        lines.append(
            f"{name}: {row['tokens_per_second']:,.0f} tokens/s, {row['step_ms']:.1f} ms, busy "
            f"{row.get('gpu_busy', 0):.3f}, mfu {row['mfu'] or 0:.3f}, "
            f"{row.get('peak_mib', 0) / 1024:.1f} GiB, start-up {figures['start_up_s']:.1f} s, "
            f"{figures.get('kernels', 0):.0f} kernels, {figures.get('graphs', 0):.0f} graphs, "
            f"nccl {figures.get('communication_ms', 0):.1f} ms, "
            f"alone {figures.get('communication_alone_ms', 0):.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    options = parse()
    stop = time.time() + 60 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="presets-"))
    write_text(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = " ".join(["python -m benchmarks.presets", *sys.argv[1:]])
    context = measure.environment(device, date=measure.now(), command=words, commit=options.commit)
    gpus = max(1, torch.cuda.device_count())
    rows = []
    for job, strategy in chosen(options):
        left = stop - time.time()
        if left < 20:
            print(f"no time left for {job.name} {job.tokens} {strategy}", flush=True)
            continue
        print(f"{job.name} {job.tokens} {strategy}", flush=True)
        devices = 1 if strategy == "one" else gpus
        figures = take(job, strategy, folder, options, left)
        row = row_of(job, strategy, figures, devices)
        measure.append(options.out, row | context)
        rows.append((row, figures))
        print("  " + table(rows[-1:]), flush=True)
    print(f"\n{context['device']}, torch {context['torch']}, commit {context['commit']}")
    print(table(rows))
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
