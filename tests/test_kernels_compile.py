"""Every kernel compiles for GPUs that are not here, and custom ops behave under torch.compile."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch
from kernel_inputs import DEVICE
from torch.utils.checkpoint import checkpoint

from nsa import kernels
from nsa.config import NSAConfig

CFG = NSAConfig(
    sliding_window_size=8, compress_block_size=8, compress_block_sliding_stride=4,
    selection_block_size=8, num_selected_blocks=2, num_local_blocks=1,
)  # fmt: skip


COMPILED = Path(__file__).parents[1] / ".triton-cache"
ALL = {"select_kernel", "attend_dkv_kernel", "merge_kernel", "sum_partials_kernel", "weigh_kernel"}
SELECT = "--arch 90 --dim 64 --heads 8/2 --kernel select"


TARGETS = {  # command lines of the probe, and what each must have printed
    "sm_90": (["--arch 90 --dim 128 --brief"], ALL),
    "sm_80": (["--arch 80 --dim 64 --heads 8/2 --brief"], ALL),
    "few blocks and many": (
        [f"{SELECT} --sizes 8/4/16/{n}/64" for n in (2, 32)],
        {"select_kernel", "registers"},
    ),
}
PROGRAM = f"""
from benchmarks.probes import compile_kernels as probe
for name, (targets, _) in {TARGETS}.items():
    print("target", name)
    for words in targets:
        assert probe.main(words.split()) == 0, words
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    """What the probe prints of each target, in a process whose kernels are not interpreted.

    What compiled before is kept from one run of the tests to the next, as Triton keeps it: by
    source, options and compiler.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(COMPILED)}
    env |= {"TRITON_DISABLE_LINE_INFO": "1"}  # line numbers would take a seventh of the time
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    printed = (part.split("\n", 1) for part in run.stdout.split("target ")[1:])
    return {name: lines for name, lines in printed}


@pytest.mark.timeout(600)  # two minutes where two cores are free
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile(name: str, compiled: dict[str, str]) -> None:
    targets, kernels = TARGETS[name]
    assert compiled[name].count("largest shared memory") == len(targets)
    assert all(kernel in compiled[name] for kernel in kernels), compiled[name]


def test_no_kernel_has_text_for_a_default():
    """Triton 3.6, the oldest that pyproject.toml allows, compiles no function that has."""
    found = 0
    for name in (name for name in sys.modules if name.startswith("nsa.kernels.")):
        for kernel in vars(sys.modules[name]).values():
            function = getattr(kernel, "fn", None)
            if function is not None and hasattr(function, "__code__"):
                found += 1
                texts = [x for x in function.__defaults__ or () if isinstance(x, str)]
                assert not texts, f"{name}.{function.__name__}: {texts}"
    assert found > 20


def test_ops_are_what_pytorch_takes_them_for():
    """Nothing mutated, true fake shapes, gradients that can be traced."""
    q, k, v = (x.contiguous() for x in inputs()[:3])
    angles, new = torch.randn(12, 8, device=DEVICE), partial(torch.randn, device=DEVICE)
    starts = torch.tensor([[0] * 8 + [8] * 4], dtype=torch.int32, device=DEVICE)
    for op, arguments in (
        (torch.ops.nsa.attend_tiles, (q, k, v, None, None, "band", True, 8, 1, 0)),
        (torch.ops.nsa.attend_tiles, (q, k, v, None, starts, "band", True, 8, 1, 0)),
        (torch.ops.nsa.rotate, (q, angles, False)),
        (torch.ops.nsa.block_means, (k, 6, 4)),
        (torch.ops.nsa.attention_pool, (k, new(16, 16), new(6, 16), new(1, 6, 16), 4)),
    ):
        torch.library.opcheck(op.default, arguments)


def layer(q, k, v, k_cmp, v_cmp, gates):
    compressed, lse = kernels.compressed_attention(q, k_cmp, v_cmp, CFG)
    indices = kernels.select_blocks(q, k_cmp, lse, CFG)
    importance = kernels.selected_importance(q, k_cmp, lse, indices, CFG)
    straight = 1 + importance - importance.detach()
    chosen = kernels.selected_attention(q, k, v, indices, CFG, straight)
    sliding = kernels.sliding_window_attention(q, k, v, CFG)
    return kernels.combine(gates, compressed, chosen, sliding)


def inputs() -> list[torch.Tensor]:
    shapes = [(1, 12, 2, 16), *[(1, 12, 1, 16)] * 2, *[(1, 2, 1, 16)] * 2, (1, 12, 2, 3)]
    return [torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in shapes]


def test_whole_graph_and_checkpointing(monkeypatch):
    """torch.compile sees one graph, checkpointing recomputes it: same values, same gradients."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its wrappers don't trace
    x = inputs()
    want = layer(*x)
    grads = torch.autograd.grad(want.square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda *x: checkpoint(layer, *x, use_reentrant=False)):
        got = run(*x)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.square().sum(), x), grads, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_decides_the_dtype():
    """Under autocast float32 queries meet 16-bit keys, as after a norm or a rotation."""
    q, k, v, *_ = (x.detach() for x in inputs())
    with torch.autocast(DEVICE, torch.float16):
        out = kernels.sliding_window_attention(q, k.half(), v.half(), CFG)
    assert out.dtype == torch.float16
    torch.testing.assert_close(
        out.float(), kernels.sliding_window_attention(q, k, v, CFG), atol=2e-2, rtol=2e-2
    )
