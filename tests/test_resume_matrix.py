"""Whatever ends a run, and however it is laid out, it goes on to the same weights, bit for bit."""

import random
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
from forked_runs import Signal, finished, rows_of, run
from squares import squares

from callbacks.csv_logger import read_rows

STEPS = 12
TRAIN = (
    *("trainer=cpu", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"),
    *("val_every_n_steps=4", "trainer.num_sanity_val_steps=0", "data.val_tokens=400"),
    *("model.dim=16", "model.depth=2", "model.layer_pattern=[nsa,dense]", "model.heads=2"),
    *("model.dim_head=8", "model.seq_len=32", "batch.sequences_per_step=8"),
    *("scheduler.warmup_steps=2", "test=false", "logger=csv", "callbacks.samples.new_tokens=2"),
    *("callbacks.loss_plot=null", "data=text", "data.paths=[corpus.txt]"),
    *("attention.compress_block_size=4", "attention.compress_block_sliding_stride=4"),
    *("attention.selection_block_size=4", "attention.num_selected_blocks=4"),
    "sparsity_schedule=[{until: 0.3, num_selected_blocks: all}, "
    "{until: 0.6, sliding_window_size: 8}]",
    "callbacks.throughput.peak_flops=1e9",
)
DRAWS = ("model.dropout=0.3", "importance_loss.weight=0.1", "importance_loss.num_queries=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "corpus.txt").write_text(squares(800))
    return folder


def layout(ranks: int, workers: int, accumulate: int) -> list[str]:
    """Overrides of a run of so many processes, loaders and micro-batches a step."""
    devices = ["trainer.devices=2", "trainer.strategy=ddp"] if ranks == 2 else []
    size = 8 // ranks // accumulate
    return [*devices, f"data.num_workers={workers}", f"batch.micro_batch_size={size}"]


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[tuple[int, int], Path]:
    """A run from end to end for every number of ranks and of accumulated micro-batches."""
    runs = {}
    for ranks, accumulate in product((1, 2), (1, 2)):
        run_dir = folder / f"whole_{ranks}_{accumulate}"
        options = [*TRAIN, *layout(ranks, 0, accumulate), *DRAWS]
        finished(run(folder, [*options, f"run_dir={run_dir}"], ranks=ranks), folder)
        runs[ranks, accumulate] = run_dir
    return runs


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_ends_as_one_never_interrupted(
    folder: Path,
    uninterrupted: dict[tuple[int, int], Path],
    ranks: int,
    workers: int,
    accumulate: int,
) -> None:
    """Killed once and told to end once, in either order, each inside any micro-batch."""
    case = f"{ranks}_{workers}_{accumulate}"
    chance = random.Random(case)
    run_dir = folder / case
    options = [*TRAIN, *layout(ranks, workers, accumulate), *DRAWS]
    command = [*options, f"run_dir={run_dir}"]
    steps = sorted(chance.sample(range(1, STEPS - 1), 2))
    signals = chance.sample([signal.SIGKILL, signal.SIGTERM], 2)
    for step, which in zip(steps, signals, strict=True):
        when = {"step": step, "micro_batch": chance.randrange(accumulate)}
        sent = Signal(which, rank=chance.randrange(ranks), **when)
        codes = run(folder, command, ranks=ranks, sent=sent)
        expected = -signal.SIGKILL if which == signal.SIGKILL else 143
        assert codes == [expected] * ranks, (sent, (folder / "run.log").read_text()[-3000:])
        if which == signal.SIGTERM:  # saved at the end of the step it came in
            assert (run_dir / "checkpoints" / f"step_{step + 1}.ckpt").is_file()

    finished(run(folder, command, ranks=ranks), folder)
    assert_same_end(run_dir, uninterrupted[ranks, accumulate])


def assert_same_end(run_dir: Path, whole: Path) -> None:
    ends = [load(path / "checkpoints" / "last.ckpt") for path in (run_dir, whole)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == ends[0]["max_steps"] == STEPS
    assert_same_tensors(ends[0]["state_dict"], ends[1]["state_dict"])
    states = [end["optimizer_states"][0]["state"] for end in ends]
    assert states[0].keys() == states[1].keys()
    for number in states[0]:
        assert_same_tensors(states[0][number], states[1][number])
    rows = [rows_of(path) for path in (run_dir, whole)]
    assert rows[0] == rows[1]
    assert [int(row["step"]) for row in rows[0]] == list(range(1, STEPS + 1))


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_tensors(some: dict, others: dict) -> None:
    assert some.keys() == others.keys()
    for name in some:
        assert torch.equal(some[name], others[name]), name


def test_processes_may_come_and_go(folder: Path) -> None:
    """1 -> 2 -> 1 processes, told to end in between: the losses of one process from end to end."""
    whole, run_dir = folder / "alone", folder / "come_and_go"
    finished(run(folder, [*TRAIN, *layout(1, 0, 1), f"run_dir={whole}"]), folder)
    for ranks, until in ((1, 3), (2, 7)):
        told = Signal(signal.SIGTERM, rank=ranks - 1, step=until)
        command = [*TRAIN, *layout(ranks, 0, 1), f"run_dir={run_dir}"]
        assert run(folder, command, ranks=ranks, launcher="srun", sent=told) == [143] * ranks
    finished(run(folder, [*TRAIN, *layout(1, 0, 2), f"run_dir={run_dir}"]), folder)
    rows, expected = rows_of(run_dir), rows_of(whole)
    assert len(rows) == len(expected) == STEPS
    for name in ("train/loss", "val/loss"):
        for row, other in zip(rows, expected, strict=True):
            assert bool(row[name]) == bool(other[name]), (name, row["step"])
            if row[name]:
                assert abs(float(row[name]) - float(other[name])) < 1e-6, (name, row["step"])
    assert_work_is_that_of_its_stage(whole)
    told = "visible tokens  44 keys per query, of all branches; in the stages before 52, 32"
    assert told in (folder / "run.log").read_text()


def assert_work_is_that_of_its_stage(run_dir: Path) -> None:
    """FLOPs a token, by perf/mfu: most where all blocks are selected, least in a small window."""
    rows = read_rows(run_dir / "metrics.csv")
    flops = [float(row["perf/mfu"]) / float(row["perf/tokens_per_second"]) * 1e9 for row in rows]
    all_blocks, small_window, own = flops[:4], flops[4:8], flops[8:]
    for stage in (all_blocks, small_window, own):
        assert stage == pytest.approx([stage[0]] * 4, rel=1e-5)
    assert all_blocks[0] > 1.01 * own[0] > 1.02 * small_window[0] > 0
