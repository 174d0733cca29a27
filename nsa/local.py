"""The sliding window in memory of T x w instead of T x T, through the `local-attention` library.

Documents that share a row are beyond the library, whose masks know keys but no queries: for them
the same tiles, each of w queries against twice as many keys, go through PyTorch's own attention.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from local_attention import LocalAttention
from torch import Tensor

from nsa import blocks
from nsa.config import NSAConfig


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
    *,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T H Dv"]:
    """`reference.sliding_window_attention`: exactly w keys, own one included."""
    if document_starts is not None:
        return _within_documents(q, k, v, cfg, document_starts)
    num_tokens, heads_per_group = q.shape[1], q.shape[2] // k.shape[2]
    # The library counts the keys on one side of the query, and needs at least one.
    reach = min(max(cfg.sliding_window_size - 1, 1), num_tokens)
    attend = LocalAttention(
        window_size=reach,
        causal=cfg.causal,
        look_backward=1,
        look_forward=0 if cfg.causal else 1,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    out = attend(
        rearrange(q, "B T H D -> B H T D"),
        repeat(k, "B T G D -> B (G R) T D", R=heads_per_group),
        repeat(v, "B T G D -> B (G R) T D", R=heads_per_group),
        # Causal queries cannot reach the padding behind the sequence; for the others it is masked.
        mask=None if cfg.causal else q.new_ones(q.shape[0], num_tokens, dtype=torch.bool),
        attn_bias=_own_key_only(q, cfg) if cfg.sliding_window_size == 1 else None,
    )
    return rearrange(out, "B H T D -> B T H D")


def _own_key_only(q: Tensor, cfg: NSAConfig) -> Float[Tensor, "1 1 K"]:
    """Hides the neighbours that the library's shortest reach shows: keys t - 1, t (and t + 1)."""
    bias = q.new_full((1, 1, 2 if cfg.causal else 3), torch.finfo(q.dtype).min / 2)
    bias[..., 1] = 0.0
    return bias


def _within_documents(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
    document_starts: Int[Tensor, "B T"],
) -> Float[Tensor, "B T H Dv"]:
    num_tokens = q.shape[1]
    size = min(cfg.sliding_window_size, num_tokens)
    tiles = -(-num_tokens // size)

    def tiled(x: Tensor) -> Tensor:
        """[(B tiles) size ...], zero behind the last token."""
        behind = x.new_zeros(len(x), tiles * size - num_tokens, *x.shape[2:])
        return torch.cat([x, behind], dim=1).unflatten(1, (tiles, size)).flatten(0, 1)

    def with_tile_before(x: Tensor) -> Tensor:
        x = tiled(x).unflatten(0, (-1, tiles))
        before = F.pad(x, [0, 0] * (x.ndim - 2) + [1, -1])  # of the first one: zeros
        return torch.cat([before, x], dim=2).flatten(0, 1)

    t = torch.arange(tiles * size, device=q.device).view(tiles, size, 1)
    s = t.transpose(1, 2)
    s = torch.cat([s - size, s], dim=2)
    starts = tiled(document_starts).view(-1, tiles, size, 1)
    seen = blocks.in_window(t, s, cfg, starts) & (s >= 0)  # [B, tiles, size, 2 size]
    tiles_of_qkv = tiled(q), with_tile_before(k), with_tile_before(v)
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in tiles_of_qkv)
    grouped = k.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen.flatten(0, 1)[:, None], enable_gqa=grouped
    )
    return rearrange(out, "(B tiles) h t d -> B (tiles t) h d", tiles=tiles)[:, :num_tokens]
