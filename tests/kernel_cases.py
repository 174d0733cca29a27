"""Cases for every kernel and gradient at real sizes, judged by `nsa.testing`.

    python tests/kernel_cases.py "17 tokens"

test_kernels_gpu.py runs every case in a process of its own, so that one that fails, hangs or breaks
the GPU's context costs only itself. A number behind an output's name is its error over its budget.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

import nsa.kernels as kernels
from nsa import blocks, pooling, reference, rotary
from nsa.branches import gated_attention
from nsa.config import NSAConfig
from nsa.documents import document_starts
from nsa.heads import Projected
from nsa.kernels.block_order import inverted_lists
from nsa.rotary import Rotary
from nsa.testing import by_descriptor, judge, judge_selection, loop_order

PAPER = dict(
    sliding_window_size=512, compress_block_size=32, compress_block_sliding_stride=16,
    selection_block_size=64, num_selected_blocks=16,
)  # fmt: skip
SMALL = dict(
    sliding_window_size=64, compress_block_size=8, compress_block_sliding_stride=4,
    selection_block_size=16, num_selected_blocks=8,
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU only rehearses float32 cases
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One set of sizes for every op."""

    B: int
    T: int
    H: int
    G: int
    D: int
    DV: int
    dtype: torch.dtype = BF16
    sizes: dict = field(default_factory=dict)
    per_head: bool = False
    logits: float = 1.0  # a factor on the queries
    memories: int = 0
    documents: tuple[int, ...] = ()  # lengths of those that share each row; none: one
    described: bool = True  # tiles by descriptor where sizes and GPU allow it
    # Partial results of a chunk: least, most.
    chunk_bytes: tuple[int, int] = inverted_lists.PARTIAL_BYTES

    @property
    def cfg(self) -> NSAConfig:
        return NSAConfig(**self.sizes)

    @property
    def told(self) -> dict[str, Tensor]:
        """What ops are told of documents, each of which starts where a block does."""
        if not self.documents:
            return {}
        block = self.cfg.selection_block_size
        taken = [-(-length // block) * block for length in self.documents]
        borders = torch.tensor([[0, *taken]] * self.B, device=DEVICE).cumsum(1)
        return {"document_starts": document_starts(borders, self.T)}


def small(**changes) -> dict:
    return SMALL | changes


CASES = {
    "paper 16/1 D128": Case(2, 1000, 16, 1, 128, 128, sizes=PAPER),
    "llama 8/2 D128": Case(1, 1000, 8, 2, 128, 128, sizes=PAPER | dict(num_selected_blocks=5)),
    "gqa 8/4 D64": Case(2, 1000, 8, 4, 64, 64, sizes=PAPER, memories=2),
    "gqa 8/4 D64 by address": Case(
        2, 1000, 8, 4, 64, 64, sizes=PAPER, memories=2, described=False
    ),
    "paper 16/1 D128 by address": Case(1, 1000, 16, 1, 128, 128, sizes=PAPER, described=False),
    "half the tokens a chunk": Case(1, 1000, 8, 4, 64, 64, sizes=PAPER, chunk_bytes=(2**21, 2**21)),
    "3 of 8 heads a chunk": Case(
        2, 1000, 8, 4, 64, 64, sizes=PAPER, chunk_bytes=(13 * 2**20, 13 * 2**20)
    ),
    "mha 4/4 D128": Case(1, 1000, 4, 4, 128, 128, sizes=PAPER | dict(num_selected_blocks=6)),
    "small 8/2 D64": Case(2, 1024, 8, 2, 64, 64, sizes=SMALL),
    "long 4/2 D64": Case(1, 8192, 4, 2, 64, 64, sizes=PAPER),
    "fp16 6/2 D80/48 acausal": Case(
        1, 500, 6, 2, 80, 48, FP16, small(causal=False), memories=1
    ),
    "fp32 8/2 D64": Case(1, 500, 8, 2, 64, 64, FP32, SMALL, memories=1),
    "fp32 4/2 D128/64 acausal": Case(1, 200, 4, 2, 128, 64, FP32, small(causal=False)),
    "fp32 2/1 D256": Case(1, 300, 2, 1, 256, 256, FP32, PAPER | dict(num_selected_blocks=3)),
    "deepseek 16/1 D192/128": Case(1, 500, 16, 1, 192, 128, sizes=PAPER),
    "wide 4/2 D256": Case(1, 500, 4, 2, 256, 256, sizes=PAPER | dict(num_selected_blocks=4)),
    "one token": Case(2, 1, 8, 4, 64, 64, sizes=SMALL),
    "17 tokens": Case(2, 17, 8, 4, 64, 64, sizes=PAPER),
    "100 tokens R3 D16": Case(2, 100, 6, 2, 16, 16, sizes=SMALL),
    "logits +-100": Case(1, 600, 8, 4, 64, 64, FP16, SMALL, logits=30.0),
    "per head, logit mean": Case(
        1, 600, 8, 2, 64, 64, sizes=small(importance="logit_mean"), per_head=True
    ),
    "blocks of 128": Case(
        1, 900, 8, 2, 128, 128, sizes=PAPER | dict(selection_block_size=128, num_selected_blocks=3)
    ),
    "documents 16/1 D128": Case(
        2, 1000, 16, 1, 128, 128, sizes=PAPER, documents=(1, 31, 32, 63, 64, 65, 300)
    ),
    "documents 8/4 D64, memories": Case(
        2, 1000, 8, 4, 64, 64, sizes=PAPER | dict(num_selected_blocks=5), memories=70,
        documents=(500, 17), described=False,
    ),
    "documents long 4/2 D64": Case(
        1, 8192, 4, 2, 64, 64, sizes=PAPER, documents=(1000, 3000, 100), memories=1
    ),
    "documents, one": Case(1, 1000, 8, 4, 64, 64, sizes=PAPER, documents=(1000,)),
    "documents per head, logit mean": Case(
        1, 600, 8, 2, 64, 64, sizes=small(importance="logit_mean"), per_head=True,
        documents=(100, 7, 8, 17, 15),
    ),
    "documents fp32 2/1 D64": Case(
        1, 200, 2, 1, 64, 64, FP32, small(num_selected_blocks=3), memories=3, documents=(7, 60, 33)
    ),
    "documents of 8, a thousand": Case(
        1, 8000, 2, 1, 64, 64, sizes=small(selection_block_size=8), documents=(8,) * 1000
    ),
    "odd sizes": Case(
        1, 700, 4, 1, 64, 64, sizes=dict(
            sliding_window_size=1, compress_block_size=20, compress_block_sliding_stride=16,
            selection_block_size=48, num_selected_blocks=5, num_local_blocks=1,
        ),
    ),
}  # fmt: skip

FAILED: list[str] = []  # checks of this process


# ---- checks ------------------------------------------------------------


def draw(case: Case) -> dict[str, Tensor]:
    """Random float64 inputs that the case's dtype holds exactly."""
    B, T, H, G, D, DV = case.B, case.T, case.H, case.G, case.D, case.DV
    C, M = blocks.num_compress_blocks(T, case.cfg), case.memories
    shapes = {
        "q": (B, T, H, D), "k": (B, T, G, D), "v": (B, T, G, DV),
        "k_cmp": (B, C, G, D), "v_cmp": (B, C, G, DV),
        "mem_k": (G, M, D), "mem_v": (G, M, DV),
    }  # fmt: skip
    torch.manual_seed(0)
    drawn = {
        name: torch.randn(*shape, dtype=torch.float64, device=DEVICE)
        for name, shape in shapes.items()
    }
    drawn["q"] *= case.logits
    return {name: x.to(case.dtype).double() for name, x in drawn.items()}


def attempt(name: str, check: Callable[[], object]) -> None:
    """Print one line, whatever happens."""
    begin = time.time()
    try:
        line = check()
    except Exception as error:
        line = f"FAIL {type(error).__name__}: {str(error)[:300]}"
    if "FAIL" in str(line):
        FAILED.append(name)
    print(f"  {name:22s} {line}  ({time.time() - begin:.1f} s)", flush=True)


def check_case(case: Case) -> None:
    cfg, told, x = case.cfg, case.told, draw(case)

    def compare(name: str, op: Callable, oracle: Callable, inputs: Sequence, names: str) -> None:
        attempt(name, lambda: judge(op, oracle, inputs, names, case.dtype))

    q, k, v, k_cmp, v_cmp = (x[name] for name in ("q", "k", "v", "k_cmp", "v_cmp"))
    memories = (x["mem_k"], x["mem_v"]) if case.memories else ()
    compare(
        "compressed",
        lambda q, k, v, *m: kernels.compressed_attention(q, k, v, cfg, *m, **told),
        lambda q, k, v, *m: reference.compressed_attention(q, k, v, cfg, *m, **told),
        (q, k_cmp, v_cmp, *memories),
        "out lse dq dk dv" + (" dmem_k dmem_v" if memories else ""),
    )
    if cfg.compress_block_size <= case.T:
        compare(
            "block means",
            lambda k: kernels.block_means(k, cfg),
            lambda k: pooling.block_means(k, cfg),
            (k,),
            "out dk",
        )
        sizes = (case.D, case.D), (cfg.compress_block_size, case.D)
        sizes += ((case.G, cfg.compress_block_size, case.D),)
        pool = [torch.randn(*shape, dtype=torch.float64, device=DEVICE) for shape in sizes]
        compare(
            "attention pool",
            lambda k, *p: kernels.attention_pool(k, *p, cfg),
            lambda k, *p: reference.attention_pool(k, *p, cfg),
            (k, pool[0] * case.D**-0.5, *pool[1:]),
            "out dk dweight dscores dpositions",
        )
    compare(
        "window",
        lambda q, k, v: kernels.sliding_window_attention(q, k, v, cfg, **told),
        lambda q, k, v: reference.sliding_window_attention(q, k, v, cfg, **told),
        (q, k, v),
        "out dq dk dv",
    )
    for name, start in (("rotate", 0), ("rotate, far", 2**16 - case.T)):
        angles = Rotary(case.D).angles(start + case.T, DEVICE)[start:]
        compare(
            name,
            lambda parts, angles=angles: kernels.rotate(parts[..., 1, :, :], angles),
            lambda parts, angles=angles: rotary.rotate(parts[..., 1, :, :], angles),
            (torch.stack([q, q], dim=2),),  # a view whose tokens lie apart
            "out dx",
        )
    out = torch.randn(3, *q.shape[:3], case.DV, dtype=torch.float64, device=DEVICE)
    gates = torch.rand(*q.shape[:3], 3, dtype=torch.float64, device=DEVICE)
    names = "out dgates da db dc"
    compare("combine", kernels.combine, reference.combine, (gates, *out), names)
    _, lse = reference.compressed_attention(q, k_cmp, v_cmp, cfg, *memories, **told)
    check_selected(case, compare, x, lse)


def check_selected(case: Case, compare: Callable, x: dict[str, Tensor], lse: Tensor) -> None:
    """The choice of blocks, and attention to them in both loop orders."""
    cfg, q, k, v, k_cmp = case.cfg, x["q"], x["k"], x["v"], x["k_cmp"]
    shared, told = not case.per_head, case.told
    indices = reference.select_blocks(q, k_cmp, lse, cfg, shared, **told)
    select = kernels.select_blocks
    attempt(
        "select",
        lambda: judge_selection(select, q, k_cmp, lse, cfg, case.dtype, shared=shared, **told)[0],
    )
    if case.T > 3:
        indices[:, 3] = -1  # a token that keeps nothing
    for name, tile_order in (("selected, tile order", True), ("selected, block order", False)):
        with loop_order(tile_order):
            compare(
                name,
                lambda q, k, v: kernels.selected_attention(q, k, v, indices, cfg, **told),
                lambda q, k, v: reference.selected_attention(q, k, v, indices, cfg, **told),
                (q, k, v),
                "out dq dk dv",
            )
    inverted_lists.PARTIAL_BYTES = (2**20, 2**20)  # several chunks
    inverted_lists.ITEM_ROWS = 256  # several items a list
    compare(
        "selected, gates",
        lambda q, k, v, g: kernels.selected_attention(q, k, v, indices, cfg, g, **told),
        lambda q, k, v, g: reference.selected_attention(q, k, v, indices, cfg, g, **told),
        (q, k, v, torch.ones(indices.shape, dtype=torch.float64, device=DEVICE)),
        "out dq dk dv dgates",
    )
    compare_gated(case, compare, x, lse, indices)
    if case.T <= 1000:
        compare(
            "importance at blocks",
            partial(chosen_importance, kernels, indices, cfg, told),
            partial(chosen_importance, reference, indices, cfg, told),
            (q, k_cmp),
            "value dq dk",
        )


def chosen_importance(
    backend: ModuleType, indices: Tensor, cfg: NSAConfig, told: dict, q: Tensor, k_cmp: Tensor
) -> Tensor:
    """Importance at `indices`, lse computed as well: its gradient is part of the keys'."""
    lse = backend.compressed_attention(q, k_cmp, k_cmp, cfg, **told)[1]
    return backend.selected_importance(q, k_cmp, lse, indices, cfg, **told)


def compare_gated(
    case: Case, compare: Callable, x: dict[str, Tensor], lse: Tensor, indices: Tensor
) -> None:
    """The three branches and their sum in one op; the compressed output's own rounding counts."""
    cfg, told = case.cfg, case.told
    gates = torch.rand(*x["q"].shape[:3], 3, dtype=torch.float64, device=DEVICE)

    def op(gates, q, k_cmp, v_cmp, q_rot, *kv):
        starts = told.get("document_starts")
        projected = Projected(q, k_cmp, v_cmp, None, None, q_rot, *kv, gates, starts)
        return gated_attention(projected, cfg, backend="triton", block_indices=indices)

    def oracle(gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win):
        compressed, _ = reference.compressed_attention(q, k_cmp, v_cmp, cfg, **told)
        selected = reference.selected_attention(q_rot, k_slc, v_slc, indices, cfg, **told)
        sliding = reference.sliding_window_attention(q_rot, k_win, v_win, cfg, **told)
        return reference.combine(gates, compressed, selected, sliding)

    q, k, v = x["q"], x["k"], x["v"]
    inputs = gates, q, x["k_cmp"], x["v_cmp"], q.flip(1), k, v, k.flip(1), v.flip(1)
    names = "out dgates dq dk_cmp dv_cmp dq_rot dk_slc dv_slc dk_win dv_win"
    for name, tile_order in (("gated, tile order", True), ("gated, block order", False)):
        with loop_order(tile_order):
            compare(name, op, oracle, inputs, names)


def check_addresses() -> None:
    """More than 2**31 elements: the last tokens of a long window against the reference."""
    T, H, D, tail = 2**18 + 64, 64, 128, 256
    cfg = NSAConfig(sliding_window_size=64)
    q = torch.randn(1, T, H, D, device=DEVICE, dtype=BF16).requires_grad_()
    k, v = (torch.randn(1, T, 4, D, device=DEVICE, dtype=BF16) for _ in range(2))
    out = kernels.sliding_window_attention(q, k, v, cfg)
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))
    q_end = q[:, -tail:].detach().requires_grad_()
    want = reference.sliding_window_attention(q_end, k[:, -tail:], v[:, -tail:], cfg)
    (dq_want,) = torch.autograd.grad(want, q_end, torch.ones_like(want))
    half = tail // 2  # the rest of the tail looks back beyond it
    for name, a, b in (("out", out, want), ("dq", dq, dq_want)):
        error = (a[:, -half:].float() - b[:, -half:].float()).abs().max().item()
        attempt(name, lambda error=error: f"{'ok  ' if error < 0.05 else 'FAIL'} error {error:.1e}")


# ---- processes ------------------------------------------------------------

NAMES = (*CASES, "addresses")


def run_alone(name: str, seconds: float) -> str:
    """One case in a process of its own; what it printed, and how it ended."""
    command = [sys.executable, "-u", __file__, name]
    begin = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=seconds)
        end = "" if process.returncode == 0 else f"  FAIL exit status {process.returncode}\n"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        end = f"  FAIL stopped after {time.time() - begin:.0f} s\n"
    lines = [line for line in output.splitlines() if line.startswith("  ")]
    if end and not any("FAIL" in line for line in lines):
        lines += ["  | " + line for line in output.splitlines()[-6:]]
    return f"{name}  [{time.time() - begin:.0f} s]\n" + "\n".join(lines) + f"\n{end}"


def main(name: str) -> int:
    if name == "addresses":
        check_addresses()
    else:
        case = CASES[name]
        chunked = patch.object(inverted_lists, "PARTIAL_BYTES", case.chunk_bytes)
        with by_descriptor(case.described), chunked:
            check_case(case)
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
