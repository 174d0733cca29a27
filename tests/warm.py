"""Imports and first calls of a run, done once by the process that tests fork their runs from."""

import gc
import importlib
import io
import os
from functools import partial
from pathlib import Path

import datasets  # noqa: F401 (with pandas, two seconds of each run that reads by it)
import torch
from hydra.core.plugins import Plugins

from callbacks.attention_statistics import draw_gates
from callbacks.provenance import packages
from runs import command_line

gc.disable()  # what is imported stays
# A fork makes PyTorch's pool of threads anew when it is first asked for. Ask here, in whatever is
# forked from this process: two threads that ask at once find none ("Invalid thread pool").
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
ROOT = Path(__file__).parent.parent

for folder in ("callbacks", "data", "runs"):
    for path in sorted((ROOT / folder).rglob("[!_]*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import vectorised_interpreter

    vectorised_interpreter.install()
Plugins.instance()  # finds the sweepers and launchers
command_line.compose({}, [])
draw_gates({0: [0.5, 0.5, 0.5]}, 1).savefig(io.BytesIO())  # loads fonts
packages()
gc.freeze()  # no fork looks through, and so copies, what all of them share
gc.enable()
