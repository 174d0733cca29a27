"""benchmarks.presets: which runs it makes, and what it reads off them."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from tiny_run import OF_LIGHTNING, fit

from benchmarks import measure, presets
from benchmarks.step_trace import StepTrace

pytestmark = OF_LIGHTNING


def test_a_preset_runs_as_it_ships_beside_its_twin(tmp_path: Path) -> None:
    options = presets.parse(["--strategies", "one", "ddp", "--tokens", "8192"])
    jobs = presets.chosen(options)
    assert [(job.name, how) for job, how in jobs] == [
        (name, how)
        for name in ("nsa_medium", "dense_medium", "nsa_example")
        for how in ("one", "ddp")
    ]
    job = jobs[0][0]
    assert job.overrides == ("model=nsa_medium",) and (job.tokens, job.sequences) == (8192, 16)


@pytest.mark.parametrize("job", presets.presets(), ids=lambda job: f"{job.name}-{job.tokens}")
def test_every_command_composes_to_what_its_row_says(job: presets.Job, tmp_path: Path) -> None:
    words = presets.command_of(job, "ddp", tmp_path, [])
    overrides = words[words.index(next(w for w in words if w.endswith("train.py"))) + 1 :]
    with initialize_config_dir(str(presets.ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides)
    assert (cfg.model.seq_len, cfg.batch.sequences_per_step) == (job.tokens, job.sequences)
    assert cfg.trainer.max_steps == job.steps and cfg.batch.micro_batch_size == "auto"
    assert cfg.callbacks.trace.folder == cfg.run_dir == str(tmp_path / "run")
    assert cfg.callbacks.preemption and cfg.callbacks.checkpoint_last, "one needs the other"


def test_steps_are_timed_and_become_a_row(tmp_path: Path) -> None:
    fit(tmp_path, StepTrace(str(tmp_path), warm_up=2), accumulate_grad_batches=2)
    figures = json.loads((tmp_path / "step_trace.json").read_text())
    assert figures["start_up_s"] >= 0 and figures["step_ms"] > 0
    job = presets.Job("nsa_small", 8, 2, 8, ())
    row = presets.row_of(job, "ddp", figures | {"status": "ok"}, 2)
    assert row["tokens_per_second"] == pytest.approx(16e3 / figures["step_ms"])
    assert row["backend"] == "ddp x 2"
    measure.append(tmp_path / "results.csv", row)
    assert "tokens/s" in presets.table([(row, figures)])


def test_a_run_that_failed_has_a_row_too(tmp_path: Path) -> None:
    row = presets.row_of(presets.presets()[0], "one", {"status": "exit 1"}, 1)
    assert presets.table([(row, {})]) == "nsa_small 1024 x 32 one: exit 1"
