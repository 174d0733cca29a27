"""Does a job of a sweep have a GPU of its own, and does the sweep outlive it?"""

import io
import json
import logging
import math
import multiprocessing
import os
import random
import sys
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import train
from nsa.config import NSAConfig
from runs import gpus, sweep, sweep_check
from runs.results import FIGURES
from runs.sweep_plot import pareto_front
from runs.sweep_report import read_csv

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0"]
BOTH = "hydra.sweeper.direction=[minimize,minimize]"
CONF = Path(__file__).parent.parent / "conf"
OF_OPTUNA = (  # 2.10.1 itself, under SQLAlchemy 2.1
    "ignore:NSGAIISampler is experimental",
    "ignore:.*declarative_base.* function is now available",
)
RESULT = {"val_bpb": 2.5, "test_bpb": 2.75, "visible_tokens": 96.0, "num_params": 900}
RESULT |= {"metric": "bpb", "better": "lower"}
RESULT |= {"tokens_per_second": 41.5, "steps": 3, "seconds": 1.25}


def composed(*overrides: str) -> DictConfig:
    """The whole config, `hydra` included, as Hydra has it while a job runs."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


@pytest.fixture(autouse=True)
def no_job_stays_behind() -> Any:
    yield
    HydraConfig.instance().cfg = None


# What the sweeper is told


@pytest.mark.parametrize("name", ["val_bpb", "test_bpb", *FIGURES])
def test_the_objective_is_what_result_json_holds_of_that_name(name: str) -> None:
    composed()
    assert sweep.score(RESULT, name) == sweep.score(RESULT, [name]) == RESULT[name]
    both = ["val_bpb", name]
    assert sweep.score(RESULT, both) == [2.5, RESULT[name]]
    for broken in (None, math.nan, math.inf):
        assert sweep.score(RESULT | {name: broken}, name) == math.inf
        assert sweep.score(RESULT | {name: broken}, both) == [math.inf, math.inf]


def test_the_worst_is_on_the_bad_side_of_each_direction() -> None:
    composed("hydra/sweeper=optuna", "hydra.sweeper.direction=maximize")
    assert sweep.score({"error": "why"}, "tokens_per_second") == -math.inf
    composed("hydra/sweeper=optuna", "hydra.sweeper.direction=[minimize,maximize]")
    values = sweep.score({"error": "why"}, ["val_bpb", "tokens_per_second"])
    assert values == [math.inf, -math.inf]


# What is refused before the first job


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=bpb"], "objective=bpb must be one or a list of val_bpb, test_bpb"),
        (["objective=[val_bpb,overrides]"], "must be one or a list of"),
        (["objective=[]"], "must be one or a list of"),
        (["objective=null"], "objective=None must be one or a list of"),
        (["trainer.devices=2"], r"trainer\.devices=2: a job of a sweep is one process"),
        (["trainer.devices=[0,1]"], r"add trainer\.devices=1"),
        (["trainer.devices=-1"], r"trainer\.devices=-1"),
        (["trainer.num_nodes=2"], "torchrun"),
        (["hparams_search=sparsity", "objective=val_bpb"], "one direction for each name"),
        ([*OPTUNA, "hydra.sweeper.direction=maximize"], "a lower bpb is better"),
        ([*OPTUNA, "objective=[val_bpb,steps]", BOTH], "the TPE sampler cannot go on"),
        (["hparams_search=sparsity", "hydra/launcher=joblib"], r"n_jobs=-1 must be at least 1"),
    ],
)
def test_what_no_job_could_run_with_is_refused_at_once(overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        sweep_check.SweepCheck().on_multirun_start(composed(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.devices=1"],
        ["trainer.devices=[3]"],
        ["objective=[val_bpb,num_params]"],
        ["hparams_search=sparsity"],
        ["hparams_search=sparsity_grid"],
        ["hparams_search=sparsity", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"],
        OPTUNA,
    ],
)
def test_what_can_run_is_not_refused(overrides: list[str]) -> None:
    sweep_check.SweepCheck().on_multirun_start(composed(*overrides))


def test_torchrun_may_give_a_job_many_processes_but_not_a_search(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    sweep_check.check(composed("trainer.devices=2"))
    with pytest.raises(ValueError, match="every rank would search by itself"):
        sweep_check.check(composed("hparams_search=sparsity"))


def test_one_number_of_jobs_at_once_serves_optuna_and_joblib() -> None:
    assert composed("hparams_search=sparsity").hydra.sweeper.n_jobs == 1
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=4")
    assert composed("hparams_search=sparsity", *joblib).hydra.sweeper.n_jobs == 4


@pytest.mark.parametrize("attention", ["paper", "short_1k", "tiny"])
def test_the_search_stays_within_the_sizes_that_are_valid(attention: str) -> None:
    cfg = composed("hparams_search=sparsity", f"attention={attention}")
    assert set(cfg.hydra.sweeper.params) == {
        "attention.num_selected_blocks",
        "attention.sliding_window_size",
        "attention.compress_block_sliding_stride",
    }
    sizes = {f.name: cfg.attention[f.name] for f in fields_of_config() if f.name in cfg.attention}
    for n, w, d in product((1, 16), (8, 128), (4, 8)):
        changed = {"num_selected_blocks": n, "sliding_window_size": w}
        NSAConfig(**sizes | changed | {"compress_block_sliding_stride": d})


def fields_of_config() -> Any:
    return NSAConfig.__dataclass_fields__.values()


# A job that fails


def refuse(cfg: DictConfig) -> Any:
    raise ValueError("windw=3 is not known\nlook it up")


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("build", "fit", "reason", "is_expected"),
    [
        (refuse, None, "windw=3 is not known", True),
        (raising(OSError("no disk")), None, "no disk", True),
        (raising(KeyError("a")), None, "KeyError: 'a'", False),
        (str, raising(FloatingPointError("the loss is nan")), "the loss is nan", True),
        (str, raising(torch.OutOfMemoryError("CUDA out of memory.")), "CUDA out of memory.", True),
        (str, raising(ValueError("a bug")), "ValueError: a bug", False),
        (str, raising(RuntimeError()), "RuntimeError:", False),
    ],
)
def test_a_failed_job_leaves_its_reason_and_counts_as_the_worst(
    tmp_path: Path, caplog, monkeypatch, build: Any, fit: Any, reason: str, is_expected: bool
) -> None:
    finished: list[str] = []
    monkeypatch.setattr(wandb, "finish", lambda: finished.append("run"))
    cfg = composed("trainer=cpu", f"run_dir={tmp_path}", "hydra.job.num=7")
    monkeypatch.setattr(sweep, "build", build)
    monkeypatch.setattr(sweep, "train", fit)
    with caplog.at_level(logging.ERROR):
        assert sweep.run_job(cfg) == math.inf
    (record,) = caplog.records
    assert record.getMessage() == f"job 7 failed: {reason}"
    assert bool(record.exc_info) != is_expected  # a traceback for what nobody foresaw
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"error": reason, "overrides": ["trainer=cpu", f"run_dir={tmp_path}"]}
    assert finished == ["run"]


def test_under_torchrun_a_failed_job_ends_the_process(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(sweep, "build", refuse)
    with pytest.raises(SystemExit):
        sweep.run_job(composed(f"run_dir={tmp_path}", "hydra.job.num=0"))


def test_a_sweep_is_not_kept_from_being_interrupted(tmp_path: Path, monkeypatch) -> None:
    def interrupt(cfg: DictConfig) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "build", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_job(composed("trainer=cpu", f"run_dir={tmp_path}"))


# Whole sweeps, without training


def stub(cfg: DictConfig) -> DictConfig:
    if cfg.attention.num_selected_blocks == 3:
        raise ValueError("three is one too many")
    return cfg


def stub_train(run: DictConfig, cfg: DictConfig) -> dict[str, Any]:
    visible = 16 * cfg.attention.num_selected_blocks + cfg.attention.sliding_window_size
    result = RESULT | {"val_bpb": 2 + 1 / visible, "visible_tokens": visible}
    Path(cfg.run_dir, "result.json").write_text(json.dumps(result))
    return result


@pytest.fixture
def launch(tmp_path: Path, monkeypatch) -> Any:
    """Runs `train.py -m …` in this process, with a stub of the training; the sweep's folder.

    A signal stays one to the tests: it would end whichever of them is running, and no other.
    """

    def run(*overrides: str) -> Path:
        folder = tmp_path / f"sweep{len(list(tmp_path.iterdir()))}"
        argv = [
            "train.py",
            "-m",
            "--config-path",
            str(CONF),
            *overrides,
            "trainer=cpu",
            f"hydra.sweep.dir={folder}",
        ]
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        monkeypatch.setattr(sys, "argv", [*argv, *quiet])
        train.main()
        return folder

    monkeypatch.setattr(train, "leave_on_signals", lambda: None)
    monkeypatch.setattr(sweep, "build", stub)
    monkeypatch.setattr(sweep, "train", stub_train)
    return run


def trials(folder: Path) -> list[tuple[str, str | None]]:
    """What each job was told of the search, and its error."""
    return [(" ".join(job["overrides"][:3]), job["error"]) for job in read_csv(folder)]


@pytest.mark.filterwarnings(*OF_OPTUNA)
def test_a_search_finds_the_front_and_outlives_a_failed_trial(launch: Any) -> None:
    search = ["hparams_search=sparsity", "hydra.sweeper.sampler.population_size=3"]
    search += ["attention.num_selected_blocks=choice(1,3,8)"]
    search += ["attention.sliding_window_size=choice(8,64)"]
    folder = launch(*search, "hydra.sweeper.n_trials=6", "seed=3")
    tried = trials(folder)
    bad = [error for overrides, error in tried if "blocks=3" in overrides]
    good = [error for overrides, error in tried if "blocks=3" not in overrides]
    assert set(bad) == {"three is one too many"} and set(good) == {None}
    found = OmegaConf.load(folder / "optimization_results.yaml").solutions
    front = pareto_front(read_csv(folder), "visible_tokens")
    expected = {(job["val_bpb"], job["visible_tokens"]) for job in front}
    assert {tuple(solution["values"]) for solution in found} == expected
    others = [launch(*search, "hydra.sweeper.n_trials=3", f"seed={seed}") for seed in (3, 1)]
    assert [trials(other) == tried[:3] for other in others] == [True, False]


@pytest.mark.filterwarnings(*OF_OPTUNA)
@pytest.mark.parametrize(("objective", "best"), [("val_bpb", 8), ("visible_tokens", 1)])
def test_a_search_for_one_number_finds_that_number(launch: Any, objective: str, best: int) -> None:
    grid = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
    folder = launch(*grid, f"objective={objective}", "attention.num_selected_blocks=choice(1,3,8)")
    found = OmegaConf.load(folder / "optimization_results.yaml")
    assert found.best_params["attention.num_selected_blocks"] == best


@pytest.mark.filterwarnings(*OF_OPTUNA)
@pytest.mark.parametrize("sweeper", [[], [*OPTUNA, "hydra.sweeper.n_trials=2"]])
def test_a_sweep_whose_jobs_all_failed_has_an_exit_code(launch: Any, sweeper: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"no job of .* has a result"):
        launch("attention.num_selected_blocks=choice(3,3)", *sweeper)


def test_a_grid_goes_on_after_a_failed_job(launch: Any) -> None:
    folder = launch("hparams_search=sparsity_grid", "attention.num_selected_blocks=3,4")
    errors = [job["error"] for job in read_csv(folder)]
    assert errors == ["three is one too many"] * 3 + [None] * 3


def test_many_processes_are_refused_before_any_job(launch: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a job of a sweep is one process"):
        launch("attention.num_selected_blocks=1,2", "trainer.devices=2")
    assert not list(tmp_path.iterdir())


def test_many_processes_are_refused_in_a_job_that_asks_for_them_itself(
    tmp_path: Path, caplog
) -> None:
    asked = ("trainer=cpu", "trainer.devices=2", "logger=csv", f"run_dir={tmp_path}")
    job = ("hydra.mode=MULTIRUN", "hydra.job.num=0", f"hydra.runtime.output_dir={tmp_path}")
    cfg = composed(*asked, *job)
    assert sweep.run_job(cfg) == math.inf
    assert "trainer.devices=2: a job of a sweep is one process" in caplog.text


# GPUs


def hold(folder: Path, results: Any, job: int) -> None:
    """What a worker process does: jobs of unequal length, each with a GPU."""
    lengths = random.Random(job)
    for _ in range(3):
        with gpus.free_gpu({0: "a", 1: "b"}, folder, poll_seconds=0.005) as number:
            begun = time.monotonic()
            time.sleep(lengths.uniform(0.01, 0.05))
            results.put((number, begun, time.monotonic()))


def test_two_jobs_never_share_a_gpu(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    workers = [fork.Process(target=hold, args=(tmp_path, results, job)) for job in range(4)]
    for worker in workers:
        worker.start()
    held = [results.get(timeout=60) for _ in range(12)]
    for worker in workers:
        worker.join()
    for number in (0, 1):
        times = sorted((begun, ended) for gpu, begun, ended in held if gpu == number)
        assert len(times) > 1
        assert all(first[1] <= second[0] for first, second in pairwise(times))
    beginnings = [any(b < begun < e for _, b, e in held) for _, begun, _ in held]
    assert any(beginnings)  # both were in use at once


def die(folder: Path) -> None:
    with gpus.free_gpu({0: "a"}, folder):
        os._exit(9)


def test_the_gpu_of_a_job_that_died_is_free(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=die, args=(tmp_path,))
    worker.start()
    worker.join()
    assert worker.exitcode == 9
    with gpus.free_gpu({0: "a"}, tmp_path) as number:
        assert number == 0


@pytest.fixture
def host(tmp_path: Path, monkeypatch) -> None:
    """A machine with three GPUs, the first of which is taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda number: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpus, "visible", lambda: {0: "a", 1: "b", 2: "c"})
    monkeypatch.setattr(gpus, "lock_folder", lambda: tmp_path)


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        ([], [1]),
        (["trainer=gpu"], [1]),
        (["trainer.devices=1"], [1]),
        (["trainer.devices=[2]"], [2]),
        (["trainer=cpu"], 1),
        (["trainer.devices=2"], 2),  # left as it is: build refuses it
    ],
)
def test_a_job_takes_a_free_gpu_and_gives_it_back(
    host: None, overrides: list[str], devices: Any
) -> None:
    trainer = composed(*overrides).trainer
    with gpus.free_gpu({0: "a"}), sweep.one_gpu(trainer):
        assert trainer.devices == devices
        with gpus.free_gpu({1: "b", 2: "c"}) as other:
            assert [other] != devices
    with gpus.free_gpu({0: "a"}), gpus.free_gpu({1: "b"}), gpus.free_gpu({2: "c"}):
        pass  # all are free again, or this would wait


def test_without_a_gpu_nothing_is_locked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "lock_folder", lambda: tmp_path)
    trainer = composed().trainer
    with sweep.one_gpu(trainer):
        assert trainer.devices == "auto"
    assert not list(tmp_path.iterdir())


# With joblib


def test_lines_of_a_job_among_others_bear_its_number() -> None:
    terminal = io.StringIO()
    stream = sweep.NumberedLines(3, terminal)
    assert not stream.isatty()
    print("step", 1, file=stream)
    print("a\nb", end="", file=stream)
    print("c", file=stream)
    assert terminal.getvalue() == "#3 step 1\n#3 a\n#3 bc\n"
