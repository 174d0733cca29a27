"""The op over tiles.py: attention of q over k, v by a rule, with its gradients."""

# pyright: reportCallIssue=false

import torch
from torch import Tensor

from nsa.kernels.primitives import (
    cdiv,
    num_multiprocessors,
    padded,
    power_of_2,
    precision,
    row_delta,
    tile_for,
)
from nsa.kernels.tiles import attend_dkv_kernel, attend_dq_kernel, attend_fwd_kernel

MAX_SPLITS = 16  # partial dK/dV a key tile may be cut into


def sizes(q: Tensor, k: Tensor, v: Tensor, words: Tensor | None) -> dict[str, int]:
    D, DV, G = q.shape[3], v.shape[3], k.shape[2]
    J = G if words is None else words.shape[1]
    return dict(H=q.shape[2], G=G, J=J, D=D, DV=DV, BLOCK_D=padded(D), BLOCK_DV=padded(DV))


@torch.library.custom_op("nsa::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    rule: str,
    causal: bool,
    span: int,
    stride: int,
    memory: int,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] and lse [B, T, H] of q [B, T, H, D] over k, v [B, S, G, D | Dv].

    span is l, w or l' for prefix, band and bits; stride is d and memory the number of keys that
    every token sees, both for prefix alone.
    """
    B, T, H, D = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty(B, T, H, v.shape[3], dtype=v.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    size = sizes(q, k, v, words)
    tile = tile_for("forward", q.dtype, D, v.shape[3], q.device)
    grid = (cdiv(T * H // size["J"], tile.rows) * B * size["J"],)
    with torch.cuda.device_of(q):
        attend_fwd_kernel[grid](
            q, k, v, words, out, lse, T, k.shape[1], num_words(words), D**-0.5,
            **size, RULE=rule, CAUSAL=causal, SPAN=span, STRIDE=stride, MEMORY=memory,
            ROWS=tile.rows, KEYS=key_tile(tile.keys, rule, span), PRECISION=precision(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("nsa::attend_backward", mutates_args=())
def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    rule: str,
    causal: bool,
    span: int,
    stride: int,
    memory: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    B, T, H, D = q.shape
    q, k, v, dout = q.contiguous(), k.contiguous(), v.contiguous(), dout.contiguous()
    size = sizes(q, k, v, words)
    rules = dict(RULE=rule, CAUSAL=causal, SPAN=span, STRIDE=stride, MEMORY=memory)
    dq = torch.empty_like(q)
    with torch.cuda.device_of(q):
        delta = row_delta(out, dout, dlse.contiguous())
        arrays = (q, k, v, words, dout, lse, delta)
        tile = tile_for("dq", q.dtype, D, v.shape[3], q.device)
        grid = (cdiv(T * H // size["J"], tile.rows) * B * size["J"],)
        attend_dq_kernel[grid](
            *arrays, dq, T, k.shape[1], num_words(words), D**-0.5, **size, **rules,
            ROWS=tile.rows, KEYS=key_tile(tile.keys, rule, span), PRECISION=precision(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = tile_for("dkv", q.dtype, D, v.shape[3], q.device)
        keys = key_tile(tile.keys, rule, span)
        programs = cdiv(k.shape[1], keys) * B * size["J"]
        splits = num_splits(programs, rule, q.device)
        dk, dv = (partial_like(x, splits, size["J"]) for x in (k, v))
        attend_dkv_kernel[(programs * splits,)](
            *arrays, dk, dv, T, k.shape[1], num_words(words), B, D**-0.5, **size, **rules,
            ROWS=tile.rows, KEYS=keys, SPLITS=splits, PRECISION=precision(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dq, summed(dk, k), summed(dv, v)


def num_words(words: Tensor | None) -> int:
    return 0 if words is None else words.shape[2]


def key_tile(keys: int, rule: str, span: int) -> int:
    """Keys a tile holds; with bits, a tile's blocks lie in one word."""
    while rule == "bits" and 32 * span % keys:
        keys //= 2
    return keys


def num_splits(programs: int, rule: str, device: torch.device) -> int:
    """Runs of query rows per key tile: enough programs for the GPU; a band is short already."""
    if rule == "band" or programs == 0:
        return 1
    wanted = cdiv(4 * num_multiprocessors(device), programs)
    return min(MAX_SPLITS, power_of_2(wanted))


def partial_like(x: Tensor, splits: int, index_heads: int) -> Tensor:
    """[splits, B, S, J, D]: in float32 if there is anything to sum, else x's own dtype."""
    B, S, G, D = x.shape
    final = splits == 1 and index_heads == G
    dtype = x.dtype if final else torch.float32
    return torch.empty(splits, B, S, index_heads, D, dtype=dtype, device=x.device)


def summed(partial: Tensor, like: Tensor) -> Tensor:
    """Sum over the splits and over the index heads that share a key head, as `like`."""
    B, S, G, D = like.shape
    splits, J = partial.shape[0], partial.shape[3]
    if splits == 1 and J == G:
        return partial[0].to(like.dtype)
    return partial.view(splits, B, S, G, J // G, D).sum((0, 4)).to(like.dtype)


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    rule: str,
    causal: bool,
    span: int,
    stride: int,
    memory: int,
) -> tuple[Tensor, Tensor]:
    out = v.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@attend_backward.register_fake
def _(q, k, v, words, out, lse, dout, dlse, rule, causal, span, stride, memory):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, words, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, words, *output)


def _backward(ctx, dout, dlse):
    grads = attend_backward(*ctx.saved_tensors, dout, dlse, *ctx.rule)
    return *grads, None, None, None, None, None, None


attend.register_autograd(_backward, setup_context=_save)
