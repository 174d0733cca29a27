"""train.py in processes forked from one that has imported everything: a whole run in a second.

The ranks of a run are given the environment that torchrun or srun gives; a signal can be sent from
inside any micro-batch, so that a test says exactly when. `python` runs any other program so, where
the run-time type checks of the tests' own process would be in a compiler's way.
"""

import csv
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])


class Signal(NamedTuple):
    """Sent by a rank to itself as it begins a micro-batch (0, 1, …) of an optimizer step (0, …)."""

    which: signal.Signals
    rank: int
    step: int
    micro_batch: int = 0
    times: int = 1


def run(
    folder: Path,
    arguments: Sequence[str],
    *,
    ranks: int = 1,
    launcher: str = "torchrun",
    sent: Signal | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[int]:
    """Exit codes of all ranks of `python train.py ARGUMENTS` in `folder`; output goes to run.log.

    A rank that dies by SIGKILL takes the others with it, as a machine would.
    """
    place = ENVIRONMENTS[launcher] if ranks > 1 else (lambda rank, ranks, port: {})
    given = dict(environment or {})
    port = free_port()
    common = (folder, list(arguments), sent)
    processes = [
        FORKS.Process(target=one_rank, args=(rank, place(rank, ranks, port) | given, *common))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode == -signal.SIGKILL for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.01)
    codes = []
    for process in processes:
        process.join()
        codes.append(process.exitcode or 0)
        process.close()
    return codes


class Done(NamedTuple):
    """How a program ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def python(
    program: str,
    *arguments: str,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """`python -c PROGRAM ARGUMENTS` that finds torch, Lightning and this project imported."""
    with tempfile.TemporaryDirectory() as place:
        said = [Path(place, name) for name in ("stdout", "stderr")]
        given = (cwd, said, environment or {}, program, arguments)
        process = FORKS.Process(target=one_program, args=given)
        process.start()
        process.join()
        return Done(process.exitcode or 0, *(path.read_text() for path in said))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def under_torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of a rank on one node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def under_srun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of a task on one node."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_PORT": str(port),
    }


ENVIRONMENTS = {"torchrun": under_torchrun, "srun": under_srun}


def one_rank(
    rank: int, place: dict[str, str], folder: Path, arguments: list[str], sent: Signal | None
) -> None:
    log = folder / "run.log"
    begin(folder, [log, log], place | {"NSA_DATA_DIR": str(folder / "data")})
    if sent is not None and sent.rank == rank:
        arm(sent)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def one_program(
    cwd: Path,
    said: Sequence[Path],
    environment: Mapping[str, str],
    program: str,
    arguments: Sequence[str],
) -> None:
    begin(cwd, said, environment)
    sys.argv = ["-c", *arguments]
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def begin(cwd: Path, said: Sequence[Path], environment: Mapping[str, str]) -> None:
    """Make a fork look like a process that was typed: its place, its output, its signals."""
    os.chdir(cwd)
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process typed


def arm(sent: Signal) -> None:
    """Make the module send the signal to its own process when that micro-batch begins."""
    from nsa.training.lightning_module import NSALightningModule

    step = NSALightningModule.training_step

    def training_step(module, batch, batch_idx):
        accumulated = module.trainer.accumulate_grad_batches
        if (module.global_step, batch_idx % accumulated) == (sent.step, sent.micro_batch):
            for _ in range(sent.times):
                os.kill(os.getpid(), sent.which)
        return step(module, batch, batch_idx)

    NSALightningModule.training_step = training_step


def finished(codes: list[int], folder: Path) -> None:
    """Fail with the output of the run where a rank did not end well."""
    assert not any(codes), f"exit codes {codes}\n{(folder / 'run.log').read_text()[-4000:]}"


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without what the clock says."""
    rows = csv.DictReader((run_dir / "metrics.csv").read_text().splitlines())
    return [{n: v for n, v in row.items() if not n.startswith("perf/")} for row in rows]
