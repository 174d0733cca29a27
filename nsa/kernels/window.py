"""Sliding-window attention: the last w tokens, the query's own included."""

from jaxtyping import Float
from torch import Tensor

from nsa.blocks import Starts
from nsa.config import NSAConfig
from nsa.kernels.primitives import operands, whole
from nsa.kernels.tile_order.op import Mask, attend_tiles


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
    *,
    document_starts: Starts = None,
) -> Float[Tensor, "B T H Dv"]:
    """Attention over 0 <= t - s < w; over |t - s| < w, if not causal."""
    q, k, v = operands(q, k, v)
    mask = Mask("band", cfg.causal, cfg.sliding_window_size)
    return attend_tiles(q, k, v, None, whole(document_starts), *mask)[0]
