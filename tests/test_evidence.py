"""The command behind docs/evidence.md: figures from the CSV alone."""

import json
from pathlib import Path

from benchmarks import evidence, evidence_figures


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
