"""Which of the processes of a run this one is, as far as the environment tells."""

import os
import sys
import threading
import time


def is_zero() -> bool:
    """Whether this process leads the run: it writes its files and speaks for all."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return all(rank == "0" for rank in ranks)


def given() -> int | None:
    """The global rank that torchrun or srun gave this process; None where Lightning gives it."""
    for number, of in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if number in os.environ and int(os.environ.get(of, 1)) > 1:
            return int(os.environ[number])
    return None


def say(message: str) -> None:
    """Once, of all the processes of a run."""
    if is_zero():
        print(message, file=sys.stderr, flush=True)


def end_with_leader() -> None:
    """From here on a process that Lightning launched ends as soon as the one that did is gone.

    It would wait for the others instead: for minutes, on a GPU. torchrun and srun see to that
    themselves, and Lightning to the other way round.
    """
    if given() is not None or is_zero():
        return
    leader = os.getppid()

    def watch() -> None:
        while os.getppid() == leader:
            time.sleep(1)
        rank = os.environ.get("LOCAL_RANK")
        print(f"the run's first process is gone: rank {rank} ends", file=sys.stderr, flush=True)
        os._exit(1)  # at once: the main thread may wait inside a library

    threading.Thread(target=watch, daemon=True).start()
