"""Do the blocks of README and guides run as they stand, and do the files they name exist?"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/long_runs.md",
    "docs/sweeps.md",
    "docs/benchmarks.md",
)
PAGES += ("docs/paper_in_code.md", "docs/evaluation.md", "docs/data.md")
TOOLS = ("source", "pip", "make", "torchrun", "sbatch", "pre-commit", "git", "lm_eval")
MAKES = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PLACES = ("ckpt_path", "resume", "run_dir")  # answered before Hydra starts


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def commands(page: str) -> list[list[str]]:
    """The words of every line that can be typed, without comments."""
    shell = [text for language, text in blocks(page) if language in ("", "bash")]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).exists()])
def test_python_blocks_run(page: str) -> None:
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), {"__name__": "readme"})


@pytest.fixture(scope="module")
def configs() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def composes(words: list[str]) -> None:
    typed = [word for word in words if "=" in word and not word.startswith(PLACES)]
    overrides = []
    for override in OverridesParser.create().parse_overrides(typed):
        first = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
        key = override.key_or_group
        overrides.append(f"{key}={first}" if first is not None else override.input_line or "")
    compose("train", overrides=overrides, return_hydra_config=True)


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).exists()])
def test_every_command_can_be_typed(page: str, configs: None) -> None:
    for words in commands(page):
        if "train.py" in words:
            composes([word for word in words[words.index("train.py") + 1 :] if "…" not in word])
        elif words[0] == "make":
            assert words[1] in MAKES, words
        elif words[0] == "python" and words[1] == "-m":
            module = words[2].replace(".", "/")
            assert any((ROOT / f"{module}{end}").exists() for end in (".py", "/__init__.py")) or (
                words[2] == "pytest"
            ), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "sbatch":
            assert (ROOT / words[1]).is_file(), words
            composes(words[2:])
        else:
            assert words[0] in TOOLS, words


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).exists()])
def test_every_file_a_page_names_exists(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    for link in links:
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} | {
        ".ci",
        ".github",
    }
    for quoted in re.findall(r"`([^`\s]+)`", text):
        first, slash, _ = quoted.partition("/")
        if slash and first in top - {"data"} and not re.search(r"[=<>*…]", quoted):
            assert (ROOT / quoted).exists(), f"{page} names {quoted}"


def test_the_overrides_that_the_guide_shows_compose(configs: None) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = [typed for typed in re.findall(r"`([^`\n]+=[^`\n]+)`", text) if "mine" in typed]
    assert len(shown) >= 3
    for typed in shown:
        composes(shlex.split(typed))
