"""The command behind docs/evidence.md: figures from the CSV alone."""

import json
from pathlib import Path

import forked_runs
import numpy as np
import pytest

from benchmarks import evidence, evidence_figures
from benchmarks.probes import recall_capacity


def test_arms_have_the_parameters_of_nsa_and_the_rate_of_the_experiment() -> None:
    asked = evidence.options(["recall_scattered", "--arms", "dense", "nsa", "--seeds", "0"])
    dense, nsa = evidence.plan(asked)
    assert dense.lr == nsa.lr == 3e-3 and (dense.arm, nsa.arm) == ("dense", "nsa")
    words = ["experiment=recall_scattered", "arm=dense"]
    wanted, _, _ = evidence.count_params(["experiment=recall_scattered", "arm=nsa"])
    plain, _, _ = evidence.count_params(words)
    matched, _, _ = evidence.count_params(words, dense.expand)
    assert abs(matched - wanted) < 0.2 * abs(plain - wanted)
    assert abs(matched - wanted) <= 0.03 * wanted  # as near as steps of 64 come
    (other,) = evidence.plan(evidence.options(["recall_scattered", "--arms", "nsa", "--seeds", "1",
                                               "--lrs", "1e-3"]))  # fmt: skip
    assert other.lr == 1e-3 and other.expand == nsa.expand


def test_figures_are_made_of_the_csv_alone(tmp_path: Path) -> None:
    jobs = [evidence.Job("nsa", s, 1e-3, 2.0, tmp_path / f"nsa{s}") for s in (0, 1)]
    for job, last in zip(jobs, (0.4, 0.8), strict=True):
        job.folder.mkdir()
        (job.folder / "metrics.csv").write_text(f"step,val/accuracy\n10,\n20,.1\n30,{last}\n")
        result = {"metric": "accuracy", "better": "higher", "num_params": 5, "test_accuracy": last}
        (job.folder / "result.json").write_text(json.dumps(result))
        assert evidence.finished(job)
    evidence_figures.collect(tmp_path, jobs)
    for job in jobs:
        (job.folder / "metrics.csv").unlink()
    table = evidence_figures.draw(tmp_path)
    assert "0.6000" in table and "never 30" in table
    assert (tmp_path / "evidence.png").stat().st_size > 1000


def test_the_crowded_task_needs_selection_and_lets_it_be_learned() -> None:
    """As far as sums of random codes go, with the sizes of recall_scattered, and with those that
    were solved without selection: there blocks overlap, so that two of them hold a fact.
    """
    cfg = evidence.configured(["experiment=recall_scattered", "arm=nsa"])
    rng, facts = np.random.default_rng(0), cfg.data.facts_per_cluster
    assert 2 * facts == cfg.attention.compress_block_size
    assert cfg.data.num_facts == recall_capacity.FACTS
    forced = cfg.attention.num_initial_blocks + cfg.attention.num_local_blocks
    assert cfg.attention.num_selected_blocks - forced == recall_capacity.KEPT
    numbers = cfg.model.kv_heads * cfg.model.dim_head
    assert recall_capacity.answered(numbers, facts, 300, rng) < 0.5
    assert recall_capacity.found(cfg.model.dim_head, facts, 300, rng) > 0.95
    assert recall_capacity.answered(2 * 2 * 64, 16, 300, rng) > 0.9


@pytest.mark.parametrize(
    ("arm", "least", "most"), [("nsa", 0.9, 1.0), ("random", 0.0, 0.5), ("window", 0.0, 0.1)]
)
def test_nsa_selects_what_a_window_cannot_see(
    tmp_path: Path, arm: str, least: float, most: float
) -> None:
    words = ["experiment=recall_cpu", f"arm={arm}", "logger=csv", "callbacks=none", "run_dir=run"]
    forked_runs.finished(forked_runs.run(tmp_path, words), tmp_path)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert least <= result["test_accuracy"] <= most
