"""Is `pip install .` the library: all of it, and nothing that its dependencies do not name?"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ONE_STEP = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    '''Finds no package of the trainer's, as if they were not installed.'''

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        lacking = name.partition(".")[0] in {missing}
        return None if lacking else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
sys.path.insert(0, {installed!r})
import torch
import nsa
from nsa import SparseAttention

assert nsa.__file__.startswith({installed!r}), nsa.__file__
attend = SparseAttention(
    dim=16, dim_head=8, heads=2, kv_heads=1, sliding_window_size=4, compress_block_size=4,
    compress_block_sliding_stride=2, selection_block_size=4, num_selected_blocks=2,
)
optimizer = torch.optim.SGD(attend.parameters(), lr=0.1)
tokens = torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0))
before = attend(tokens).square().mean()
before.backward()
optimizer.step()
after = attend(tokens).square().mean()
assert after < before, (before, after)
"""


def import_name(requirement: str) -> str:
    return re.split(r"[\s<>=!~;\[]", requirement)[0].replace("-", "_")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tracked files, unpacked where nothing else is."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheel", "site"))
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("benchmarks/", "tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(wheels)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.glob("*.whl")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    subprocess.run([sys.executable, *install, wheel], check=True)
    return target


def test_the_wheel_is_the_library_alone(installed: Path) -> None:
    (about,) = installed.glob("nsa_pretrain-*.dist-info")
    assert sorted(path.name for path in installed.iterdir() if path != about) == ["nsa"]
    sources = {p.relative_to(ROOT) for p in (ROOT / "nsa").rglob("*.py")}
    assert {p.relative_to(installed) for p in (installed / "nsa").rglob("*.py")} == sources
    assert (installed / "nsa" / "py.typed").is_file()
    assert (about / "licenses" / "LICENSE").is_file()


def test_the_library_trains_without_the_trainers_packages(installed: Path) -> None:
    extras = [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    missing = {import_name(name) for name in extras} - {"nsa_pretrain"}
    missing -= {"filelock", "setuptools"}  # which torch brings
    missing |= {"hydra", "omegaconf", "pytorch_lightning"}
    code = ONE_STEP.format(missing=missing, installed=str(installed))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=installed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_library_imports_only_its_dependencies() -> None:
    allowed = {import_name(name) for name in PROJECT["dependencies"]} | {"nsa"}
    allowed |= sys.stdlib_module_names
    for path in (ROOT / "nsa").rglob("*.py"):
        if "training" in path.parts:  # needs the extra
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path} imports {name}"
