"""Which tile of each kernel is the fastest, by heads and length.

    python -m benchmarks.probes.tune --folder tuning --minutes 8      # on a GPU
    TRITON_INTERPRET=1 python -m benchmarks.probes.tune --folder /tmp/t --device cpu  # rehearse

Candidates (`nsa.kernels.tile_sizes`) are compiled ahead by many processes, then compared and timed
by one (survey.py), the most valuable first; one that breaks the GPU costs its own job.
Every candidate is a row of tune.csv in the folder. Another run in the same folder goes on where
this one stopped; to repeat a job, delete its rows. The table printed at the end says what belongs
into `tile_sizes.TILES`.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, workers
from benchmarks.plots import crossover
from benchmarks.probes.survey import KINDS, clock_milliseconds, survey
from benchmarks.workers import MARK, Assignment, Unavailable
from benchmarks.workloads import LAYOUTS, PAPER, Layout, Workload
from nsa.config import NSAConfig
from nsa.kernels.autotune import milliseconds

MODULE = "benchmarks.probes.tune"
TOKENS = (65536, 8192, 32768, 16384, 4096, 2048, 1024)
TELLING = 2  # so many of the lengths come first, for all kernels
AHEAD = (1024,)  # lengths at which kernels are compiled ahead
JOB = ("kernel", "variant", "heads", "kv_heads", "dim_head", "tokens")
COLUMNS = (*JOB, "dtype", "rows", "keys", "warps", "stages", "table", "status", "error", "ms",
           "device", "torch", "triton", "date", "commit")  # fmt: skip
TINY = Layout(4, 2, 16)  # of a rehearsal
TINY_SIZES = NSAConfig(
    sliding_window_size=16, compress_block_size=8, compress_block_sliding_stride=4,
    selection_block_size=16, num_selected_blocks=2,
)  # fmt: skip
Job = dict[str, Any]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where tune.csv goes")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    kernels = list(dict.fromkeys(kernel for kernel, _ in KINDS))
    parser.add_argument("--op", nargs="+", choices=kernels, default=kernels, help="kernels")
    parser.add_argument("--heads", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS if on_gpu else [48])
    parser.add_argument("--device", type=torch.device, default="cuda" if on_gpu else "cpu")
    parser.add_argument("--job-seconds", type=float, default=120.0, help="for one kernel's tiles")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--worker", type=workers.assignment, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def jobs_of(options: argparse.Namespace, tokens: Sequence[int]) -> list[Job]:
    """Kernels in the order of KINDS, of each the lengths in the order given; then what is left."""
    on_cpu = options.device.type == "cpu"
    layouts = [TINY] if on_cpu else [LAYOUTS[name] for name in options.heads]
    return [
        {"kernel": kernel, "variant": variant, **layout.columns, "tokens": T}
        for lengths in (tokens[:TELLING], tokens[TELLING:])
        for kernel, variant in KINDS
        if kernel in options.op
        for T in lengths
        for layout in layouts
    ]


def named(job: Mapping[str, Any]) -> str:
    heads = f"{job['heads']}/{job['kv_heads']} D{job['dim_head']}"
    return f"{job['kernel']:<10} {job['variant']:<6} {heads:<10} T {job['tokens']:>6}"


# ---- tune.csv ------------------------------------------------------------


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows of a job at once: what is in the file is whole."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: measure.written(v) for name, v in row.items()} for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which job a row belongs to; both loop orders are one job."""
    variant = "" if row["kernel"] == "orders" else row["variant"]
    return tuple(str(row[name]) if name != "variant" else variant for name in JOB)


# ---- the worker ------------------------------------------------------------


def work(told: Assignment, options: argparse.Namespace) -> None:
    """Survey one job after the other; append the rows of each."""
    path = options.folder / "tune.csv"
    done = {key(row) for row in read(path)}
    on_gpu = options.device.type == "cuda"
    context = measure.environment(options.device, date=told.date, command="", commit=options.commit)
    context = {name: text for name, text in context.items() if name in COLUMNS}
    for number, job in enumerate(jobs_of(options, options.tokens)[told.after :], told.after):
        if time.time() > told.stop:
            return
        if key(job) in done:
            continue
        print(f"{MARK}{number}", flush=True)
        w = workload(job, options)
        try:
            timer = milliseconds if on_gpu else clock_milliseconds
            rows = survey(w, job["kernel"], job["variant"], timer)
        except Unavailable:
            continue
        dtype = str(w.dtype).removeprefix("torch.")
        rows = [{**job, "dtype": dtype, **row, **context} for row in rows]
        append(path, rows)
        print(summary(rows), flush=True)
        workers.release()


def workload(job: Job, options: argparse.Namespace) -> Workload:
    torch.manual_seed(job["tokens"])
    on_gpu = options.device.type == "cuda"
    layout = Layout.of(job)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    cfg = PAPER if on_gpu else TINY_SIZES
    return Workload(layout, job["tokens"], dtype, options.device, "triton", cfg)


def compile_ahead(shard: int, shards: int, stop: float, options: argparse.Namespace) -> None:
    """Every shards-th job at a small length, untimed: fills Triton's cache on disk."""
    for job in jobs_of(options, AHEAD)[shard::shards]:
        if time.time() > stop:
            return
        if job["kernel"] != "orders":
            survey(workload(job, options), job["kernel"], job["variant"], None)


# ---- the leader ------------------------------------------------------------


def start_compiling(stop: float) -> list[subprocess.Popen]:
    shards = max(1, min(14, (os.cpu_count() or 1) - 1))
    quiet = subprocess.DEVNULL  # what fails here fails again, and is recorded, when timed
    processes = []
    for shard in range(shards):
        told = Assignment(f"{shard}/{shards}", stop, date="", command="", warm=True)
        command = [sys.executable, "-m", MODULE, *workers.arguments_of(told)]
        processes.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))
    return processes


def lead(options: argparse.Namespace) -> None:
    begin = time.time()
    stop = begin + 60 * options.minutes
    if options.device.type == "cuda":
        until = begin + 0.4 * 60 * options.minutes
        for process in start_compiling(until):
            try:
                process.wait(max(1.0, until + 15.0 - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
        print(f"compiled ahead: {time.time() - begin:.0f} s", flush=True)
    jobs = jobs_of(options, options.tokens)
    path = options.folder / "tune.csv"

    def lost(number: int, end: str) -> None:
        append(path, [{**jobs[number], "status": f"lost: {end}"}])
        print(f"{named(jobs[number])}  lost: {end}", flush=True)

    told = Assignment("all", stop, date=measure.now(), command="")
    workers.run_jobs(MODULE, told, len(jobs), options.job_seconds, lost)


# ---- the table ------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A job in one line: the table's tile, the best one, and how many are out."""
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return f"{named(rows[0])}  {rows[0]['status']}"
    if rows[0]["kernel"] == "orders":
        times = "  ".join(f"{row['variant']} {float(row['ms']):.3f} ms" for row in good)
        return f"{named(rows[0] | {'variant': ''})}  {times}"
    best = min(good, key=lambda row: float(row["ms"]))
    now = next((row for row in good if row.get("table")), best)
    gain = float(now["ms"]) / float(best["ms"])
    out = len(rows) - len(good)
    return (
        f"{named(now)}  table {tile(now):<14} {float(now['ms']):8.3f} ms   best {tile(best):<14} "
        f"{float(best['ms']):8.3f} ms {gain:5.2f}x" + (f"   {out} out" if out else "")
    )


def tile(row: Mapping[str, Any]) -> str:
    return f"{row['rows']}x{row['keys']} w{row['warps']} s{row['stages']}" if row["rows"] else ""


def crossings(jobs: Iterable[Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """From which length on the block order is ahead, by heads."""
    ratios: dict[str, dict[int, float]] = defaultdict(dict)
    for rows in jobs:
        times = {row["variant"]: float(row["ms"]) for row in rows if row["kernel"] == "orders"}
        if len(times) == 2:
            heads = f"{rows[0]['heads']}/{rows[0]['kv_heads']} D{rows[0]['dim_head']}"
            ratios[heads][int(rows[0]["tokens"])] = times["tiles"] / times["blocks"]
    for heads, ratio in ratios.items():
        at = crossover(ratio)
        where = (
            "at no length measured" if at is None else f"from {at:.0f} tokens" if at else "always"
        )
        yield f"block order ahead of tiles, {heads}: {where}"


def report(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line for every kernel, heads and length; where the loop orders cross; what is out."""
    jobs: dict[tuple, list] = defaultdict(list)
    for row in rows:
        jobs[key(row)].append(row)
    lines = [summary(job) for job in jobs.values()]
    lines += crossings(jobs.values())
    for job in jobs.values():
        out = [row for row in job if row["status"] != "ok"]
        lines += [f"{named(row)}  {tile(row)}  {row['status']} {row['error']}" for row in out]
    return "\n".join(lines)


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.worker is None:
        lead(options)
        print(report(read(options.folder / "tune.csv")), flush=True)
    elif options.worker.warm:
        shard, shards = map(int, options.worker.group.split("/"))
        compile_ahead(shard, shards, options.worker.stop, options)
    else:
        work(options.worker, options)


if __name__ == "__main__":
    main()
