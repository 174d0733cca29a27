"""Do help, completion and the refusal of a mistyped key say enough, and without torch?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(("torch", "lightning", "wandb", "datasets"))  # importing them fails
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, text=True, capture_output=True
    )


@pytest.fixture(scope="module")
def config() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", return_hydra_config=True)


def test_help_shows_commands_groups_and_options() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("  python train.py")]
    assert len([line for line in commands if "--" not in line]) == 3
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra"}
    for group in groups:
        assert f"\n{group}: " in done.stdout
    assert '"$(python train.py -sc install=bash)"' in done.stdout


def test_every_option_in_the_help_exists_with_that_default(config: DictConfig) -> None:
    lines = [line.split() for line in config.hydra.help.template.splitlines()]
    options = [words[0].partition("=") for words in lines if words and "=" in words[0]]
    assert len(options) >= 15
    for name, _, value in options:
        if name in ("run_dir", "ckpt_path"):  # shown with a value to type
            assert name in config
        else:
            assert OmegaConf.select(config, name) == OmegaConf.from_dotlist([f"x={value}"]).x, name


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["model.nosuch=1"], "Key 'nosuch' is not in struct"),
        (["model=nope"], "Could not find 'model/nope'"),
    ],
)
def test_a_mistyped_key_is_refused_without_torch(typed: list[str], answer: str) -> None:
    done = run(*typed)
    assert done.returncode == 1
    assert answer in done.stderr


def test_completion_answers_without_torch() -> None:
    done = run("-sc", "query=bash", COMP_LINE="python train.py mod", COMP_POINT="19")
    assert done.returncode == 0, done.stderr
    assert "model=" in done.stdout
