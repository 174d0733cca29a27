"""Tiles come from the table, or with NSA_AUTOTUNE=1 from a stopwatch; how they are measured."""

import importlib
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from forked_runs import python
from kernel_inputs import DEVICE

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from benchmarks.probes import survey, tune
from nsa import kernels
from nsa.config import NSAConfig
from nsa.kernels import autotune, tile_sizes
from nsa.kernels.tile_order import op as tile_order
from nsa.kernels.tile_sizes import Problem, Row, Tile

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL, LARGE = Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)


def problem(**changes) -> Problem:
    sizes = dict(kernel="attend_fwd", dtype=torch.bfloat16, D=128, DV=128, R=16, T=1000)
    return Problem(**sizes | {"device": CPU} | changes)


# ---- the table ------------------------------------------------------------


def test_the_first_row_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row(Tile(1, 1, 1, 1), arch=90),
        Row(Tile(2, 2, 2, 2), width=64, mask="band"),
        Row(Tile(3, 3, 3, 3), R=4, T=4096),
        Row(Tile(4, 4, 4, 4), block=32),
        Row(Tile(5, 5, 5, 5)),
    ]
    monkeypatch.setattr(tile_sizes, "capability", lambda device: 90 if device.index else 80)

    def first(**changes) -> int:
        return next(row.tile.rows for row in rows if row.holds(problem(**changes)))

    assert first() == 4 and first(block=64) == 5
    assert first(R=4) == 3 and first(R=4, T=5000) == 4
    assert first(D=64, DV=48, mask="band") == 2 and first(D=64, DV=64, mask="bits") == 4
    assert first(device=torch.device("cuda", 1)) == 1


@pytest.mark.parametrize("kernel", tile_sizes.TILES)
@pytest.mark.parametrize("width", [16, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_shrink_to_what_a_gpu_has(kernel, width, dtype, monkeypatch) -> None:
    """From an H100's shared memory to that of an sm_86; every candidate that is left fits."""
    block = 16 if kernel.startswith("block") else 0
    asked = problem(kernel=kernel, dtype=dtype, D=width, DV=width, block=block)
    for kib in (227, 99):
        tile_sizes.table_tile.cache_clear()
        monkeypatch.setattr(tile_sizes, "shared_memory", lambda device, kib=kib: kib * 1024)
        tile, *others = tile_sizes.candidates(asked)
        assert all(tile_sizes.fits(asked, each) for each in (tile, *others))
        assert tile not in others
        if kib == 227:
            assert bool(others) == (dtype == torch.float16)
    tile_sizes.table_tile.cache_clear()


# ---- the switch ------------------------------------------------------------


def test_the_switch_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert autotune.choose is autotune.from_table
    with monkeypatch.context() as patched:
        patched.setenv("NSA_AUTOTUNE", "1")
        importlib.reload(autotune)
        assert isinstance(autotune.choose, autotune.Fastest)
    importlib.reload(autotune)
    with pytest.raises(ValueError, match="NSA_AUTOTUNE='yes': it must be 1"):
        autotune.chooser("yes")


def test_the_stopwatch_decides_which_tile_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for lengths of one power of two; the result is the table's but for rounding."""
    launched, timed = [], []
    launch = type(tile_order.attend_fwd_kernel).run

    def spy(kernel, *args, **kwargs):
        launched.append(kwargs["ROWS"])
        return launch(kernel, *args, **kwargs)

    def timer(run) -> float:
        run()
        timed.append(launched[-1])
        return {LARGE.rows: 1.0, SMALL.rows: 2.0}[launched[-1]]

    def window(T: int) -> torch.Tensor:
        q = torch.randn(1, T, 2, 16, device=DEVICE)
        return kernels.sliding_window_attention(q, q, q, NSAConfig(sliding_window_size=9))

    monkeypatch.setattr(type(tile_order.attend_fwd_kernel), "run", spy)
    monkeypatch.setattr(autotune, "candidates", lambda problem: [SMALL, LARGE])
    torch.manual_seed(0)
    want = window(40)
    assert launched == [64]
    with patch.object(autotune, "choose", autotune.Fastest(timer)):
        torch.manual_seed(0)
        torch.testing.assert_close(window(40), want)
        assert timed == [16, 32] and launched == [64, 16, 32, 32]
        window(64)
        assert len(timed) == 2 and launched[-1] == 32
        window(65)
        assert len(timed) == 4


def test_a_tile_that_does_not_fit_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(tile: Tile) -> None:
        if tile == SMALL:
            raise OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(autotune, "candidates", lambda problem: [SMALL, LARGE])
    fastest = autotune.Fastest(lambda run: run() or 1.0)
    assert fastest(problem(), launch) == LARGE


# ---- benchmarks.probes.tune ------------------------------------------------------------


def test_a_candidate_is_timed_only_if_it_fits_and_is_right(monkeypatch) -> None:
    others = {"right": Tile(8, 8, 8, 8), "wrong": Tile(9, 9, 9, 9), "unfit": Tile(7, 7, 7, 7)}
    first = tile_sizes.table_tile(problem())
    monkeypatch.setattr(survey, "tried", lambda problem: [first, *others.values()])

    def launch(tile: Tile) -> torch.Tensor:
        if tile == others["unfit"]:
            raise OutOfResources(1, 0, "shared memory")
        return torch.tensor([1.0, 1.3 if tile == others["wrong"] else 1.01]).bfloat16()

    survey_ = survey.Survey("attend_fwd", "", lambda run: 2.0)
    assert survey_(problem(), launch) == first
    assert survey_(problem(kernel="attend_dq"), launch) != first  # another kernel: left alone
    statuses = [(row["status"].split(":")[0], row.get("ms")) for row in survey_.rows]
    assert statuses == [("ok", 2.0), ("ok", 2.0), ("wrong", None), ("unfit", None)]


REHEARSAL = """
import sys
import vectorised_interpreter
from benchmarks.probes import tune
from benchmarks.workers import Assignment
vectorised_interpreter.install()
told = Assignment("all", stop=2e9, date="2026", command="")
for op, rows in (["attend_fwd"], 9), (["attend_fwd", "orders"], 11):
    arguments = ["--folder", sys.argv[1], "--device", "cpu", "--tokens", "24", "--op", *op]
    options = tune.parse(arguments)
    tune.work(told, options)
    assert len(tune.read(options.folder / "tune.csv")) == rows  # the second run keeps the first's
"""


def test_tuning_is_rehearsed_on_a_cpu_and_goes_on(tmp_path) -> None:
    """In a process that sees no GPU: where there is one, kernels are compiled for it here."""
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = python(REHEARSAL, str(tmp_path), environment=environment)
    assert done.returncode == 0, done.stderr
    tune.append(tmp_path / "tune.csv", [{"kernel": "select", "status": "lost: silent"}])
    report = tune.report(tune.read(tmp_path / "tune.csv"))
    assert report.count("attend_fwd") == 3 and report.count(" ms   best ") == 3
    assert "block order ahead of tiles, 4/2 D16: " in report and "lost: silent" in report


def test_every_kernel_with_tiles_is_surveyed():
    assert {kernel for kernel, _ in survey.KINDS} == {*tile_sizes.TILES, "orders"}
    assert {*tile_sizes.TILES} == {*tile_sizes.TILES_FLOAT32} == {*tile_sizes.CANDIDATES}
