"""Measurements in a process of their own: one that hangs or breaks the GPU costs only itself.

Leader and worker count the same jobs. The worker announces each one before it begins; where it
dies or falls silent, the leader records that job as lost and starts another worker after it.
"""

import argparse
import gc
import json
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Row

MARK = "@job "
BROKEN = 3  # exit status of a worker that recorded its last job but cannot go on
Job = tuple[str, int]  # a name and a length in tokens


class Unavailable(Exception):
    """Something that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Assignment:
    """What a worker is told besides its leader's own arguments."""

    group: str
    stop: float  # as of time.time(): no job begins later
    date: str
    command: str
    after: int = 0  # jobs that have had their turn
    warm: bool = False  # fill the compilers' caches, record nothing


# ---- the leader ------------------------------------------------------------


def common_options(parser: argparse.ArgumentParser, minutes: float) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--minutes", type=float, default=minutes, help="for all of it")
    parser.add_argument("--item-seconds", type=float, default=90.0, help="for one measurement")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--worker", type=assignment, help=argparse.SUPPRESS)


def assignment(text: str) -> Assignment:
    return Assignment(**json.loads(text))


def run_groups(
    module: str,
    options: argparse.Namespace,
    groups: Mapping[str, Sequence[Job]],
    weights: Mapping[str, float],
    describe: Callable[[str, Job], Row],
    stop: float,
) -> str:
    """Give every group of jobs its share of the time that is left; returns the date of its rows.

    `describe` says what columns a job's row has if it is lost.
    """
    date = measure.now()
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    context = measure.environment(options.device, date=date, command=command, commit=options.commit)
    measure.append(options.out)  # a file of other columns is refused before anything is measured
    groups_left = list(groups)
    for group, jobs in groups.items():
        share = weights[group] / sum(weights[name] for name in groups_left)
        groups_left.remove(group)
        until = time.time() + share * (stop - time.time())

        def lost(job: int, end: str, group=group, jobs=jobs) -> None:
            row = {**describe(group, jobs[job]), "status": f"failed: {end}"}
            measure.append(options.out, {**row, **context})
            print(f"  {jobs[job][0]:<20} T {jobs[job][1]:>6}  failed: {end}", flush=True)

        print(f"\n{group}, {until - time.time():.0f} s at most", flush=True)
        told = Assignment(group=group, stop=until, date=date, command=command)
        run_jobs(module, told, len(jobs), options.item_seconds, lost)
    return date


def warm_up(module: str, groups: Sequence[str], seconds: float) -> None:
    """Let all groups compile at once, before anything is timed."""
    begin = time.time()
    processes = []
    for group in groups:
        told = Assignment(group=group, stop=begin + seconds, date="", command="", warm=True)
        command = [sys.executable, "-m", module, *arguments_of(told)]
        quiet = subprocess.DEVNULL  # what fails here fails again, and is recorded, when measured
        processes.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))
    for group, process in zip(groups, processes, strict=True):
        try:
            status = process.wait(max(1.0, begin + seconds - time.time()))
            end = "done" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            end = "out of time"
        print(f"compiled ahead for {group}: {end}, {time.time() - begin:.0f} s", flush=True)


def arguments_of(told: Assignment) -> list[str]:
    return [*sys.argv[1:], "--worker", json.dumps(asdict(told))]


def run_jobs(
    module: str,
    told: Assignment,
    num_jobs: int,
    silent_seconds: float,
    lost: Callable[[int, str], None],
) -> None:
    """Run a worker on its jobs, and another one after every job that is lost."""
    while told.after < num_jobs and time.time() < told.stop:
        job, end = follow(module, arguments_of(told), told.stop + 10.0, silent_seconds)
        if end in ("done", "out of time"):
            return
        job = max(job, told.after)
        if end != f"exit status {BROKEN}":
            lost(job, end)
        told = replace(told, after=job + 1)


def follow(
    module: str, arguments: Sequence[str], stop: float, silent_seconds: float
) -> tuple[int, str]:
    """Show what a worker prints as it comes; the last job it announced, and how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=pump, args=(process, lines), daemon=True).start()
    job, end = -1, ""
    while not end:
        try:
            line = lines.get(timeout=max(0.1, min(silent_seconds, stop - time.time())))
        except queue.Empty:
            end = "out of time" if time.time() >= stop else f"silent for {silent_seconds:.0f} s"
            process.kill()
            break
        if line is None:
            status = process.wait()
            end = f"exit status {status}" if status else "done"
        elif line.startswith(MARK):
            job = int(line.removeprefix(MARK))
        else:
            print(line, end="", flush=True)
    process.wait()
    return job, end


def pump(process: subprocess.Popen, lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            lines.put(line)
    lines.put(None)


# ---- the worker ------------------------------------------------------------


def work(
    told: Assignment,
    jobs: Sequence[Job],
    measure_job: Callable[[Job], Row],
    context: Row,
    out: Path,
) -> None:
    """Measure one job after the other; append and show the row of each.

    `measure_job` returns the columns of its row, or raises: Unavailable where there is nothing to
    measure, which is said once for each name and reason.
    """
    said = set()
    for number, (name, tokens) in enumerate(jobs[told.after :], told.after):
        if time.time() > told.stop:
            left = ", ".join(f"{name} {tokens}" for name, tokens in jobs[number:])
            print(f"  out of time, not measured: {left}", flush=True)
            return
        print(f"{MARK}{number}", flush=True)
        try:
            row = measure_job((name, tokens))
        except Unavailable as reason:
            if (name, str(reason)) not in said:
                print(f"  {name:<20} {reason}", flush=True)
            said.add((name, str(reason)))
            continue
        if told.warm:
            continue
        measure.append(out, {**row, **context})
        print(f"  {name:<20} T {tokens:>6}  {shown(row)}", flush=True)
        release()
        if breaks_the_gpu(row["status"]):
            sys.exit(BROKEN)


def shown(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    units = {
        "forward_ms": "fwd {:9.3f} ms",
        "backward_ms": "bwd {:9.3f} ms",
        "step_ms": "step {:9.3f} ms",
        "peak_mib": "{:8.0f} MiB",
        "tokens_per_second": "{:9,.0f} tokens/s",
        "mfu": "mfu {:.3f}",
        "gpu_busy": "GPU busy {:.2f}",
        "check": "error/budget {}",
    }
    known = {name: row[name] for name in units if row.get(name) not in (None, "")}
    return "  ".join(units[name].format(value) for name, value in known.items() if value == value)


def release() -> None:
    """What an item held, an exception's frames included, is free for the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(take: Callable[[], Row]) -> dict[str, Any]:
    """What a measurement returns, with a status: ok, oom, or failed with the first line why."""
    try:
        return {"status": "ok", **take()}
    except torch.OutOfMemoryError:
        return {"status": "oom"}
    except Unavailable:
        raise
    except Exception as error:  # recorded: the next measurement must not pay for this one
        lines = str(error).strip().splitlines() or [""]
        return {"status": f"failed: {type(error).__name__}: {lines[0][:160]}"}


def breaks_the_gpu(status: str) -> bool:
    """After such an error every further call on the GPU fails."""
    return "CUDA error" in status or "AcceleratorError" in status
