"""Attention under a mask of three kinds, with its gradients: the op over kernels.py."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.documents import Extents, extents_of
from nsa.kernels.autotune import with_tile
from nsa.kernels.columns import key_slice
from nsa.kernels.descriptors import as_tiles, by_address
from nsa.kernels.partial_sums import summed
from nsa.kernels.primitives import (
    cdiv,
    num_multiprocessors,
    padded,
    power_of_2,
    precision,
)
from nsa.kernels.registration import custom_op, register_autograd, register_fake
from nsa.kernels.tile_order.kernels import attend_dkv_kernel, attend_dq_kernel, attend_fwd_kernel
from nsa.kernels.tile_sizes import Problem, Tile

MAX_SPLITS = 16  # runs of tokens, each with a partial dK and dV
DESCRIBED_ROWS = 2**18  # query rows from which on tiles are described
RUN_ROWS = 2**14  # query rows of a run, about: few enough for the key tiles to keep pace


class Mask(NamedTuple):
    """Which keys a token sees: what `attend_tiles` takes after the tensors."""

    kind: str  # prefix, band or bits: kernels.py says what each shows
    causal: bool
    span: int  # tokens: l, w or l'
    stride: int = 1  # of prefix: d
    memory: int = 0  # of prefix: memory keys, which every token sees


@lru_cache
def sizes(H: int, G: int, J: int, D: int, DV: int) -> dict[str, int]:
    """The compile-time sizes of every kernel here."""
    return dict(H=H, G=G, J=J, D=D, DV=DV, WIDTH=key_slice(D), PADDED_DV=padded(DV))


def constants_of(q: Tensor, v: Tensor, index_heads: int, mask: Mask) -> dict[str, Any]:
    """What every kernel here is compiled for."""
    (H, D), (G, DV) = q.shape[2:], v.shape[2:]
    return sizes(H, G, index_heads, D, DV) | dict(
        MASK=mask.kind, CAUSAL=mask.causal, SPAN=mask.span, STRIDE=mask.stride,
        MEMORY=mask.memory, PRECISION=precision(),
    )  # fmt: skip


def num_index_heads(k: Tensor, words: Tensor | None) -> int:
    """J: key/value heads, or, where blocks are selected, how many heads select them."""
    return k.shape[2] if words is None else words.shape[1]


@custom_op
def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    starts: Tensor | None,
    mask: str,
    causal: bool,
    span: int,
    stride: int,
    memory: int,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] and lse [B, T, H] of q [B, T, H, D] over k, v [B, S, G, D | Dv].

    `starts` are those of documents; the arguments behind are those of a `Mask`. Arrays are
    contiguous.
    """
    (B, T, H, D), (_, S, _, DV), J = q.shape, v.shape, num_index_heads(k, words)
    constants = constants_of(q, v, J, Mask(mask, causal, span, stride, memory))

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        out = torch.empty(B, T, H, DV, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
        keys = key_tile(tile.keys, mask, span)
        described, k_tiles, k_rest, v_tiles = streamed(q, keys, 1, k, v)
        attend_fwd_kernel[(cdiv(T * H // J, tile.rows) * B * J,)](
            q, k_tiles, k_rest, v_tiles, words, starts, out, lse, T, S, num_words(words), D**-0.5,
            **constants, ROWS=tile.rows, KEYS=keys, DESCRIBED=described,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out, lse

    with torch.cuda.device_of(q):
        return with_tile(problem("attend_fwd", q, v, J, mask), launch)


@custom_op
def attend_tiles_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    mask: str,
    causal: bool,
    span: int,
    stride: int,
    memory: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; without dlse it counts as zeros."""
    shown = Mask(mask, causal, span, stride, memory)
    documents = extents_of(starts)
    return gradients(q, k, v, words, lse, dout, shown, out, dlse, documents=documents)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    lse: Tensor,
    dout: Tensor,
    mask: Mask,
    out: Tensor | None = None,
    dlse: Tensor | None = None,
    *,
    documents: Extents,
    delta: Tensor | None = None,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (added `onto`, where given), dk, dv; delta comes from out and dlse unless it is given."""
    with torch.cuda.device_of(q):
        arrays = q, k, v, words, lse, dout, mask, documents
        dq, delta = query_gradient(*arrays, out=out, dlse=dlse, delta=delta, onto=onto)
        return dq, *key_gradients(*arrays, delta=delta)


def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    lse: Tensor,
    dout: Tensor,
    mask: Mask,
    documents: Extents,
    *,
    out: Tensor | None,
    dlse: Tensor | None,
    delta: Tensor | None,
    onto: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dq, and the rows' delta; see `gradients`."""
    (B, T, H, D), S, J = q.shape, k.shape[1], num_index_heads(k, words)
    constants = constants_of(q, v, J, mask)

    def launch(tile: Tile, onto: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dq = torch.empty_like(q) if onto is None else onto
        row_delta = torch.empty_like(lse) if delta is None else delta
        keys = key_tile(tile.keys, mask.kind, mask.span)
        described, k_tiles, k_rest, v_tiles = streamed(q, keys, 1, k, v)
        attend_dq_kernel[(cdiv(T * H // J, tile.rows) * B * J,)](
            q, k_tiles, k_rest, v_tiles, words, documents.starts,
            out, dout, lse, dlse, row_delta, dq, T, S, num_words(words), D**-0.5, **constants,
            ROWS=tile.rows, KEYS=keys, ADD=onto is not None, DESCRIBED=described,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return dq, row_delta

    of_dq = problem("attend_dq", q, v, J, mask.kind)
    return with_tile(of_dq, launch, partial(launch, onto=onto))


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    lse: Tensor,
    dout: Tensor,
    mask: Mask,
    documents: Extents,
    *,
    delta: Tensor,
) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    (B, T, H, D), S, J = q.shape, k.shape[1], num_index_heads(k, words)
    constants = constants_of(q, v, J, mask)

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        keys = key_tile(tile.keys, mask.kind, mask.span)
        programs = cdiv(S, keys) * B * J
        splits = num_splits(programs, T * H // J, mask.kind, q.device)
        dk, dv = (partial_like(x, splits, J) for x in (k, v))
        described, q_tiles, q_rest, dout_tiles = streamed(q, tile.rows, H // J, q, dout)
        attend_dkv_kernel[(programs * splits,)](
            q_tiles, q_rest, k, v, words, documents.ends, dout_tiles, lse, delta, dk, dv,
            T, S, num_words(words), B, splits, D**-0.5, **constants,
            ROWS=tile.rows, KEYS=keys, DESCRIBED=described,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return summed(dk, dv, k, v, J)

    return with_tile(problem("attend_dkv", q, v, J, mask.kind), launch)


def problem(kernel: str, q: Tensor, v: Tensor, index_heads: int, mask: str) -> Problem:
    _, T, H, D = q.shape
    return Problem(kernel, q.dtype, D, v.shape[3], H // index_heads, T, q.device, mask)


def streamed(q: Tensor, rows: int, heads: int, x: Tensor, y: Tensor) -> tuple[bool, Any, Any, Any]:
    """`as_tiles`, if the work is long enough to hide what a descriptor costs the host: 25 µs."""
    if q.shape[:3].numel() < DESCRIBED_ROWS:
        return by_address(x, y)
    return as_tiles(rows, heads, x, y)


def num_words(words: Tensor | None) -> int:
    return 0 if words is None else words.shape[2]


def key_tile(keys: int, mask: str, span: int) -> int:
    """Keys a tile holds; with bits, a tile's blocks lie in one word."""
    while mask == "bits" and 32 * span % keys:
        keys //= 2
    return keys


def num_splits(programs: int, rows: int, mask: str, device: torch.device) -> int:
    """Runs that a head's query rows are cut into: one of a band, whose key tiles meet few rows."""
    if mask == "band" or programs == 0:
        return 1
    enough = cdiv(4 * num_multiprocessors(device), programs)  # programs for the GPU
    return min(MAX_SPLITS, power_of_2(max(enough, cdiv(rows, RUN_ROWS))))


def partial_like(x: Tensor, splits: int, index_heads: int) -> Tensor:
    """[splits, B, S, J, D] in float32; [B, S, G, D] as x itself where there is nothing to sum."""
    B, S, G, D = x.shape
    if splits == 1 and index_heads == G:
        return torch.empty_like(x)
    return torch.empty(splits, B, S, index_heads, D, dtype=torch.float32, device=x.device)


@register_fake(attend_tiles)
def _(q, k, v, words, starts, mask, causal, span, stride, memory):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@register_fake(attend_tiles_backward)
def _(q, k, v, words, starts, out, lse, dout, dlse, mask, causal, span, stride, memory):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, words, starts, *ctx.mask = inputs
    ctx.save_for_backward(q, k, v, words, starts, *output)
    ctx.set_materialize_grads(False)  # lse seldom has a gradient


def _backward(ctx, dout, dlse):
    saved = ctx.saved_tensors
    dout = torch.zeros_like(saved[5]) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    grads = attend_tiles_backward(*saved, dout, dlse, *ctx.mask)
    return *grads, *[None] * (2 + len(ctx.mask))


register_autograd(attend_tiles, _backward, setup_context=_save)
