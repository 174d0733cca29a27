"""Compile every kernel for a GPU that need not be here, and say what each one costs.

    python -m benchmarks.probes.compile_kernels --arch 90 --heads 64/4 --dim 128 [--candidates]

Launchers run on CPU tensors with the launch replaced by a compilation, so what is compiled is what
would be launched, tile table and all; with --candidates also every other tile worth timing.
Columns: bytes of shared memory; the matrix instruction; and, but for --brief, registers a thread;
bytes of stack, which hold what was spilled; of the largest loop with matrix products its
instructions, those that spill or fetch what was spilled, and those that wait for a product (as many
as there are products: they run one by one). Must run without TRITON_INTERPRET.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import nsa.kernels as kernels
from nsa.blocks import num_compress_blocks
from nsa.branches import gated_attention
from nsa.config import NSAConfig
from nsa.heads import Projected
from nsa.kernels import autotune, cross_entropy, descriptors, selected, tile_sizes
from nsa.kernels.tile_order import op as tile_order
from nsa.kernels.tile_sizes import Problem, Tile, candidates
from nsa.testing import by_descriptor

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int64: "*i64",
}
MATRIX = r"(?<=wgmma\.mma_async\.sync\.aligned\.)m\d+n\d+k\d+|(?<!a\.)\bmma\.sync"
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def compile_instead(arch: int, only: str, seen: set, report) -> None:
    """Replace launching by compiling for sm_<arch>; each distinct program once."""

    def run(self, *args, grid, warmup, **kwargs):
        if only not in self.__name__:
            return
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        source = as_source(self, values)
        key = (self.__name__, str(source.signature), str(source.constants), str(options))
        if key not in seen:
            seen.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            report(self.__name__, values, options, compiled)

    JITFunction.run = run


def as_source(kernel: JITFunction, values: dict) -> ASTSource:
    """The kernel specialised as a launch would specialise it."""
    signature, constants, aligned = {}, {}, {}
    for position, param in enumerate(kernel.params):
        value = values[param.name]
        specialised = not param.do_not_specialize
        if (
            param.is_constexpr
            or value is None
            or (specialised and type(value) is int and value == 1)
        ):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            dtype = POINTERS[value.base.dtype].removeprefix("*")
            signature[param.name] = f"tensordesc<{dtype}{value.block_shape}>"
        elif isinstance(value, Tensor):
            signature[param.name] = POINTERS[value.dtype]
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32" if isinstance(value, int) else "fp32"
            if specialised and value % 16 == 0:
                aligned[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, aligned)


def tool_output(tool: str, compiled, *options: str) -> str:
    """What one of the CUDA tools that come with Triton says of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled) -> tuple[int, int]:
    """Registers a thread and bytes of stack (spills), as the assembler counted them."""
    usage = tool_output("cuobjdump", compiled, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def product_loop(compiled) -> list[str]:
    """The instructions of the largest loop that multiplies matrices; none without one."""
    code = tool_output("nvdisasm", compiled, "-c")
    lines = re.findall(r"^(?:\.L_x_\d+:|\s+/\*[0-9a-f]{4,}\*/.*)", code, re.MULTILINE)
    labels = {line[:-1]: place for place, line in enumerate(lines) if line.startswith(".L_x_")}
    loops = [[]]
    for place, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        body = lines[labels.get(target[1], place) : place] if target else []
        if any("MMA" in each for each in body):
            loops.append(body)
    return max(loops, key=len)


def loop_costs(compiled) -> str:
    loop = product_loop(compiled)
    count = {
        name: sum(name in line for line in loop)
        for name in ("STL", "LDL", "WARPGROUP.DEPBAR", "MMA")
    }
    return (
        f"loop {len(loop):4d} spills {count['STL'] + count['LDL']:3d} "
        f"waits {count['WARPGROUP.DEPBAR']:2d} of {count['MMA']:2d}"
    )


def assembled(compiled) -> str:
    """What the assembler made of a kernel: `resources` and `loop_costs`."""
    registers, stack = resources(compiled)
    return f"registers {registers:3d} stack {stack:4d} {loop_costs(compiled)}"


def exercise(
    B: int,
    T: int,
    H: int,
    G: int,
    D: int,
    DV: int,
    dtype: torch.dtype,
    cfg: NSAConfig,
    *,
    documents: bool = False,
) -> None:
    """Launch every kernel, forward and backward, on tensors that nobody computes."""
    starts = torch.zeros(B, T, dtype=torch.int32) if documents else None
    told = {"document_starts": starts}
    C = (T - cfg.compress_block_size) // cfg.compress_block_sliding_stride + 1

    def new(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=dtype, requires_grad=True)

    q, k, v = new(B, T, H, D), new(B, T, G, D), new(B, T, G, DV)
    pool = new(D, D), new(cfg.compress_block_size, D), new(G, cfg.compress_block_size, D)
    k_cmp = kernels.block_means(k, cfg) + kernels.attention_pool(k, *pool, cfg)
    v_cmp = new(B, C, G, DV)
    out_cmp, lse = kernels.compressed_attention(q, k_cmp, v_cmp, cfg, **told)
    out_win = kernels.sliding_window_attention(q, k, v, cfg, **told)
    indices = kernels.select_blocks(q, k_cmp, lse, cfg, **told)
    indices = torch.zeros_like(indices)
    gates = kernels.selected_importance(q, k_cmp, lse, indices, cfg, **told)
    out = torch.zeros_like(out_win)
    for order in (True, False):
        selected.prefers_tile_order = lambda *sizes, order=order: order
        out_slc = kernels.selected_attention(q, k, v, indices, cfg, **told)
        out = out + kernels.combine(new(B, T, H, 3), out_cmp, out_slc, out_win)
        projected = Projected(q, k_cmp, v_cmp, None, None, q, k, v, k, v, new(B, T, H, 3), starts)
        with patch.dict(os.environ, TRITON_INTERPRET="1"):  # `ops` lets a CPU pass
            out = out + gated_attention(projected, cfg, backend="triton", block_indices=indices)
    out = out + kernels.selected_attention(q, k, v, indices, cfg, gates, **told)
    out.sum().backward()
    if documents:  # the other kernels know none
        return
    labels = torch.zeros(B, dtype=torch.long)
    for gradient in (True, False):
        cross_entropy.cross_entropy_(torch.ones(B, 50_000, dtype=dtype), labels, gradient=gradient)
    exercise_decoding(B, T, H, G, D, dtype, cfg)


@torch.no_grad()
def exercise_decoding(
    B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype, cfg: NSAConfig
) -> None:
    """Launch the kernels of one decoding step."""
    if not cfg.causal:
        return

    def new_zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def pair(rows: int) -> list[Tensor]:
        return [new_zeros(B, rows, G, D) for _ in range(2)]

    q, lengths = torch.zeros(B, 1, H, D, dtype=dtype), torch.zeros(B, dtype=torch.long)
    compressed, selected = pair(num_compress_blocks(T, cfg) + 1), pair(T)
    window, tail = pair(cfg.sliding_window_size), pair(cfg.compress_block_size)
    new = [x for _ in range(3) for x in pair(1)]
    parts = dict(selected=selected, window=window, tail=tail, compressed=compressed)
    places, weight = new_zeros(G, 1, cfg.compress_block_size, D), new_zeros(D, D)
    attention_pool = places, weight, new_zeros(cfg.compress_block_size, D)
    for pools in ([], [(places, None, None)] * 2, [attention_pool] * 2):
        kernels.append_token(q, new, torch.zeros(D // 2), lengths, parts, cfg, pools)
    kernels.append_block(pair(1), compressed, lengths, cfg)
    gates = torch.zeros(B, 1, H, 3, dtype=dtype)
    both = tuple(compressed), tuple(selected), tuple(window)
    kernels.cached_attention(q, q, gates, *both, lengths[:, None], cfg=cfg)


def every_candidate(problem: Problem, launch: Callable[[Tile], object]) -> Tile:
    """Stands for `autotune.choose`: compiles every candidate, and goes on by the table."""
    first, *others = candidates(problem)
    for tile in others:
        launch(tile)
    return first


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--heads", default="64/4")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--value-dim", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sizes", default="32/16/64/16/512", help="l/d/l'/n/w")
    parser.add_argument("--non-causal", action="store_true", help="causal=False")
    parser.add_argument("--documents", action="store_true", help="that share a row")
    parser.add_argument("--candidates", action="store_true", help="all tiles worth timing")
    parser.add_argument("--kernel", default="", help="part of the names of kernels")
    parser.add_argument("--brief", action="store_true", help="shared memory alone: no disassembly")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    size, d, block, n, w = map(int, args.sizes.split("/"))
    cfg = NSAConfig(
        compress_block_size=size, compress_block_sliding_stride=d, selection_block_size=block,
        num_selected_blocks=n, sliding_window_size=w, causal=not args.non_causal,
    )  # fmt: skip
    worst = 0

    def report(name, values, options, compiled):
        nonlocal worst
        matrix = " ".join(sorted(set(re.findall(MATRIX, compiled.asm["ptx"]))))
        worst = max(worst, compiled.metadata.shared)
        variant = values.get("MASK", "gates" if values.get("GATES") else "")
        tile = "x".join(str(values[key]) for key in ("ROWS", "KEYS") if key in values)
        print(
            f"{name:22s}{variant:7s}{tile:8s}warps {options.get('num_warps')} "
            f"stages {options.get('num_stages', '-')} shared {compiled.metadata.shared:6d} "
            f"{matrix} {'' if args.brief else assembled(compiled)}",
            flush=True,
        )

    H, G = map(int, args.heads.split("/"))
    limit = {80: 163, 86: 99, 89: 99, 90: 227}[args.arch] * 1024
    tile_sizes.shared_memory = lambda device: limit
    tile_sizes.capability = descriptors.capability = lambda device: args.arch
    if args.candidates:
        autotune.choose = every_candidate
    compile_instead(args.arch, args.kernel, set(), report)
    dtype = getattr(torch, args.dtype)
    tile_order.num_multiprocessors = lambda device: 132  # so that dK and dV have partial sums
    for long in (True, False):
        with by_descriptor(long):
            # Two sequences: compressed keys, no whole tiles, are described in four dimensions.
            widths = args.dim, args.value_dim or args.dim
            exercise(2, args.tokens, H, G, *widths, dtype, cfg, documents=args.documents)
    print(f"largest shared memory {worst} of {limit} bytes")
    return int(worst > limit)


if __name__ == "__main__":
    sys.exit(main())
