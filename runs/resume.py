"""Which run a command line means, and which of its checkpoints it goes on from.

    ckpt_path=last             the newest run that agrees with what was typed
    run_dir=outputs/mine       this folder: begun, or gone on with if it holds checkpoints
    resume=PATH                this checkpoint, or the newest whole one of this run folder

`arguments` spells that out before Hydra starts, in plain overrides, so that every process which
Lightning starts with the same command line goes on from the same checkpoint in the same folder.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from runs.folder import CHECKPOINTS, newest_first, write_text

SWEEPS = "sweeps"  # the outputs of sweeps lie in here, two levels deep
HOW = ("trainer", "callbacks", "logger")  # groups that may change where a run goes on
WHERE = ("ckpt_path", "resume", "run_dir")  # overrides that name a run, not what it does
MODES = ("auto", "never")  # of resume; anything else is a path


class Wanted(NamedTuple):
    """What a command line says of the run it means; None for what it leaves open."""

    ckpt_path: str | None
    resume: str
    run_dir: Path | None


def arguments(typed_arguments: Sequence[str], outputs: Path = Path("outputs")) -> list[str]:
    """The command line with the run spelled out: its folder, its checkpoint, its overrides.

    A run that goes on keeps the overrides it was started with; those typed now come after them.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        ValueError: if what was typed contradicts itself, if no checkpoint of the run is whole, if
            a sweep is asked to resume, or if several processes were started without a `run_dir`.
    """
    overrides = [word for word in typed_arguments if "=" in word or word[0] == "~"]
    typed = {key(override): override for override in overrides}
    wanted = what_is_wanted(typed)
    if {"-m", "--multirun"} & set(typed_arguments):
        if any(name in typed for name in WHERE):
            raise ValueError(
                f"{' '.join(typed[name] for name in WHERE if name in typed)} and -m: a sweep "
                "makes its own folders and cannot go on; resume one of its jobs by the path of its "
                "checkpoint, without -m"
            )
        return list(typed_arguments)
    rest = [word for word in typed_arguments if key(word) not in WHERE]
    checkpoint = find_checkpoint(wanted, outputs, typed)
    folder = wanted.run_dir or (checkpoint and run_folder(checkpoint))
    if folder is None and "hydra.run.dir" not in typed and rank() is not None:
        raise ValueError(
            "several processes were started from outside (torchrun, srun) and must share one run "
            "folder: name it, as in run_dir=outputs/mine"
        )
    if checkpoint is None:
        return [*rest, *hydra_options(folder, typed, goes_on=False)]
    before = [o for o in overrides_before(checkpoint) if not replaced(key(o), {*typed, *WHERE})]
    goes_on = folder == run_folder(checkpoint)
    there = f"ckpt_path='{checkpoint}'"
    return [*before, *rest, there, *hydra_options(folder, typed, goes_on=goes_on)]


def what_is_wanted(typed: Mapping[str, str]) -> Wanted:
    """The values of ckpt_path, resume and run_dir, refused where they contradict one another."""
    values = {name: value_of(typed[name]) for name in WHERE if name in typed}
    ckpt_path = values.get("ckpt_path", "null")
    ckpt_path = None if ckpt_path in ("", "null") else ckpt_path
    resume = values.get("resume", "auto")
    if ckpt_path is not None and resume != "auto":
        raise ValueError(
            f"ckpt_path={ckpt_path} and resume={resume}: both say where to go on from; give one"
        )
    folder = values.get("run_dir", "")
    run_dir = Path(folder).absolute() if folder else None
    if ckpt_path == "last" and run_dir is not None:
        raise ValueError(
            f"ckpt_path=last and run_dir={folder}: the one looks for a run, the other names it; "
            "leave ckpt_path out to go on in the folder"
        )
    return Wanted(ckpt_path, resume, run_dir)


def find_checkpoint(wanted: Wanted, outputs: Path, typed: Mapping[str, str]) -> Path | None:
    """The checkpoint to go on from; None where the run begins."""
    named = wanted.resume if wanted.resume not in MODES else wanted.ckpt_path
    if named == "last":
        return newest_whole(find_last(outputs, typed))
    if named is not None:
        path = Path(named).absolute()
        if (path / CHECKPOINTS).is_dir():
            return newest_whole(path)
        if not path.exists():
            raise FileNotFoundError(f"{named}: there is no such checkpoint or run folder")
        return path
    if wanted.run_dir is None or not newest_first(wanted.run_dir / CHECKPOINTS):
        return None
    if wanted.resume == "never":
        raise ValueError(
            f"run_dir={wanted.run_dir} holds checkpoints, which resume=never would write over: "
            "name another folder, delete this one, or leave resume=never out to go on in it"
        )
    return newest_whole(wanted.run_dir)


def newest_whole(run: Path) -> Path:
    """The newest checkpoint of a run that is whole; those passed over are named.

    Raises:
        ValueError: if none is; says what is wrong with each.
    """
    from runs.checkpoints import find_fault  # torch: only where a run really goes on

    faults = []
    for checkpoint in newest_first(run / CHECKPOINTS):
        fault = find_fault(checkpoint)
        if fault is None:
            for passed_over in faults:
                print(f"passed over {passed_over}; going on from {checkpoint}", file=sys.stderr)
            return checkpoint
        faults.append(f"{checkpoint}: {fault}")
    raise ValueError(
        "\n  ".join([f"no checkpoint of {run} is whole:", *faults])
        + "\nto begin again, name another run_dir or delete this one"
    )


def hydra_options(folder: Path | None, typed: Mapping[str, str], *, goes_on: bool) -> list[str]:
    """Where Hydra puts its files, as overrides that the command line does not hold yet."""
    options = {}
    if folder is not None:
        options["hydra.run.dir"] = f"'{folder}'"
    if goes_on or rank():
        # A run that goes on keeps its .hydra until nothing is refused any more: see remember.
        options["hydra.output_subdir"] = "null"
    if rank():
        options["hydra.job.name"] = f"train_rank_{rank()}"  # and so its log file
    return [f"{name}={value}" for name, value in options.items() if name not in typed]


def rank() -> int | None:
    """The global rank of a process that torchrun or srun started beside others; None if alone."""
    for number, of in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if number in os.environ and int(os.environ.get(of, 1)) > 1:
            return int(os.environ[number])
    return None


def key(override: str) -> str:
    """`attention.backend` of `+attention.backend=flex`."""
    return override.partition("=")[0].lstrip("+~")


def value_of(override: str) -> str:
    """`outputs/mine` of `run_dir='outputs/mine'`."""
    return override.partition("=")[2].strip("'\"")


def overrides_before(checkpoint: Path) -> list[str]:
    """What the command line of the checkpoint's run overrode; nothing where it was moved out."""
    run = run_folder(checkpoint)
    return [] if run is None else overrides_of(run)


def replaced(path: str, typed: Iterable[str]) -> bool:
    """Whether what was typed sets the value at `path`, or a whole node, no group, that holds it."""
    return any(path == other or ("." in other and path.startswith(f"{other}.")) for other in typed)


def overrides_of(run: Path) -> list[str]:
    """What the command line of a run overrode."""
    return [str(override) for override in OmegaConf.load(run / ".hydra" / "overrides.yaml")]


def remember(run: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Keep what a run goes on with, in place of what it was started with."""
    write_text(run / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    write_text(run / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote `checkpoint`; None where it was moved out of it."""
    run = checkpoint.parent.parent
    inside = checkpoint.parent.name == CHECKPOINTS and (run / ".hydra" / "overrides.yaml").is_file()
    return run if inside else None


def find_last(outputs: Path, typed: Mapping[str, str]) -> Path:
    """The run under `outputs` with the newest checkpoint, of those that agree with what was typed.

    Only the groups (model=, data=, …) and the name count.
    """
    folders = [path for path in outputs.rglob(CHECKPOINTS) if newest_first(path)]
    own = [path.parent for path in folders if run_folder(path / "last.ckpt") is not None]
    single = [run for run in own if run.relative_to(outputs).parts[0] != SWEEPS]
    fitting = [run for run in single if agrees(run, typed)]
    if not fitting:
        have = ", ".join(sorted({run.parent.name for run in single})) or "none"
        raise FileNotFoundError(
            f"no run under {outputs.absolute()} holds a checkpoint and agrees with "
            f"what was typed (runs with checkpoints: {have}); give the path of a checkpoint instead"
        )
    newest = {run: newest_first(run / CHECKPOINTS)[0].stat().st_mtime_ns for run in fitting}
    return max(newest, key=newest.__getitem__).absolute()


def agrees(run: Path, typed: Mapping[str, str]) -> bool:
    """Whether a run was composed of the groups (model=, data=, …, but HOW) and the name typed."""
    composed = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra.runtime.choices
    chosen = {str(group): f"{group}={choice}" for group, choice in composed.items()}
    chosen |= {key(override): override for override in overrides_of(run) if key(override) == "name"}
    asked = [typed[k] for k in typed if (k in composed and k not in HOW) or k == "name"]
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
    free = {"model.name", "model.dropout", "model.attention.backend"}
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
