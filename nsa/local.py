"""The sliding window through the `local-attention` library: memory of T x w instead of T x T."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from local_attention import LocalAttention
from torch import Tensor

from nsa.config import NSAConfig


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
) -> Float[Tensor, "B T H Dv"]:
    """`reference.sliding_window_attention`, by the library: exactly w keys, own one included."""
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
