"""Sliding-window attention: the last w tokens, the query's own included."""

from jaxtyping import Float
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.primitives import operands
from nsa.kernels.tile_order.op import Mask, attend_tiles


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
) -> Float[Tensor, "B T H Dv"]:
    """Attention over 0 <= t - s < w; over |t - s| < w, if not causal."""
    q, k, v = operands(q, k, v)
    return attend_tiles(q, k, v, None, *Mask("band", cfg.causal, cfg.sliding_window_size))[0]
