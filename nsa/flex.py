"""FlexAttention: masks for the sparse branches, and the `flex` backend of two of the ops.

The masks have the names that native-sparse-attention-pytorch gives them. Attention is compiled
on a GPU; on a CPU it runs eagerly and forward only, since PyTorch has no backward there.
Letters as in `nsa.reference`.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nsa import blocks
from nsa.config import NSAConfig

TILE = 128  # FlexAttention skips tiles of TILE x TILE scores that a mask hides entirely

# Below 128 queries PyTorch would take its decoding kernel, which has no tiles for some lengths.
TRAINING: Any = {"FORCE_USE_FLEX_ATTENTION": True}

PROGRAMS = 64  # compiled in one process, at most

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key


def create_sliding_mask(
    seq_len: int,
    window_size: int,
    causal: bool = True,
    device: blocks.Device = None,
    *,
    document_starts: blocks.Starts = None,
) -> BlockMask:
    """Exactly `window_size` keys, the query's own included; if not causal, on either side of it."""
    cfg = NSAConfig(sliding_window_size=window_size, causal=causal)
    first, last = _tile_edges(seq_len, device)
    shown = first[:, None] - last < window_size  # from the tile's first query to its last key
    shown &= first <= last[:, None] if causal else first - last[:, None] < window_size
    if document_starts is None:
        return _from_tiles(
            shown[None, None], lambda b, h, t, s: blocks.in_window(t, s, cfg), seq_len
        )
    return _from_tiles(
        (shown & _tiles_of_documents(document_starts))[:, None],
        lambda b, h, t, s: blocks.in_window(t, s, cfg, document_starts[b, t]),
        seq_len,
    )


def create_document_mask(document_starts: Int[Tensor, "B T"]) -> BlockMask:
    """All tokens so far of each query's document."""
    seq_len = document_starts.shape[1]
    first, last = _tile_edges(seq_len, document_starts.device)
    shown = (first <= last[:, None]) & _tiles_of_documents(document_starts)
    return _from_tiles(
        shown[:, None], lambda b, h, t, s: (s <= t) & (s >= document_starts[b, t]), seq_len
    )


def create_compress_mask(
    seq_len: int,
    compress_block_size: int,
    compress_block_sliding_stride: int,
    mem_kv_len: int = 0,
    causal: bool = True,
    device: blocks.Device = None,
) -> BlockMask:
    """Which compressed keys each query sees; `mem_kv_len` memory keys before them are seen by all.

    Raises ValueError where there is no key at all.
    """
    cfg = NSAConfig(
        compress_block_size=compress_block_size,
        compress_block_sliding_stride=compress_block_sliding_stride,
        selection_block_size=compress_block_size * compress_block_sliding_stride,
        causal=causal,
    )
    num_keys = mem_kv_len + blocks.num_compress_blocks(seq_len, cfg)
    if not num_keys:
        raise ValueError(
            f"seq_len={seq_len} is shorter than compress_block_size={compress_block_size}: "
            f"there is no compressed key to mask"
        )
    return create_block_mask(
        lambda b, h, t, c: (c < mem_kv_len) | blocks.sees_compressed(t, c - mem_kv_len, cfg),
        B=None,
        H=None,
        Q_LEN=seq_len,
        KV_LEN=num_keys,
        device=device,  # pyright: ignore[reportArgumentType]
    )


def create_fine_mask(
    seq_len: int, block_size: int, causal: bool = True
) -> Callable[..., BlockMask]:
    """A function from chosen blocks to their mask: `fine_mask(block_indices, num_grouped_queries)`.

    It takes int32 [B, T, G, N] with -1 in empty slots, and R, the query heads a selection serves.
    """

    def fine_mask(block_indices: Int[Tensor, "B T G N"], num_grouped_queries: int = 1) -> BlockMask:
        num_blocks = -(-seq_len // block_size)
        slots = torch.ones_like(block_indices, dtype=torch.bool)
        chosen = blocks.per_block(block_indices, slots, num_blocks)
        shown = _tiles_of_blocks(chosen, block_size, causal)

        # Masks are lambdas: FlexAttention reads their number of arguments off the code object,
        # which the wrapper of a type checker would hide.
        return _from_tiles(
            repeat(shown, "B G Q K -> B (G R) Q K", R=num_grouped_queries),
            lambda b, h, t, s: (
                chosen[b, t, h // num_grouped_queries, s // block_size] & ((s <= t) | (not causal))
            ),
            seq_len,
        )

    return fine_mask


def selected_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    block_gates: Float[Tensor, "B T J N"] | None = None,
    *,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T H Dv"]:
    """`reference.selected_attention`, without gates. Selected blocks lie in a query's document."""
    if block_gates is not None:
        raise ValueError("backend='flex' takes no block_gates: use backend='torch'")
    fine_mask = create_fine_mask(q.shape[1], cfg.selection_block_size, cfg.causal)
    return attend(q, k, v, fine_mask(block_indices, q.shape[2] // block_indices.shape[2]))


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
    *,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T H Dv"]:
    """`reference.sliding_window_attention`."""
    sizes = q.shape[1], cfg.sliding_window_size, cfg.causal, q.device
    return attend(q, k, v, create_sliding_mask(*sizes, document_starts=document_starts))


def attend(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    mask: BlockMask,
) -> Float[Tensor, "B T H Dv"]:
    """FlexAttention on our layout: compiled on a GPU, eager and without gradients on a CPU."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    q, k, v = (rearrange(x, "B T H D -> B H T D") for x in (q, k, v))
    if torch.compiler.is_compiling():
        attention = flex_attention
    elif q.device.type == "cpu":
        attention = _eager_flex_attention
    else:
        attention = _compiled_flex_attention()
    grouped = k.shape[1] < q.shape[1]
    with torch.autocast(device, enabled=False):  # whose dispatch PyTorch 2.11 cannot compile
        out = attention(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=TRAINING)
    return rearrange(out, "B H T D -> B T H D")


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # Eagerly it would hold T x T scores. It raises beyond so many masks, lengths and dtypes.
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, fullgraph=True)


def _eager_flex_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, **options: Any
) -> Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "backend='flex' has no backward on a CPU: train with backend='torch', or call it "
            "under torch.no_grad()"
        )
    q, k, v = q.detach(), k.detach(), v.detach()
    with warnings.catch_warnings():
        # PyTorch advises to compile; on a CPU the eager path is what this backend offers.
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(q, k, v, block_mask=block_mask, **options)


def _tile_edges(seq_len: int, device: blocks.Device) -> tuple[Int[Tensor, " Q"], Int[Tensor, " Q"]]:
    """The first and the last position of each tile."""
    first = torch.arange(0, seq_len, TILE, device=device)
    return first, (first + TILE - 1).clamp(max=seq_len - 1)


def _tiles_of_documents(document_starts: Int[Tensor, "B T"]) -> Bool[Tensor, "B Q K"]:
    """The tiles that hold some key behind the start of their first query's document."""
    first, last = _tile_edges(document_starts.shape[1], document_starts.device)
    return last >= document_starts[:, first, None]


def _tiles_of_blocks(
    chosen: Bool[Tensor, "B T G S"], block_size: int, causal: bool
) -> Bool[Tensor, "B G Q K"]:
    """The tiles in which some query has chosen some block."""
    num_tokens = chosen.shape[1]
    first, last = _tile_edges(num_tokens, chosen.device)
    start = torch.arange(chosen.shape[-1], device=chosen.device)[:, None] * block_size
    touches = (start <= last) & (start + block_size > first)  # [S, K]
    padded = F.pad(chosen.float(), (0, 0, 0, 0, 0, -num_tokens % TILE))
    by_tile = reduce(padded, "B (Q tile) G S -> B G Q S", "max", tile=TILE)
    shown = by_tile @ touches.float() > 0
    return shown & (first <= last[:, None]) if causal else shown


def _from_tiles(shown: Bool[Tensor, "B H Q K"], mask_mod: MaskMod, seq_len: int) -> BlockMask:
    """A mask that looks, tile by tile, only where something is shown."""
    order = shown.int().argsort(dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        shown.sum(dim=-1, dtype=torch.int32),
        order.int(),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(seq_len, seq_len),
    )
