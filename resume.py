"""Which run, and which of its checkpoints, a command line goes on from."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from checkpoints import FOLDER, newest_first

SWEEPS = "sweeps"  # the outputs of sweeps lie in here, two levels deep


def resume_arguments(arguments: Sequence[str], outputs: Path = Path("outputs")) -> list[str]:
    """Spell out what `ckpt_path=…` means, on the command line of the run that goes on.

    The run keeps its folder and the overrides it was started with; those typed now come after
    them. Arguments without `ckpt_path` come back as they are.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if a sweep is asked to resume.
    """
    overrides = [argument for argument in arguments if "=" in argument or argument[0] == "~"]
    typed = {key(argument): argument for argument in overrides}
    wanted = typed.get("ckpt_path", "ckpt_path=null").partition("=")[2].strip("'\"")
    if wanted in ("", "null"):
        return list(arguments)
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError(
            "ckpt_path and -m: a sweep cannot go on; resume one of its jobs by the path of its "
            "checkpoint, without -m"
        )
    checkpoint = find_last(outputs, typed) if wanted == "last" else Path(wanted).absolute()
    if not checkpoint.exists():
        raise FileNotFoundError(f"ckpt_path={wanted}: there is no such checkpoint")
    rest = [argument for argument in arguments if key(argument) != "ckpt_path"]
    resumed = [*rest, f"ckpt_path='{checkpoint}'"]
    run = run_folder(checkpoint)
    if run is None:
        return resumed
    before = [override for override in overrides_of(run) if not replaced(key(override), typed)]
    # Its .hydra stays as it is until nothing is refused any more: see remember.
    stay = {
        "hydra.run.dir": f"hydra.run.dir='{run}'",
        "hydra.output_subdir": "hydra.output_subdir=null",
    }
    return [*before, *resumed, *(stay[k] for k in stay if k not in typed)]


def key(override: str) -> str:
    """`attention.backend` of `+attention.backend=flex`."""
    return override.partition("=")[0].lstrip("+~")


def replaced(path: str, typed: Iterable[str]) -> bool:
    """Whether what was typed sets the value at `path`, or a whole node, no group, that holds it."""
    return any(path == other or ("." in other and path.startswith(f"{other}.")) for other in typed)


def overrides_of(run: Path) -> list[str]:
    """What the command line of a run overrode."""
    return [str(override) for override in OmegaConf.load(run / ".hydra" / "overrides.yaml")]


def remember(run: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Keep what a run goes on with, in place of what it was started with."""
    OmegaConf.save(cfg, run / ".hydra" / "config.yaml")
    OmegaConf.save(OmegaConf.create(list(overrides)), run / ".hydra" / "overrides.yaml")


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote `checkpoint`; None where it was moved out of it."""
    run = checkpoint.parent.parent
    inside = checkpoint.parent.name == FOLDER and (run / ".hydra" / "overrides.yaml").is_file()
    return run if inside else None


def find_last(outputs: Path, typed: Mapping[str, str]) -> Path:
    """The newest checkpoint under `outputs`, of runs that agree with the groups and name typed."""
    folders = [path for path in outputs.rglob(FOLDER) if newest_first(path)]
    own = [path.parent for path in folders if run_folder(path / "last.ckpt") is not None]
    single = [run for run in own if run.relative_to(outputs).parts[0] != SWEEPS]
    fitting = [run for run in single if agrees(run, typed)]
    if not fitting:
        have = ", ".join(sorted({run.parent.name for run in single})) or "none"
        raise FileNotFoundError(
            f"no run under {outputs.absolute()} holds a checkpoint and agrees with "
            f"what was typed (runs with checkpoints: {have}); give the path of a checkpoint instead"
        )
    newest = [newest_first(run / FOLDER)[0] for run in fitting]
    return max(newest, key=lambda path: path.stat().st_mtime_ns).absolute()


def agrees(run: Path, typed: Mapping[str, str]) -> bool:
    """Whether a run was composed of the groups (model=, data=, …) and the name typed now."""
    composed = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra.runtime.choices
    chosen = {str(group): f"{group}={choice}" for group, choice in composed.items()}
    chosen |= {key(override): override for override in overrides_of(run) if key(override) == "name"}
    asked = [typed[k] for k in typed if k in composed or k == "name"]
    return all(chosen.get(key(override)) == override for override in asked)


def check_same_run(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], sample_order: Mapping[str, int]
) -> None:
    """A resumed run keeps its model, its optimizer and its order of samples, or is refused.

    With another order it would see some samples twice and others never.

    Raises:
        ValueError: naming every value that differs.
    """
    stored = checkpoint["hyper_parameters"]
    free = {"model.name", "model.dropout", "model.attention.backend", "optimizer.fused"}
    before = {k: v for part in ("model", "optimizer") for k, v in flatten(stored[part], part)}
    now = {k: v for part in ("model", "optimizer") for k, v in flatten(settings[part], part)}
    changed = [k for k in before | now if k not in free and before.get(k) != now.get(k)]
    corpora = [part for part in checkpoint.values() if isinstance(part, Mapping)]
    order_before = next((c["sample_order"] for c in corpora if "sample_order" in c), {})
    before |= order_before
    now |= {name: sample_order[name] for name in order_before}
    changed += [name for name in order_before if before[name] != now[name]]
    if changed:
        lines = [f"  {k}={now.get(k)}, the checkpoint has {before.get(k)}" for k in changed]
        head = "a resumed run keeps its model, optimizer and order of samples:"
        raise ValueError("\n".join([head, *lines]))


def flatten(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """The leaves of nested dicts, each with its dotted path."""
    leaves = []
    for name, value in tree.items():
        path = f"{prefix}.{name}"
        leaves += flatten(value, path) if isinstance(value, Mapping) else [(path, value)]
    return leaves
