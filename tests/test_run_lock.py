"""Two runs never share a folder, and one that cannot be written ends the program at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runs.lock import RunLock

TAKE = """
import sys
from omegaconf import OmegaConf
from runs.lock import RunLock
RunLock().on_run_start(OmegaConf.create({"hydra": {"run": {"dir": sys.argv[1]}}}))
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
