"""Which tile a launch takes: the table's, or with NSA_AUTOTUNE=1 the fastest of the candidates.

The fastest is found when a problem is first met, its length rounded up to a power of two, and kept
for as long as the process lives. Another choice rounds in another order, so two processes may
differ in the last bits, as they do not with the table.
"""

import os
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from nsa.kernels.primitives import power_of_2
from nsa.kernels.tile_sizes import Problem, Tile, candidates, table_tile

Result = TypeVar("Result")
UNFIT = (  # what a tile too large for a GPU raises
    *(CompilationError, OutOfResources, PTXASError),
    torch.OutOfMemoryError,  # of the memory that is left
)


def with_tile(
    problem: Problem, launch: Callable[[Tile], Result], then: Callable[[Tile], Result] | None = None
) -> Result:
    """launch(tile), which may be called several times: it allocates what it writes.

    `then`, where given, makes the result: called once, so it may add to arrays that exist.
    """
    return (then or launch)(choose(problem, launch))


def from_table(problem: Problem, launch: Callable[[Tile], object]) -> Tile:
    return table_tile(problem)


def milliseconds(run: Callable[[], object]) -> float:
    return cast(float, do_bench(run, warmup=5, rep=30, return_mode="median"))


class Fastest:
    """The fastest candidate of each problem, timed once."""

    def __init__(self, timer: Callable[[Callable[[], object]], float] = milliseconds) -> None:
        self.timer = timer
        self.chosen: dict[Problem, Tile] = {}

    def __call__(self, problem: Problem, launch: Callable[[Tile], object]) -> Tile:
        bucket = problem._replace(T=power_of_2(problem.T))
        if bucket not in self.chosen:
            times = {tile: self.time(tile, launch) for tile in candidates(problem)}
            self.chosen[bucket] = min(times, key=times.__getitem__)
        return self.chosen[bucket]

    def time(self, tile: Tile, launch: Callable[[Tile], object]) -> float:
        try:
            return self.timer(lambda: launch(tile))
        except UNFIT:
            return float("inf")


def chooser(switch: str) -> Callable[[Problem, Callable[[Tile], object]], Tile]:
    if switch not in ("", "0", "1"):
        raise ValueError(f"NSA_AUTOTUNE={switch!r}: it must be 1, to time tiles, or 0")
    return Fastest() if switch == "1" else from_table


choose = chooser(os.environ.get("NSA_AUTOTUNE", ""))
