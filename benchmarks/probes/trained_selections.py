"""Which blocks does a trained model keep: do neighbouring queries keep the same ones?

`python -m benchmarks.probes.trained_selections --ckpt RUN --text FILE` counts, in every layer, how
many distinct blocks 16, 32 and 64 neighbouring tokens keep, beside what they see and what as many
random picks would make; and, on a GPU, times selected attention in both loop orders on the recorded
picks and on random ones.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from nsa import blocks, ops
from nsa.attention import SparseAttention
from nsa.heads import Projected
from nsa.probe import NEIGHBOURS
from nsa.probe_tile import as_mask
from nsa.selection import random_blocks
from nsa.testing import loop_order
from runs import trained


def distinct(block_indices: Tensor, num_blocks: int, neighbours: int) -> float:
    """How many blocks `neighbours` tokens of a head keep together, on average, of [B T G N]."""
    whole = block_indices.shape[1] // neighbours * neighbours
    kept = torch.stack([as_mask(each[None, :whole], num_blocks) for each in block_indices])
    return kept.unflatten(1, (-1, neighbours)).any(2).sum(-1).float().mean().item()


@torch.no_grad()
def layers_of(model: Any, tokens: Tensor) -> Iterator[tuple[SparseAttention, Projected, Tensor]]:
    """Each NSA layer, what its branches are computed from, and the blocks it keeps."""
    found: list[tuple[SparseAttention, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, inputs: found.append((m, inputs[0])))
        for module in model.modules()
        if isinstance(module, SparseAttention)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    for attn, x in found:
        yield attn, attn.compress_and_rotate(attn.split_heads(x)), attn.branches(x).block_indices


def order_times(x: Projected, indices: Tensor, attn: SparseAttention) -> str:
    """Milliseconds forward and backward of selected attention, in each loop order."""
    inputs = [x.q_rot, x.k_slc, x.v_slc]
    found = []
    for tiles in (False, True):
        with loop_order(tiles):
            op = partial(
                ops.selected_attention, block_indices=indices, cfg=attn.cfg, backend="triton"
            )
            times = measure.forward_and_backward(op, inputs, x.q_rot.device)
        found.append(f"{times['forward_ms']:.2f} + {times['backward_ms']:.2f}")
    return f"block order {found[0]}, tile order {found[1]} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint or a run folder")
    parser.add_argument("--text", type=Path, required=True, help="read from its end")
    parser.add_argument("--sequences", type=int, default=4)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = trained.load(trained.find(options.ckpt))
    model, length = found.model.to(device), found.model.seq_len
    number = options.sequences * length
    text = options.text.read_bytes()[-8 * number :].decode(errors="replace")
    tokens = torch.tensor(found.tokenizer.encode(text)[-number:], device=device).view(-1, length)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        for layer, (attn, x, indices) in enumerate(layers_of(model, tokens)):
            S = blocks.num_selection_blocks(length, attn.cfg)
            seeds = torch.arange(len(indices), device=device)
            random = random_blocks(seeds, indices.shape[2], length, attn.cfg)
            seen = blocks.priority(length, attn.cfg, device=device) >= 0
            print(f"layer {layer}: n {indices.shape[-1]}, sees {seen.sum(-1).float().mean():.1f}")
            for name, picks in (("trained", indices), ("random", random)):
                counts = [f"{k}: {distinct(picks, S, k):.1f}" for k in NEIGHBOURS]
                times = order_times(x, picks, attn) if device == "cuda" else ""
                print(f"  {name:8} distinct blocks of {', '.join(counts)}  {times}", flush=True)


if __name__ == "__main__":
    main()
