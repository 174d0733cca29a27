"""What a run keeps of the command line it was started with, in its .hydra, and what of it holds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from runs import command_line, ranks
from runs.command_line import PATHS, Flags, Typed
from runs.folder import CHECKPOINTS, write_text


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote `checkpoint`; None where it was moved out of it."""
    run = checkpoint.parent.parent
    inside = checkpoint.parent.name == CHECKPOINTS and (run / ".hydra" / "overrides.yaml").is_file()
    return run if inside else None


def overrides_of(run: Path) -> list[str]:
    """What the command line of a run overrode."""
    return [str(override) for override in OmegaConf.load(run / ".hydra" / "overrides.yaml")]


def hydra_of(run: Path) -> Any:
    """What Hydra was told to do in a run."""
    return OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra


def overrides_before(checkpoint: Path, flags: Flags, typed: Typed) -> list[str]:
    """What the run of a checkpoint overrode and still holds besides what was typed now.

    What no longer fits, as an option of a callback that `callbacks=none` dropped, is named.
    """
    run = run_folder(checkpoint)
    if run is None:
        return []
    former = command_line.parse(overrides_of(run))
    kept = [o for o in former if not replaced(command_line.key_of(o), {*typed, *PATHS})]
    before = [str(override.input_line) for override in kept]
    try:
        now = [str(override.input_line) for override in typed.values()]
        _, unfit = command_line.compose(flags, [*before, *now])
    except HydraException:
        return before
    for override in before:
        if override in unfit:
            ranks.say(
                f"dropped {override} of the run's own options: it does not fit what was typed"
            )
    return [override for override in before if override not in unfit]


def flags_before(checkpoint: Path) -> dict[str, str | bool]:
    """Where the run of a checkpoint took its configs from, besides conf/."""
    run = run_folder(checkpoint)
    if run is None or not (run / ".hydra" / "hydra.yaml").is_file():
        return {}
    return flags_of(hydra_of(run))


def flags_of(hydra: Any) -> dict[str, str | bool]:
    """The flags that Hydra was given to take configs from elsewhere than conf/."""
    sources = OmegaConf.select(hydra, "runtime.config_sources") or []
    typed = [source.path for source in sources if source.provider == "command-line"]
    flags: dict[str, str | bool] = {"config_dir": typed[0]} if typed else {}
    name = OmegaConf.select(hydra, "job.config_name") or command_line.CONFIG
    return flags if name == command_line.CONFIG else flags | {"config_name": name}


def replaced(path: str, typed: Iterable[str]) -> bool:
    """Whether what was typed sets the value at `path`, or a whole node, no group, that holds it."""
    return any(path == other or ("." in other and path.startswith(f"{other}.")) for other in typed)


def remember(run: Path, cfg: DictConfig, hydra: Any) -> None:
    """Keep what a run goes on with, in place of what it was started with."""
    write_text(run / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    write_text(run / ".hydra" / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra})))
    write_text(run / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(hydra.overrides.task))
