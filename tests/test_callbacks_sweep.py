"""Does a finished sweep leave its table and its plot, failed jobs included?"""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from callbacks.sweep_report import apart, pareto_front, read_jobs, short, telling, write_report

ROOT = Path(__file__).parent.parent


def job(folder: Path, number: str, overrides: list[str], **result: Any) -> None:
    record = folder / number
    (record / ".hydra").mkdir(parents=True)
    (record / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if result:
        everything = {"test_bpb": None, "num_params": 904_000, "tokens_per_second": 41_000.5}
        everything |= {"steps": 600, "seconds": 61.25, "overrides": overrides} | result
        (record / "result.json").write_text(json.dumps(everything))


@pytest.fixture
def sweep(tmp_path) -> Path:
    job(tmp_path, "0", ["data=stdlib", "n=4"], val_bpb=2.5, visible_tokens=96.0)
    job(tmp_path, "1", ["data=stdlib", "n=8"], val_bpb=2.4, visible_tokens=160.0, test_bpb=2.45)
    job(tmp_path, "2", ["data=stdlib", "n=16"], val_bpb=2.42, visible_tokens=288.0)
    job(tmp_path, "3", ["data=stdlib", "n=32"])  # died
    job(tmp_path, "4", ["data=stdlib", "n=64"], val_bpb=math.inf, visible_tokens=999.0)
    job(tmp_path, "10", ["data=stdlib", "n=2"], val_bpb=2.7, visible_tokens=64.0)
    return tmp_path


def test_report(sweep):
    table = write_report(sweep)
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4", "10"]
    assert rows[1] == {
        "job": "1",
        "overrides": "data=stdlib n=8",
        "val_bpb": "2.4",
        "test_bpb": "2.45",
        "visible_tokens": "160.0",
        "num_params": "904000",
        "tokens_per_second": "41000.5",
        "steps": "600",
        "seconds": "61.25",
    }
    assert rows[3]["val_bpb"] == rows[4]["val_bpb"] == "failed" and rows[3]["steps"] == ""
    assert (sweep / "sweep.md").read_text() == table
    assert "| 1 | n=8 | **2.4000** | 2.4500 | 160 | 904,000 | 41,000 | 600 | 61 |" in table
    assert "| 2 | n=16 | 2.4200 |  | 288 |" in table
    assert "| 3 | n=32 | failed |  |  |" in table
    assert (sweep / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_overrides_that_all_jobs_share_are_left_out(sweep):
    numbers = (4, 8, 16, 32, 64, 2)
    assert telling(read_jobs(sweep)) == [[f"n={n}"] for n in numbers]
    assert telling(read_jobs(sweep)[:1]) == [["data=stdlib", "n=4"]]
    assert short("attention.gate_bias=0.5") == "gate_bias=0.5"


def test_pareto_front(sweep):
    jobs = read_jobs(sweep)
    assert pareto_front(jobs) == ["10", "0", "1"]
    assert pareto_front([*jobs, jobs[1] | {"job": "twin"}]) == ["10", "0", "1"]


def test_ticks_keep_their_distance():
    assert apart([96.0, 96.0, 100.0, 110.0, 200.0]) == [96.0, 110.0, 200.0]


def test_a_sweep_without_a_result_has_a_table_and_no_plot(tmp_path):
    job(tmp_path, "0", ["n=4"])
    assert "| 0 | n=4 | failed |" in write_report(tmp_path)
    assert not (tmp_path / "sweep.png").exists()


def test_a_folder_without_jobs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no job of a multirun"):
        write_report(tmp_path)


APP = """
import json, pathlib
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    if cfg.n == 8:
        raise ValueError("eight")
    folder = pathlib.Path(HydraConfig.get().runtime.output_dir)
    result = {"val_bpb": 2 + 1 / cfg.n, "visible_tokens": 16 * cfg.n, "num_params": 10}
    (folder / "result.json").write_text(json.dumps(result))

main()
"""
CONFIG = """
n: 2
hydra:
  run: {dir: single}
  sweep: {dir: sweep, subdir: "${hydra:job.num}"}
  callbacks:
    sweep_report:
      _target_: callbacks.sweep_report.SweepReport
"""


def launch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "app.py").write_text(APP)
    (folder / "app.yaml").write_text(CONFIG)
    command = [sys.executable, "app.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_hydra_writes_the_report_even_where_a_job_fails(tmp_path):
    done = launch(tmp_path, "-m", "n=2,8,4")
    assert done.returncode == 1 and "eight" in done.stderr and "Callback" not in done.stderr
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    for row in ("| 0 | n=2 | **2.5000** |", "| 1 | n=8 | failed |", "| 2 | n=4 | **2.2500** |"):
        assert row in table
    (tmp_path / "sweep" / "sweep.md").unlink()
    command = [sys.executable, "-m", "callbacks.sweep_report", str(tmp_path / "sweep")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == table.strip() == (tmp_path / "sweep" / "sweep.md").read_text().strip()


def test_a_finished_sweep_prints_its_table(tmp_path):
    done = launch(tmp_path, "-m", "n=2,4")
    assert done.returncode == 0 and "| 1 | n=4 | **2.2500** |" in done.stdout


def test_single_runs_and_other_ranks_have_no_report(tmp_path):
    single = launch(tmp_path, "n=4")
    assert "bpb" not in single.stdout and "SweepReport" not in single.stderr
    assert launch(tmp_path, "-m", "n=4", LOCAL_RANK="1").returncode == 0
    assert not list(tmp_path.rglob("sweep.*"))
