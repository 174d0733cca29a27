"""Which module may import which: the arrows point down, and this file keeps them so."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STACK = {"lightning", "hydra", "omegaconf", "wandb", "datasets", "transformers", "tokenizers"}
DOORS = ("train", "generate", "export", "evaluate")
FLOORS = (  # from the roof down: a module imports lower floors and its own package
    ("benchmarks",),
