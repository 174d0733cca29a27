"""Which of the processes of a run this one is, as far as the environment tells."""

import os
import sys


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
