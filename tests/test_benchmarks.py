"""The benchmarks record what they measure, and measure only what is right."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    attention,
    measure,
    plots,
    train_step,
    workers,
    workloads,
)
from benchmarks.probes import kernel_times
from nsa.config import NSAConfig

CPU = torch.device("cpu")
CONTEXT = {"date": "2026-01-02T03:04:05", "command": "python -m benchmarks.attention"}


def bench(monkeypatch: pytest.MonkeyPatch) -> attention.Bench:
    monkeypatch.setitem(workloads.LAYOUTS, "8/4", workloads.Layout(4, 2, 16))
    arguments = "--backend reference --device cpu --check-tokens 48 --seconds 0"
    return attention.Bench("8/4", attention.parse(arguments.split()))


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    row = {
        "op": "nsa",
        "tokens": 8192,
        "step_ms": 12.3456,
        "mfu": 0.41239,
        "peak_mib": float("nan"),
    }
    measure.append(path, row, {"op": "dense", "status": "oom"})
    measure.append(path, {"op": "window"})
    first, second, third = measure.read(path)
    assert (first["op"], first["tokens"], first["step_ms"]) == ("nsa", "8192", "12.35")
    assert (first["mfu"], first["peak_mib"], first["suite"]) == ("0.4124", "", "")
    assert second["status"] == "oom" and third["op"] == "window"


def test_columns_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("['colour']")):
        measure.append(tmp_path / "results.csv", {"colour": "red"})
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="write to another file with --out"):
        measure.append(tmp_path / "other.csv")


def test_the_projects_own_results_can_be_read() -> None:
    assert {row["status"] for row in measure.read(measure.RESULTS)} >= {"ok"}


def test_a_row_says_where_it_comes_from() -> None:
    context = measure.environment(CPU, **CONTEXT)
    assert context["torch"] == torch.__version__ and context["python"].startswith("3.")
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", context["commit"])
    assert measure.environment(CPU, **CONTEXT, commit="abc")["commit"] == "abc"
    assert set(context) <= set(measure.COLUMNS)


def test_the_whole_op_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = bench(monkeypatch).measure(("nsa", 64))
    assert (row["status"], row["op"], row["backend"]) == ("ok", "nsa", "reference")
    assert row["step_ms"] == row["forward_ms"] + row["backward_ms"] > 0
    assert float(row["check"]) <= 1


def test_what_fails_its_check_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(w: workloads.Workload) -> workloads.Item:
        def op(q, k, v):
            return w.ops.sliding_window_attention(q, k.roll(1, 1), v, w.cfg)

        right = workloads.window(w)
        check = w.compare(op, right.op, right.inputs, "out dq dk dv")
        return workloads.Item(op, right.inputs, [check])

    monkeypatch.setitem(attention.ITEMS, "window", shifted)
    row = bench(monkeypatch).measure(("window", 64))
    assert row["status"].startswith("refused: out ") and "!" in row["status"]
    assert "forward_ms" not in row


def test_what_does_not_fit_is_recorded() -> None:
    def too_large():
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    assert workers.attempt(too_large) == {"status": "oom"}
    assert workers.attempt(lambda: [][0])["status"].startswith("failed: IndexError: list index")


def test_triton_is_judged_in_both_loop_orders() -> None:
    pytest.importorskip("triton")
    cfg = NSAConfig(selection_block_size=16, compress_block_size=16, num_selected_blocks=2)
    layout = workloads.Layout(2, 1, 16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CPU: the interpreter
    w = workloads.Workload(layout, 24, torch.float32, device, "triton", cfg)
    kept = torch.tensor([0, -1], dtype=torch.int32, device=device)
    w.__dict__["indices"] = kept.expand(1, 24, 1, 2)  # selecting is slow in the interpreter
    verdicts = [check() for check in workloads.selected(w).checks]
    assert [verdict.ok for verdict in verdicts] == [True, True]


def test_values_may_be_narrower_than_keys() -> None:
    layout = workloads.Layout(2, 1, 24, 16)
    assert layout.columns["dim_head"] == "24/16" and layout.name == "2/1 D24/16"
    assert workloads.Layout.of(layout.columns) == layout
    assert workloads.Layout.of(workloads.LAYOUTS["8/4"].columns) == workloads.LAYOUTS["8/4"]
    w = workloads.Workload(layout, 144, torch.float32, torch.device("cpu"), "torch")
    for name in ("nsa", "combine", "pool"):
        item = workloads.OURS[name](w)
        assert all(check().ok for check in item.checks), name
    assert plots.in_words(layout.name).endswith("head dimension 24, of values 16")


def test_a_lost_job_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fragile.py").write_text(
        "import json, os, sys\n"
        "for job in range(json.loads(sys.argv[-1])['after'], 4):\n"
        "    print(f'@job {job}', flush=True)\n"
        "    if job == 1: os.abort()\n"
        "    print('measured', job)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = workers.Assignment("group", stop=2e9, date="", command="")
    lost = []
    workers.run_jobs("fragile", told, 4, 20.0, lambda job, end: lost.append((job, end)))
    assert lost == [(1, "exit status -6")]
    assert re.findall(r"measured \d", capfd.readouterr().out) == [
        f"measured {n}" for n in (0, 2, 3)
    ]


def made_up_rows() -> list[dict]:
    """Dense attention takes T² / 2²⁰ ms and NSA 8 T / 2¹⁰: equal at 8k tokens."""
    rows = []
    for heads, tokens in ((64, 4096), (64, 16384), (8, 4096), (8, 16384)):
        for op, backend, ms in (
            ("dense", "cudnn", tokens**2 / 2**20),
            ("nsa", "triton", 8 * tokens / 2**10),
            ("window", "triton", tokens / 2**10),
        ):
            times = {"forward_ms": ms / 4, "backward_ms": 3 * ms / 4, "step_ms": ms}
            where = {"suite": "op", "status": "ok", "heads": heads, "kv_heads": 4, "dim_head": 64}
            op_columns = {"op": op, "backend": backend, "tokens": tokens, "peak_mib": tokens / 64}
            rows.append(where | op_columns | times | CONTEXT)
    return rows


def test_pictures_and_table_come_from_the_rows_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    older = {"suite": "op", "status": "ok", "op": "nsa", "backend": "triton", "date": "2025"}
    measure.append(path, older, *made_up_rows())
    rows = measure.read(path)
    assert plots.newest_run(rows) == CONTEXT["date"]
    text = plots.report(rows, CONTEXT["date"], tmp_path / "docs")
    assert "64/4 D64" in text and "8/4 D64" in text and "2.00x" in text
    assert text.count("crossover, fwd + bwd: at 8k") == 2
    pictures = sorted((tmp_path / "docs").iterdir())
    assert [p.name for p in pictures] == ["bench_memory.png", "bench_speedup.png", "bench_time.png"]
    assert all(p.stat().st_size > 10_000 for p in pictures)
    assert "nothing drawn" in plots.report(rows, "2025", tmp_path / "none")


def test_pictures_of_whole_ops_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    measure.append(path, *(row for row in made_up_rows() if row["op"] not in plots.OPS))
    figure = plots.draw_times(measure.read(path))
    assert len(figure.axes) == 2  # a panel for each head layout, none for single ops
    figure.savefig(tmp_path / "times.png")


def test_where_it_begins_to_pay() -> None:
    assert plots.crossover({1024: 0.5, 4096: 2.0}) == pytest.approx(2048)
    assert plots.crossover({1024: 1.5, 4096: 2.0}) == 0
    assert plots.crossover({1024: 1.5, 4096: 0.9}) is None
    assert plots.crossover({}) is None


def test_time_in_which_something_runs() -> None:
    assert measure.covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


def test_a_training_step_has_sane_numbers() -> None:
    arguments = "--device cpu --tokens-per-step 64 --sizes tiny --kinds nsa --tokens 32"
    options = train_step.parse([*arguments.split(), "--backends", "reference"])
    (job,) = train_step.jobs_of("tiny", options)
    step = train_step.build("tiny", job, options, depth=1)
    before = step()
    row = train_step.measure_step(step, seconds=0.0)
    assert step() < before  # it trains
    assert row["tokens_per_second"] == pytest.approx(64 / (row["step_ms"] / 1e3))
    assert row["sizes"] == "w32 l8 d4 l'16 n4" and row["heads"] == 4
    json.dumps({**train_step.columns("tiny", job, options), **row})  # plain values only


def test_a_long_sequence_is_a_step_alone_and_keeps_fewer_activations() -> None:
    arguments = "--device cpu --tokens-per-step 32 --sizes large --kinds nsa --tokens 64"
    words = [*arguments.split(), "--backends", "reference", "--activation-checkpointing", "full"]
    options = train_step.parse(words)
    (job,) = train_step.jobs_of("tiny", options)
    assert train_step.batch_size("tiny", 64, options) == 1
    assert train_step.columns("tiny", job, options)["op"] == "nsa_tiny checkpointing full"
    step = train_step.build("tiny", job, options, depth=1)
    assert all(block.checkpoint is not None for block in step.model.blocks)
    before = step()
    assert step() < before


def test_kernels_are_added_up_by_name() -> None:
    def event(name: str, microseconds: int, device: str = "CUDA", named: bool = False):
        time = SimpleNamespace(elapsed_us=lambda: microseconds)
        where = SimpleNamespace(name=device)
        return SimpleNamespace(
            name=name, device_type=where, time_range=time, is_user_annotation=named
        )

    events = [event("a", 600), event("b", 3000), event("a", 900), event("c", 9, "CPU")]
    found = kernel_times.by_name([*events, event("all of it", 9000, named=True)])
    assert [*found] == ["b", "a"]
    assert found["a"] == pytest.approx((2 / kernel_times.CALLS, 1.5 / kernel_times.CALLS))
    shown = kernel_times.show("forward", {"b": (1.0, 3.0), "a": (2.0, 1.5), "tiny": (1.0, 0.001)})
    assert "forward: 4.50 ms" in shown and "2 x  a" in shown and "tiny" not in shown
