"""Which module may import which: the arrows point down, and this file keeps them so."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STACK = {"lightning", "hydra", "omegaconf", "wandb", "datasets", "transformers", "tokenizers"}
DOORS = ("train", "generate", "export", "evaluate")
FLOORS = (  # from the roof down: a module imports lower floors and its own package
    ("benchmarks",),
    DOORS,
    ("runs",),
    ("callbacks", "data", "nsa.training"),
    ("nsa",),
    ("nsa.transformer", "nsa.testing", "nsa.probe"),
    ("nsa.cost",),
    ("nsa.transformer_block",),
    ("nsa.sampling", "nsa.probe_tile"),
    ("nsa.step_graph",),
    ("nsa.layer_kinds",),
    ("nsa.attention",),
    ("nsa.twins",),
    ("nsa.twin_decoding",),
    ("nsa.dense",),
    ("nsa.decoding", "nsa.branches", "nsa.layer"),
    ("nsa.cpu_step",),
    ("nsa.heads", "nsa.cache", "nsa.gates", "nsa.options"),
    ("nsa.compress_networks", "nsa.selection"),
    ("nsa.compress_transformers",),
    ("nsa.ops",),
    ("nsa.backends", "nsa.op_checks"),
    ("nsa.reference", "nsa.kernels", "nsa.flex", "nsa.local"),
    ("nsa.pooling", "nsa.rotary"),
    ("nsa.blocks", "nsa.documents"),
    ("nsa.config", "runs.folder", "runs.file_lock"),
    ("nsa.importance", "nsa.plugins"),
)
STRANGERS = (  # on one floor or on two, and yet they never meet
    ("data", "nsa"),
    ("data", "callbacks"),
    ("nsa.reference", "nsa.kernels"),
    ("nsa.reference", "nsa.flex"),
    ("nsa.reference", "triton"),
    *(("nsa", package) for package in sorted(STACK - {"lightning"})),
    ("data", "wandb"),
)


def modules() -> dict[str, Path]:
    """Every module of the project but its tests, by dotted name."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    kept = [path for path in paths if path.parts[0] not in ("tests", "docs")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in kept}


@cache
def imports(path: Path) -> set[str]:
    """What a file imports; of `from a import b` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def row(name: str) -> tuple[int, str]:
    """The floor a module is on, 0 at the top, and its row there: the longest that fits."""
    rows = [(len(part), floor, part) for floor, parts in enumerate(FLOORS) for part in parts]
    fitting = [(floor, part) for _, floor, part in sorted(rows) if within(name, part)]
    assert fitting, f"{name} has no row in FLOORS"
    assert fitting[-1][1] != "nsa" or name == "nsa", f"{name} has no row of its own in FLOORS"
    return fitting[-1]


MODULES = modules()


@cache
def graph() -> dict[str, set[str]]:
    """What of the project each module imports."""
    return {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_imported_from_above(name: str) -> None:
    floor, part = row(name)
    for other in graph()[name]:
        if other != "nsa":  # the package that `from nsa import ops` names too
            below, other_part = row(other)
            assert below > floor or other_part == part, f"{name} imports {other}"


def test_the_root_holds_doors_alone() -> None:
    assert {name for name, path in MODULES.items() if len(path.parts) == 1} <= set(DOORS)


def test_no_module_imports_itself_by_way_of_others() -> None:
    packages = {
        "nsa",
        "nsa.kernels",
        "nsa.training",
        "runs",
        "data",
        "callbacks",
        "benchmarks",
        "benchmarks.probes",
    }
    inner = {name: others - packages for name, others in graph().items() if name not in packages}
    TopologicalSorter(inner).prepare()  # raises CycleError


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_strangers_never_meet(one: str, other: str) -> None:
    for name, path in MODULES.items():
        for mine, theirs in ((one, other), (other, one)):
            if within(name, mine):
                met = [found for found in imports(path) if within(found, theirs)]
                assert not met, f"{name} imports {met[0]}"


def test_only_training_knows_lightning() -> None:
    library = [name for name in MODULES if within(name, "nsa")]
    knowing = [n for n in library if any(within(i, "lightning") for i in imports(MODULES[n]))]
    assert "nsa.training.lightning_module" in knowing
    assert all(within(name, "nsa.training") for name in knowing), knowing


def test_importing_nsa_brings_in_no_training_stack() -> None:
    check = f"import sys, nsa; print(sorted({STACK} & set(sys.modules)))"
    command = [sys.executable, "-c", check]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
