"""What was typed, as Hydra understands it: its flags, its overrides, and the config they make."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.utils import setup_globals
from hydra.errors import ConfigCompositionException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

PROGRAM = Path(__file__).parents[1] / "train.py"
CONFIG = "train"  # conf/train.yaml
PATHS = ("ckpt_path", "resume", "run_dir")  # overrides whose value is a path, whatever signs it has
INFO = ("-i", "--info")  # the flag whose value may be left out
ONLY_SHOWN = ("help", "hydra_help", "info", "shell_completion", "experimental_rerun")

Flags = Mapping[str, str | bool]  # config_dir -> X, of --config-dir X
Typed = Mapping[str, Override]  # optimizer.lr -> optimizer.lr=3e-4


class CommandLine(NamedTuple):
    """Hydra's flags, and the overrides in the order they were typed."""

    flags: Flags
    overrides: list[str]

    def words(self) -> list[str]:
        """As Hydra reads it in one go: flags first, none of which takes an override for a value."""
        flags = [spelled(flag, value) for flag, value in self.flags.items()]
        # Hydra's help on itself composes its own config alone, in which nothing of ours fits.
        return flags if "hydra_help" in self.flags else [*flags, *self.overrides]

    def asks_for_words(self) -> bool:
        """Whether nothing of a run is asked for: help, information, or another command line."""
        return any(flag in self.flags for flag in ONLY_SHOWN)


def spelled(flag: str, value: str | bool) -> str:
    """`--multirun`, `--config-dir=X`."""
    name = "--" + flag.replace("_", "-")
    return name if value is True else f"{name}={value}"


def read(words: Sequence[str]) -> CommandLine:
    """Flags and overrides, however they were mixed.

    Raises:
        ValueError: for a word that is empty, or an option written as a flag.
        SystemExit: for a flag that Hydra does not have; after --version.
    """
    parser = get_args_parser()
    flags = parser._option_string_actions
    for word in words:
        name, equals, _ = word.partition("=")
        if word[:2] == "--" and equals and not any(flag.startswith(name) for flag in flags):
            raise ValueError(
                f"{word}: options are written without hyphens, as {word.lstrip('-')}; in the file "
                "of a W&B sweep, ${args_no_hyphens} stands for them"
            )
    choices = next(action.choices for action in parser._actions if action.dest == "info") or ()
    pairs = zip(words, [*words[1:], ""], strict=True)
    words = ["--info=all" if w in INFO and after not in choices else w for w, after in pairs]
    typed = vars(parser.parse_intermixed_args(words))
    overrides = [with_plain_path(word) for word in typed.pop("overrides")]
    return CommandLine({flag: value for flag, value in typed.items() if value}, overrides)


def with_plain_path(override: str) -> str:
    """The override, its value quoted where it is a path that Hydra's grammar cannot read."""
    if not override.strip():
        raise ValueError(
            f"{override!r} is not an option: write key=value. An empty word is often a variable of "
            "the shell that is not set"
        )
    key, _, value = override.partition("=")
    if key not in PATHS:
        return override
    try:
        readable = not parse([override])[0].is_sweep_override()
    except OverrideParseException:
        readable = False
    return override if readable else f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """A text as the value of an override, to be taken as it is."""
    return QuotedString(text.replace("${", "\\${"), Quote.single).with_quotes()


def parse(overrides: Iterable[str]) -> list[Override]:
    """Overrides by Hydra's grammar.

    Raises:
        OverrideParseException: for a word that it cannot read.
    """
    return OverridesParser.create().parse_overrides(list(overrides))


def key_of(override: Override) -> str:
    """What an override sets: a value by its path, a group, or a group somewhere else (a@b)."""
    key, package = override.key_or_group, override.package
    return key if package is None else f"{key}@{package}"


def compose(flags: Flags, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The config of a single run, `hydra` included, and the overrides that do not fit into it.

    Raises:
        HydraException: if a group or a file is not there.
    """
    setup_globals()
    loader = config_loader(flags)
    name = str(flags.get("config_name", CONFIG))
    try:
        return loader.load_configuration(name, list(overrides), RunMode.RUN), []
    except ConfigCompositionException:
        pass  # which of them, is asked one by one
    groups, values = groups_and_values(loader, overrides)
    config = loader.load_configuration(name, groups, RunMode.RUN)
    return config, [str(value.input_line) for value in values if not applied(value, config)]


def settle_mode(mode: RunMode | None) -> None:
    """Tell Hydra what the config says of sweeping; it would compose it once more to find out."""
    Hydra.get_mode = lambda self, config_name, overrides: mode


def defaults(flags: Flags, overrides: Sequence[str]) -> DictConfig:
    """The config that the groups among the overrides make, before any value is set."""
    setup_globals()
    loader = config_loader(flags)
    groups, _ = groups_and_values(loader, overrides)
    name = str(flags.get("config_name", CONFIG))
    return loader.load_configuration(name, groups, RunMode.RUN)


def groups_and_values(
    loader: ConfigLoaderImpl, overrides: Sequence[str]
) -> tuple[list[str], list[Override]]:
    """The overrides that choose which files make the config, and those that set values in it."""
    groups, values = [], []
    for override in parse(overrides):
        key = override.key_or_group
        if loader.repository.group_exists(key) or key == "hydra.searchpath":
            groups.append(str(override.input_line))
        else:
            values.append(override)
    return groups, values


def config_loader(flags: Flags) -> ConfigLoaderImpl:
    """Looks where `hydra.main` looks under these flags."""
    folder = str(flags.get("config_path", "conf"))
    search_path = create_automatic_config_search_path(str(PROGRAM), None, folder)
    if "config_dir" in flags:
        place = f"file://{Path(str(flags['config_dir'])).absolute()}"
        search_path.prepend("command-line", place, SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def applied(override: Override, config: DictConfig) -> bool:
    """Set one value in a config; False where there is no place for it."""
    parent = override.key_or_group.rpartition(".")[0]
    if override.is_add() and parent and OmegaConf.select(config, parent) is None:
        root = override.key_or_group.partition(".")[0]
        if root in config:  # a group's entry that is not there: only a part of it would be
            return False
    try:
        ConfigLoaderImpl._apply_overrides_to_config([override], config)
    except ConfigCompositionException:
        return False
    return True
