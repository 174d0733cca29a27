"""Which part may import which: the arrows point down, and this file keeps them so."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STACK = {"lightning", "hydra", "omegaconf", "wandb", "datasets", "transformers", "tokenizers"}
ENTRIES = {"train", "generate", "checkpoints", "resume", "strategies"}
APPLICATION = {*ENTRIES, "data", "callbacks", "tests", "benchmarks"}
ABOVE = {  # each module of the tower may import the ones below it only
    "config": {"blocks", "reference", "kernels", "flex", "local", "ops", "attention"},
    "blocks": {"reference", "kernels", "flex", "local", "ops", "attention"},
    "reference": {"kernels", "flex", "local", "ops", "attention", "compress_networks"},
    "kernels": {"reference", "flex", "local", "ops", "attention", "compress_networks"},
    "flex": {"reference", "kernels", "local", "ops", "attention", "compress_networks"},
    "local": {"reference", "kernels", "flex", "ops", "attention", "compress_networks"},
    "compress_networks": {"reference", "kernels", "flex", "local", "ops", "attention"},
    "pooling": {"reference", "kernels", "flex", "local", "ops", "attention", "compress_networks"},
    "ops": {"attention", "compress_networks"},
    "attention": {"reference", "kernels", "flex", "local"},
    "transformer": {"ops", "reference", "kernels", "flex", "local", "parallel"},
}
FORBIDDEN = {
    **{
        f"nsa/{part}": {f"nsa.{other}" for other in others}
        | ({"nsa.transformer"} if part != "transformer" else set())
        for part, others in ABOVE.items()
    },
    "nsa/reference": {"triton", *(f"nsa.{other}" for other in ABOVE["reference"])},
    "nsa": {*APPLICATION, *(STACK - {"lightning"})},
    "data": {"nsa", "callbacks", "tests", "wandb", *ENTRIES},
    "callbacks": {"data", "tests", "wandb", *ENTRIES},
}


def files(part: str) -> list[Path]:
    folder = ROOT / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_nothing_is_imported_from_above(part: str) -> None:
    for path in files(part):
        for name in imports(path):
            banned = [b for b in FORBIDDEN[part] if name == b or name.startswith(f"{b}.")]
            assert not banned, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_lightning_module_imports_lightning() -> None:
    knowing = [path.stem for path in files("nsa") if any("lightning" in n for n in imports(path))]
    assert set(knowing) <= {"lightning_module"}


def test_importing_nsa_brings_in_no_training_stack() -> None:
    check = f"import sys, nsa; print(sorted({STACK} & set(sys.modules)))"
    command = [sys.executable, "-c", check]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
