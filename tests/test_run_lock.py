"""Two runs never share a folder, and one that cannot be written ends the program at once."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import Timeout
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from runs import gpus
from runs.file_lock import NamedLock, held
from runs.lock import RunLock

setup_globals()  # ${now:…}

TAKE = """
import sys
from omegaconf import OmegaConf
import runs.lock
runs.lock.PATIENCE = 0.1
runs.lock.RunLock().on_run_start(OmegaConf.create({"hydra": {"run": {"dir": sys.argv[1]}}}))
"""


def config(folder: Path) -> OmegaConf:
    places = {"run": {"dir": str(folder)}, "sweep": {"dir": str(folder)}}
    return OmegaConf.create({"hydra": places})


def taken_elsewhere(folder: Path) -> str:
    """What another process says that wants the folder too; "" if it gets it."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", TAKE, str(folder)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stderr


def test_a_folder_is_one_runs_until_its_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    lock = RunLock()
    lock.on_run_start(config(folder))
    assert f"run folder {folder} is taken" in taken_elsewhere(folder)
    lock._lock.release()
    assert taken_elsewhere(folder) == ""


def test_a_sweep_takes_its_folder_too(tmp_path: Path) -> None:
    lock = RunLock()
    lock.on_multirun_start(config(tmp_path))
    assert "is taken" in taken_elsewhere(tmp_path)


def test_a_folder_that_cannot_be_written_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"cannot be written \(Not a directory\): name another"):
        RunLock().on_run_start(config(tmp_path / "file" / "run"))


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
def test_other_ranks_leave_the_lock_to_rank_zero(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    RunLock().on_run_start(config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_the_clock_names_is_a_new_one(tmp_path: Path) -> None:
    taken = []
    for _ in range(3):
        cfg = OmegaConf.create(
            {"hydra": {"sweep": {"dir": f"{tmp_path}/${{now:%Y}}"}, "overrides": {"hydra": []}}}
        )
        RunLock().on_multirun_start(cfg)
        taken.append(Path(cfg.hydra.sweep.dir).name)
        assert all(taken[-1] in word for word in cfg.hydra.overrides.hydra)  # its jobs are told
    assert [name.partition("_")[2] for name in taken] == ["", "2", "3"]


@pytest.fixture(params=["ENOSYS", "ENOLCK"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some file systems that several machines share."""

    def flock(*_: object) -> None:
        raise OSError(getattr(errno, request.param), "no such lock here")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_flock_a_lock_is_a_file_that_says_whose_it_is(
    tmp_path: Path, no_flock: None, caplog
) -> None:
    path = tmp_path / "a.lock"
    with held(path):
        assert path.read_text().split()[:2] == [str(os.getpid()), socket.gethostname()]
    assert not path.exists()
    for content, holder in (("7\nnode9\n", "process 7 on node9"), ("", "a process that left no")):
        path.write_text(content)
        with pytest.raises(Timeout):
            NamedLock(path).acquire(0.1)
        assert f"waiting for {holder}" in caplog.text and f"holds {path}" in caplog.text


def test_who_waits_says_for_whom(tmp_path: Path, caplog) -> None:
    path = tmp_path / "a.lock"
    with held(path), pytest.raises(Timeout):
        NamedLock(path).acquire(0.1)
    here = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"waiting for {here}, which holds {path}" in caplog.text


def test_a_gpu_is_waited_for_by_name_without_flock_too(
    tmp_path: Path, no_flock: None, caplog
) -> None:
    gpu = tmp_path / "a.lock"
    gpu.write_text("7\nnode9\n")
    with gpus.free_gpu({0: "a", 1: "b"}, tmp_path) as number:
        assert number == 1
    threading.Timer(0.05, gpu.unlink).start()  # as whoever reads the message does
    with gpus.free_gpu({0: "a"}, tmp_path, poll_seconds=0.01) as number:
        assert number == 0
    assert f"waiting for process 7 on node9, which holds {gpu}" in caplog.text
