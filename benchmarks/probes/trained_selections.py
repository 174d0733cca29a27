"""Which blocks does a trained model keep: do neighbouring queries keep the same ones?

`python -m benchmarks.probes.trained_selections --ckpt RUN --text FILE` counts, in every layer, how
many distinct blocks 16, 32 and 64 neighbouring tokens keep, beside what they see and what as many
random picks would make; and, on a GPU, times selected attention in both loop orders on the recorded
picks and on random ones.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import measure
from nsa import blocks, ops
from nsa.attention import SparseAttention
from nsa.branches import attend_branches
from nsa.config import NSAConfig
from nsa.heads import Projected
from nsa.testing import loop_order
from runs import trained

NEIGHBOURS = (16, 32, 64)


def distinct(block_indices: Tensor, num_blocks: int, neighbours: int) -> float:
    """How many blocks `neighbours` tokens keep together, on average.

    Args:
        block_indices: [B T G N], -1 in empty slots.
    """
    B, T, G, _ = block_indices.shape
    kept = torch.zeros(B, T, G, num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    kept.scatter_(-1, block_indices.long() % (num_blocks + 1), True)  # -1: a place of its own
    whole = T // neighbours * neighbours
    together = kept[:, :whole, :, :-1].unflatten(1, (-1, neighbours)).any(2)
    return together.sum(-1).float().mean().item()


def at_random(block_indices: Tensor, cfg: NSAConfig) -> Tensor:
    """As many picks of what each token sees, with what is forced kept."""
    T, device = block_indices.shape[1], block_indices.device
    rank = blocks.priority(T, cfg, device=device)  # [T S]
    scores = torch.rand(*block_indices.shape[:3], rank.shape[-1], device=device)
    scores = scores + rank[:, None]
    picked = scores.topk(block_indices.shape[-1]).indices.sort(-1).values
    seen = rank[:, None].expand(*scores.shape).gather(-1, picked) >= 0
    return torch.where(seen, picked, -1).int()


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
        projected = attn.compress_and_rotate(attn.split_heads(x))
        rules = dict(backend=attn.backend, shared=attn.shared_selection)
        rules |= dict(use_diff_topk=False, compressed_output=attn.compressed_output)
        chosen = attend_branches(projected, attn.cfg, **cast(Any, rules)).block_indices
        yield attn, projected, chosen


def order_times(x: Projected, indices: Tensor, attn: SparseAttention) -> str:
    """Milliseconds forward and backward of selected attention, in each loop order."""
    inputs = [x.q_rot, x.k_slc, x.v_slc]
    found = []
    for tiles in (False, True):
        with loop_order(tiles):
            op = lambda q, k, v: ops.selected_attention(  # noqa: E731
                q, k, v, indices, attn.cfg, backend="triton"
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
        for number, (attn, x, indices) in enumerate(layers_of(model, tokens)):
            S = blocks.num_selection_blocks(length, attn.cfg)
            random = at_random(indices, attn.cfg)
            seen = blocks.priority(length, attn.cfg, device=device) >= 0
            print(f"layer {number}: n {indices.shape[-1]}, sees {seen.sum(-1).float().mean():.1f}")
            for name, picks in (("trained", indices), ("random", random)):
                counts = [f"{k}: {distinct(picks, S, k):.1f}" for k in NEIGHBOURS]
                times = order_times(x, picks, attn) if device == "cuda" else ""
                print(f"  {name:8} distinct blocks of {', '.join(counts)}  {times}", flush=True)


if __name__ == "__main__":
    main()
