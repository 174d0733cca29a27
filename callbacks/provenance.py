"""What it takes to repeat a run, written into its folder before training starts."""

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

from runs.folder import leaves_files, run_folder, write_json, write_text

PROJECT = Path(__file__).resolve().parent.parent


class Provenance(Callback):
    """Writes config.yaml, command.txt, versions.json, git.json and diff.patch into the run folder.

    config.yaml is the config that Hydra recorded, with every interpolation resolved (absent where
    the run was not started through Hydra). git.json names the commit and the untracked files,
    which no diff shows, or says why there is no commit; diff.patch is what was changed since it,
    and is absent if nothing was. A run that goes on writes the same files to resume_1, resume_2, …
    and leaves the first ones alone. Idle under `fast_dev_run`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not leaves_files(trainer):
            return
        run = run_folder(trainer)
        folder = vacant(run)
        if (recorded := run / ".hydra" / "config.yaml").exists():
            config = OmegaConf.load(recorded)
            write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        write_text(folder / "command.txt", f"cd {shlex.quote(os.getcwd())}\n{command()}\n")
        write_json(folder / "git.json", git_state(PROJECT))
        if patch := git(PROJECT, "diff", "HEAD", "--binary")[0]:
            write_text(folder / "diff.patch", patch)
        write_json(folder / "versions.json", versions())  # last: it marks the folder as taken


def vacant(run: Path) -> Path:
    """The run folder itself, or the first resume_<n> in it that holds no provenance yet."""
    folder, n = run, 0
    while (folder / "versions.json").exists():
        n += 1
        folder = run / f"resume_{n}"
    return folder


def command() -> str:
    """The command line, quoted for a shell; for a job of a sweep, one that runs this job alone."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        overrides = HydraConfig.get().overrides.task
        return shlex.join([sys.executable, str(PROJECT / "train.py"), *overrides])
    return shlex.join([sys.executable, *sys.orig_argv[1:]])


def versions() -> dict[str, Any]:
    """Python, platform, devices, and every installed package."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": packages(),
    }


@cache
def packages() -> dict[str, str]:
    """The version of every installed package, by name: half a second of reading."""
    found = {dist.metadata["Name"]: dist.version for dist in distributions()}
    return dict(sorted(found.items(), key=lambda package: package[0].lower()))


def git(folder: Path, *arguments: str) -> tuple[str, str]:
    """What a git command prints, and why it failed if it did (then nothing is printed)."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        return "", "git is not installed"
    if done.returncode:
        return "", (done.stderr.strip() or f"git {arguments[0]} failed").splitlines()[0]
    return done.stdout, ""


def git_state(folder: Path) -> dict[str, Any]:
    """Commit, branch and untracked files, or the reason why there is no commit to name."""
    commit, error = git(folder, "rev-parse", "HEAD")
    if error:
        return {"commit": None, "error": error}
    return {
        "commit": commit.strip(),
        "branch": git(folder, "rev-parse", "--abbrev-ref", "HEAD")[0].strip(),
        "changed": bool(git(folder, "diff", "HEAD", "--name-only")[0]),
        "untracked": git(folder, "ls-files", "--others", "--exclude-standard")[0].splitlines(),
    }
