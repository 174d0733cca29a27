"""Which options have a value of another kind than they take, as text in place of a number."""

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from runs import command_line
from runs.record import flags_of

Built = TypeVar("Built")

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a group of options",
    type(None): "null",
}


def naming_odd_options(build: Callable[[DictConfig], Built]) -> Callable[[DictConfig], Built]:
    """Have `build` name the options of another kind, where one of them ended it in a TypeError."""

    @wraps(build)
    def named(cfg: DictConfig) -> Built:
        try:
            return build(cfg)
        except (TypeError, AttributeError, InstantiationException) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) else error
            if not isinstance(cause, TypeError | AttributeError):
                raise
            if lines := list(differing(*now_and_by_default(cfg), "")):
                raise ValueError("\n".join(lines)) from error
            raise

    return named


def now_and_by_default(cfg: DictConfig) -> tuple[Any, Any]:
    """A run's config, and what its groups made of it before any value was set."""
    hydra = HydraConfig.get()
    defaults = command_line.defaults(flags_of(hydra), list(hydra.overrides.task))
    return OmegaConf.to_container(cfg, resolve=True), OmegaConf.to_container(defaults)


def differing(now: Any, before: Any, path: str) -> Iterator[str]:
    """A line for each value of another kind than its default, at a path and below it.

    A default of null or auto is that of an option of more kinds than one, and is not compared.
    Null drops a part: a callback, a logger.
    """
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        for name, value in now.items():
            inner = f"{path}.{name}" if path else str(name)
            if name in before:
                yield from differing(value, before[name], inner)
            else:
                yield f"{inner}={value} is not among the options of {path or 'a run'}"
    elif now is None and isinstance(before, Mapping):
        return
    elif KINDS[type(now)] != KINDS[type(before)] and not open_to_all(before):
        yield f"{path}={'null' if now is None else now} must be {KINDS[type(before)]}"


def open_to_all(default: Any) -> bool:
    """Whether a default says nothing of what else an option takes; interpolations are resolved."""
    return default in (None, "auto") or (isinstance(default, str) and "${" in default)
