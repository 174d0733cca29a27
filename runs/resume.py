"""Which run a command line means, and which of its checkpoints it goes on from.

    ckpt_path=last             the newest run that agrees with what was typed
    run_dir=outputs/mine       this folder: begun, or gone on with if it holds checkpoints
    resume=PATH                this checkpoint, or the newest whole one of this run folder

`arguments` spells that out before Hydra starts, in plain overrides, so that every process which
Lightning starts with the same command line goes on from the same checkpoint in the same folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runs import command_line, ranks
from runs.command_line import PATHS, Typed, quoted
from runs.folder import CHECKPOINTS, named_by_the_clock, newest_first
from runs.record import flags_before, hydra_of, overrides_before, overrides_of, run_folder

SWEEPS = "sweeps"  # the outputs of sweeps lie in here, two levels deep
HOW = ("trainer", "callbacks", "logger")  # groups that may change where a run goes on
MODES = ("auto", "never")  # of resume; anything else is a path
NEW = "${hydra:runtime.output_dir}"  # run_dir where nobody named one: Hydra's own folder


class Wanted(NamedTuple):
    """What a command line says of the run it means; None for what it leaves open."""

    ckpt_path: str | None
    resume: str
    run_dir: Path | None


def arguments(words: Sequence[str], outputs: Path = Path("outputs")) -> list[str]:
    """The command line with the run spelled out: its folder, its checkpoint, its overrides.

    A run that goes on keeps the overrides it was started with; those typed now come after them.
    What Hydra cannot read or compose is left to it to refuse.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        ValueError: if what was typed contradicts itself, if no checkpoint of the run is whole, if
            a sweep is asked to resume, or if several processes were started without a `run_dir`.
    """
    line = command_line.read(words)
    if line.asks_for_words():
        return line.words()
    try:
        typed = {command_line.key_of(o): o for o in command_line.parse(line.overrides)}
        config, _ = command_line.compose(line.flags, line.overrides)
    except HydraException:
        return line.words()
    command_line.settle_mode(config.hydra.mode)
    if "multirun" in line.flags or config.hydra.mode == RunMode.MULTIRUN:
        refuse_to_resume_a_sweep(typed)
        return line.words()
    if "cfg" not in line.flags:
        refuse_search(config)
    wanted = what_is_wanted(config)
    checkpoint = find_checkpoint(wanted, outputs, typed)
    folder = wanted.run_dir or (checkpoint and run_folder(checkpoint))
    if folder is None:
        refuse_to_share_no_folder()
    places = where(folder, typed, goes_on=bool(checkpoint and folder == run_folder(checkpoint)))
    own = [key for key in typed if key not in PATHS and key not in places]
    rest = [str(typed[key].input_line) for key in own]
    options = [f"{name}={value}" for name, value in places.items()]
    if checkpoint is None:
        return line._replace(overrides=[*rest, *options]).words()
    flags = {**flags_before(checkpoint), **line.flags}
    before = overrides_before(checkpoint, flags, {key: typed[key] for key in own})
    there = f"ckpt_path={quoted(str(checkpoint))}"
    return command_line.CommandLine(flags, [*before, *rest, there, *options]).words()


def refuse_to_resume_a_sweep(typed: Typed) -> None:
    if named := [str(typed[name].input_line) for name in PATHS if name in typed]:
        raise ValueError(
            f"{' '.join(named)} and -m: a sweep makes its own folders and cannot go on; resume one "
            "of its jobs by the path of its checkpoint, without -m"
        )


def refuse_search(config: DictConfig) -> None:
    """Refuse a search without -m, which would silently train one default model."""
    search = config.hydra.runtime.choices.get("hparams_search")
    if search not in (None, "null"):
        raise ValueError(
            f"hparams_search={search} says what a sweep tries, and one run tries nothing: add -m, "
            "or leave it out"
        )


def refuse_to_share_no_folder() -> None:
    if ranks.given() is not None:
        raise ValueError(
            "several processes were started from outside (torchrun, srun) and must share one run "
            "folder: name it, as in run_dir=outputs/mine"
        )


def what_is_wanted(config: DictConfig) -> Wanted:
    """The values of ckpt_path, resume and run_dir, refused where they contradict one another."""
    HydraConfig.instance().set_config(config)
    try:
        run_dir = named_folder(config)
        ckpt_path, resume = config.ckpt_path or None, config.resume or "auto"
    finally:
        HydraConfig.instance().cfg = None
    if ckpt_path is not None and resume != "auto":
        raise ValueError(
            f"ckpt_path={ckpt_path} and resume={resume}: both say where to go on from; give one"
        )
    if ckpt_path == "last" and run_dir is not None:
        raise ValueError(
            f"ckpt_path=last and run_dir={run_dir}: the one looks for a run, the other names it; "
            "leave ckpt_path out to go on in the folder"
        )
    return Wanted(ckpt_path, str(resume), run_dir)


def named_folder(config: DictConfig) -> Path | None:
    """The folder that run_dir or hydra.run.dir names; None where Hydra makes a new one."""
    if unresolved(config)["run_dir"] not in (NEW, None, ""):
        return absolute(config.run_dir)
    is_new = named_by_the_clock(unresolved(config.hydra.run)["dir"])
    return None if is_new else absolute(config.hydra.run.dir)


def unresolved(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


def absolute(path: Any) -> Path:
    return Path(str(path)).expanduser().absolute()


def find_checkpoint(wanted: Wanted, outputs: Path, typed: Typed) -> Path | None:
    """The checkpoint to go on from; None where the run begins."""
    named = wanted.resume if wanted.resume not in MODES else wanted.ckpt_path
    run = wanted.run_dir
    begun = run is not None and bool(newest_first(run / CHECKPOINTS))
    if named == "last":
        return newest_whole(find_last(outputs, typed))
    checkpoint = None if named is None else named_checkpoint(named)
    if run is None or not begun or (checkpoint and checkpoint.parent == run / CHECKPOINTS):
        return checkpoint
    if wanted.resume == "never":
        raise ValueError(
            f"run_dir={run} holds checkpoints, which resume=never would write over: "
            "name another folder, delete this one, or leave resume=never out to go on in it"
        )
    newest = newest_whole(run)
    if checkpoint is not None:
        ranks.say(f"{run} has branched off already: going on from {newest}, not {named}")
    return newest


def named_checkpoint(named: str) -> Path:
    """A checkpoint; of a run folder, or of a folder of checkpoints, the newest that is whole."""
    path = absolute(named)
    if (path / CHECKPOINTS).is_dir():
        return newest_whole(path)
    if newest_first(path):
        return newest_whole_in(path)
    if not path.exists():
        raise FileNotFoundError(f"{named}: there is no such checkpoint or run folder")
    return path


def newest_whole(run: Path) -> Path:
    """The newest checkpoint of a run that is whole; those passed over are named.

    Raises:
        ValueError: if none is; says what is wrong with each.
    """
    return newest_whole_in(run / CHECKPOINTS)


def newest_whole_in(folder: Path) -> Path:
    """As `newest_whole`, of a folder of checkpoints."""
    from runs.checkpoint_faults import find_fault  # torch: only where a run really goes on

    faults = []
    for checkpoint in newest_first(folder):
        fault = find_fault(checkpoint)
        if fault is None:
            for passed_over in faults:
                ranks.say(f"passed over {passed_over}; going on from {checkpoint}")
            return checkpoint
        faults.append(f"{checkpoint}: {fault}")
    raise ValueError(
        "\n  ".join([f"no checkpoint of {folder.parent} is whole:", *faults])
        + "\nto begin again, name another run_dir or delete this one"
    )


def where(folder: Path | None, typed: Typed, *, goes_on: bool) -> dict[str, str]:
    """Where the run and Hydra put their files, as values of overrides."""
    places = {}
    if folder is not None:
        places |= {"run_dir": quoted(str(folder)), "hydra.run.dir": quoted(str(folder))}
    if goes_on or ranks.given():
        # A run that goes on keeps its .hydra until nothing is refused any more: see remember.
        places["hydra.output_subdir"] = "null"
    if ranks.given() and "hydra.job.name" not in typed:
        places["hydra.job.name"] = f"train_rank_{ranks.given()}"  # and so its log file
    return places


# The newest run


def find_last(outputs: Path, typed: Typed) -> Path:
    """The run under `outputs` that saved last, of those that agree with what was typed.

    Only the groups (model=, data=, …) and the name count.
    """
    from runs.checkpoints import saved_at  # torch, as above

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
    newest = {run: saved_at(newest_first(run / CHECKPOINTS)[0]) for run in fitting}
    return max(newest, key=newest.__getitem__).absolute()


def agrees(run: Path, typed: Typed) -> bool:
    """Whether a run was composed of the groups (model=, data=, …, but HOW) and the name typed."""
    choices = hydra_of(run).runtime.choices
    chosen = {str(group): choice for group, choice in choices.items() if group not in HOW}
    former = command_line.parse(overrides_of(run))
    chosen |= {"name": next((o.value() for o in former if o.key_or_group == "name"), None)}
    return all(typed[key].value() == chosen[key] for key in typed if key in chosen)
