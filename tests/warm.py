"""Imports and first calls of a run, done once by the process that tests fork their runs from."""

import gc
import importlib
from pathlib import Path

from hydra.core.plugins import Plugins

from runs import command_line

ROOT = Path(__file__).parent.parent

for folder in ("callbacks", "data", "runs"):
    for path in sorted((ROOT / folder).rglob("[!_]*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
Plugins.instance()  # finds the sweepers and launchers
command_line.compose({}, [])
gc.freeze()  # no fork looks through, and so copies, what all of them share
