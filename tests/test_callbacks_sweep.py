"""Does a sweep leave its table, failed jobs included, and a plot that can be read?"""

import csv
import json
import math
import multiprocessing
import os
import shutil
from itertools import combinations, product
from pathlib import Path
from typing import Any

import forked_runs
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from runs.sweep_plot import BEHIND, FRONT, apart, draw, labels, pareto_front, telling
from runs.sweep_report import (
    SweepReport,
    collect,
    newest_sweep,
    read_csv,
    write_csv,
    write_table_and_plot,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

ROOT = Path(__file__).parent.parent


def job(folder: Path, number: str, overrides: list[str], **result: Any) -> None:
    record = folder / number
    (record / ".hydra").mkdir(parents=True)
    (record / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    everything = {"test_bpb": None, "num_params": 904_000, "tokens_per_second": 41_000.5}
    everything |= {"steps": 600, "seconds": 61.25, "overrides": overrides}
    if "val_bpb" in result:
        result = everything | result
    if result:
        (record / "result.json").write_text(json.dumps(result))


def write_report(folder: Path) -> str:
    write_csv(folder)
    return write_table_and_plot(folder)


@pytest.fixture
def sweep(tmp_path) -> Path:
    job(tmp_path, "0", ["data=stdlib", "n=4"], val_bpb=2.5, visible_tokens=96.0)
    job(tmp_path, "1", ["data=stdlib", "n=8"], val_bpb=2.4, visible_tokens=160.0, test_bpb=2.45)
    job(tmp_path, "2", ["data=stdlib", "n=16"], val_bpb=2.42, visible_tokens=288.0)
    job(tmp_path, "3", ["data=stdlib", "n=32"], error="n=32 | is too much")
    job(tmp_path, "4", ["data=stdlib", "n=64"], val_bpb=math.inf, visible_tokens=999.0)
    job(tmp_path, "5", ["data=stdlib", "n=128"])  # killed
    job(tmp_path, "10", ["data=stdlib", "n=2"], val_bpb=2.7, visible_tokens=64.0)
    return tmp_path


# The table


def test_report(sweep):
    table = write_report(sweep)
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4", "5", "10"]
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
        "metric": "bpb",
        "better": "lower",
        "error": "",
    }
    assert rows[3]["error"] == "n=32 | is too much" and rows[3]["steps"] == ""
    assert rows[4]["error"] == "no finite val_bpb" and "running" in rows[5]["error"]
    assert (sweep / "sweep.md").read_text() == table
    assert "| 1 | n=8 | **2.4000** | 2.4500 | 160 | 904,000 | 41,000 | 600 | 61 |  |" in table
    assert "| 2 | n=16 | 2.4200 |  | 288 |" in table
    assert "| 3 | n=32 | failed |  |  |  |  |  |  | n=32 \\| is too much |" in table
    assert (sweep / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_and_the_plot_come_from_the_csv_alone(sweep):
    write_report(sweep)
    for folder in sweep.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    before = (sweep / "sweep.png").read_bytes()
    text = (sweep / "sweep.csv").read_text()
    (sweep / "sweep.csv").write_text(text.replace("n=2,2.7,", "n=2,2.3,"))
    assert "| 10 | n=2 | **2.3000** |" in write_table_and_plot(sweep)
    assert (sweep / "sweep.png").read_bytes() != before


def test_the_csv_is_read_as_it_was_written(tmp_path):
    job(tmp_path, "0", ["data.path='a b,c'", 'n="4"'], val_bpb=2.5, visible_tokens=96.0)
    job(tmp_path, "1", ["n=5"], error='a, "b"')
    write_report(tmp_path)
    assert read_csv(tmp_path) == collect(tmp_path)


def test_a_csv_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "sweep.csv").write_text("job,overrides\n0,n=4\n")
    with pytest.raises(ValueError, match=r"sweep\.csv has no column error, num_params"):
        write_table_and_plot(tmp_path)


def test_a_table_without_failures_has_no_column_for_them(tmp_path):
    job(tmp_path, "0", ["n=4"], val_bpb=2.5, visible_tokens=96.0)
    assert "error" not in write_report(tmp_path)


def test_overrides_that_all_jobs_share_are_left_out(sweep):
    numbers = (4, 8, 16, 32, 64, 128, 2)
    assert telling(collect(sweep)) == [[f"n={n}"] for n in numbers]
    assert telling(collect(sweep)[:1]) == [["data=stdlib", "n=4"]]


def test_a_sweep_without_a_result_has_a_table_no_plot_and_an_exit_code(tmp_path):
    job(tmp_path, "0", ["n=4"], error="why")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(SystemExit, match=r"no job of .* has a result"):
        SweepReport().on_multirun_end(config)
    assert "| 0 | n=4 | failed |" in (tmp_path / "sweep.md").read_text()
    assert not (tmp_path / "sweep.png").exists()
    job(tmp_path, "1", ["n=5"], val_bpb=2.0, visible_tokens=3.0)
    SweepReport().on_multirun_end(config)


def test_a_folder_without_jobs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no job of a multirun"):
        write_csv(tmp_path)


def test_the_newest_sweep_is_the_one_written_last(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds a sweep\.csv"):
        newest_sweep(tmp_path)
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.csv").touch()
        os.utime(tmp_path / name / "sweep.csv", (1000 + age, 1000 + age))
    assert newest_sweep(tmp_path) == tmp_path / "a"


def ends(folder: Path, number: int) -> None:
    """What a worker process does where a job ends."""
    job(folder, str(number), [f"n={number}"], val_bpb=3.0 - number, visible_tokens=9.0 + number)
    write_csv(folder)


def test_jobs_that_end_at_once_in_different_processes_are_all_in_the_table(tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=ends, args=(tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [row["val_bpb"] for row in read_csv(tmp_path)] == [3.0, 2.0, 1.0, 0.0]


# The plot


def row(number: int, bpb: float, visible: float, speed: float | None, params: int) -> Any:
    row = {"job": str(number), "val_bpb": bpb, "visible_tokens": visible, "num_params": params}
    row |= {"metric": "bpb", "better": "lower"}
    return row | {"overrides": [f"a.n={number}"], "tokens_per_second": speed, "error": None}


JOBS = [row(0, 2.5, 96, 900, 10), row(1, 2.4, 160, 800, 30), row(2, 2.42, 288, 850, 20)]
FAILED = row(3, 0.0, 1, 9999, 1) | {"val_bpb": None, "error": "why"}


def test_pareto_front():
    def front(cost: str, jobs: list[Any]) -> list[str]:
        return [job["job"] for job in pareto_front(jobs, cost)]

    assert front("visible_tokens", [*JOBS, FAILED]) == ["0", "1"]
    assert front("visible_tokens", [*JOBS, JOBS[1] | {"job": "twin"}]) == ["0", "1"]
    assert front("tokens_per_second", [*JOBS, FAILED]) == ["0", "2", "1"]  # more is better
    assert front("num_params", JOBS) == ["0", "2", "1"]
    silent = JOBS[0] | {"tokens_per_second": None}
    assert front("tokens_per_second", [silent, *JOBS[1:]]) == ["2", "1"]


def points(figure: Figure) -> list[dict[str, set[tuple[float, float]]]]:
    """The points of each panel, by colour."""
    panels = []
    for axes in figure.axes:
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        panels.append({str(d.get_color()): set(map(tuple, d.get_xydata())) for d in dots})
    return panels


def test_a_panel_for_each_cost_without_failed_jobs():
    by_tokens, by_speed, by_params = points(draw([*JOBS, FAILED]))
    assert by_tokens == {FRONT: {(96, 2.5), (160, 2.4)}, BEHIND: {(288, 2.42)}}
    assert by_speed == {FRONT: {(900, 2.5), (800, 2.4), (850, 2.42)}}
    assert by_params == {FRONT: {(10, 2.5), (20, 2.42), (30, 2.4)}}


def test_a_panel_that_would_tell_nothing_is_left_out():
    same = [job | {"num_params": 5} for job in JOBS]
    assert len(draw(same).axes) == 2
    silent = [job | {"tokens_per_second": None} for job in same]
    assert len(draw(silent).axes) == 1
    assert points(draw(JOBS[:1])) == [{FRONT: {(96, 2.5)}}]
    some = [silent[0], *same[1:]]
    assert points(draw(some))[1] == {FRONT: {(800, 2.4), (850, 2.42)}}


def test_labels_are_values_where_all_jobs_set_the_same_names():
    jobs = [
        job | {"overrides": ["s=1", f"a.n={job['job']}", f"b.w={i}"]} for i, job in enumerate(JOBS)
    ]
    assert labels(jobs) == ("n, w", ["0, 0", "1, 1", "2, 2"])
    jobs[2]["overrides"] = ["s=1", "model=dense"]
    assert labels(jobs) == ("", ["a.n=0, b.w=0", "a.n=1, b.w=1", "model=dense"])


def test_labels_overlap_neither_one_another_nor_a_point():
    jobs = []
    for n, w in product((0, 1, 4, 16), (8, 32, 128)):
        visible, speed = 16 * n + w + 0.0, 4000 - 8 * (16 * n + w) - n % 3
        jobs.append(row(len(jobs), 2.6 - 0.02 * len(jobs), visible, speed, 850 + (n > 0)))
        jobs[-1]["overrides"] = [f"num_selected_blocks={n}", f"sliding_window_size={w}"]
    figure = draw(jobs)
    assert len(figure.axes) == 3
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= 9  # of 12 points, some of which nearly coincide
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        for job, box in product(jobs, boxes):
            cost = ("visible_tokens", "tokens_per_second", "num_params")[figure.axes.index(axes)]
            x, y = axes.transData.transform((job[cost], job["val_bpb"]))
            assert not box.contains(x, y)


def test_ticks_keep_their_distance():
    assert apart([96.0, 96.0, 100.0, 110.0, 200.0]) == [96.0, 110.0, 200.0]
    assert len(apart([float(x) for x in range(8, 800)])) <= 9


# As Hydra calls it


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
      _target_: runs.sweep_report.SweepReport
"""


def launch(folder: Path, *arguments: str, **environment: str) -> forked_runs.Done:
    (folder / "app.py").write_text(APP)
    (folder / "app.yaml").write_text(CONFIG)
    app = "import runpy; runpy.run_path('app.py', run_name='__main__')"
    return forked_runs.python(app, *arguments, cwd=folder, environment=environment)


def test_what_hydra_writes_stands_even_where_the_sweep_ends_early(tmp_path):
    done = launch(tmp_path, "-m", "n=2,8,4")
    assert done.returncode == 1 and "eight" in done.stderr and "Callback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "sweep").glob("sweep.*")) == ["sweep.csv"]
    report = "import runpy; runpy.run_module('runs.sweep_report', run_name='__main__')"
    printed = forked_runs.python(report, str(tmp_path / "sweep")).stdout
    for line in ("| 0 | n=2 | **2.5000** |", "| 1 | n=8 | failed |", "| 2 | n=4 | **2.2500** |"):
        assert line in printed
    assert (tmp_path / "sweep" / "sweep.md").read_text() in printed
    assert (tmp_path / "sweep" / "sweep.png").exists()


def test_a_finished_sweep_prints_its_table(tmp_path):
    done = launch(tmp_path, "-m", "n=2,4")
    assert done.returncode == 0 and "| 1 | n=4 | **2.2500** |" in done.stdout


def test_single_runs_and_other_ranks_have_no_report(tmp_path):
    single = launch(tmp_path, "n=4")
    assert "bpb" not in single.stdout and "SweepReport" not in single.stderr
    assert launch(tmp_path, "-m", "n=4", LOCAL_RANK="1").returncode == 0
    assert not list(tmp_path.rglob("sweep.*"))
