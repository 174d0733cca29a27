"""Compressed attention (eq. 7): every block that has ended, and memory keys before them."""

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.blocks import Starts
from nsa.config import NSAConfig
from nsa.kernels.primitives import operands, whole
from nsa.kernels.tile_order.op import Mask, attend_tiles


def compressed_attention(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    v_cmp: Float[Tensor, "B C G Dv"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    mem_v: Float[Tensor, "G Nm Dv"] | None = None,
    *,
    document_starts: Starts = None,
) -> tuple[Float[Tensor, "B T H Dv"], Float[Tensor, "B T H"]]:
    """Output and the natural-log sum of exponents (float32), both differentiable.

    Where nothing is visible the output is 0 and lse is -inf.
    """
    memories = 0
    if mem_k is not None and mem_v is not None:
        memories = mem_k.shape[1]
        k_cmp, v_cmp = with_memory(mem_k, k_cmp), with_memory(mem_v, v_cmp)
    q, k_cmp, v_cmp = operands(q, k_cmp, v_cmp)
    span, stride = cfg.compress_block_size, cfg.compress_block_sliding_stride
    mask = Mask("prefix", cfg.causal, span, stride, memories)
    return attend_tiles(q, k_cmp, v_cmp, None, whole(document_starts), *mask)


def with_memory(
    memory: Float[Tensor, "G Nm D"], keys: Float[Tensor, "B C G D"]
) -> Float[Tensor, "B K G D"]:
    """Memory keys stand before the compressed ones."""
    memory = memory.transpose(0, 1).expand(keys.shape[0], -1, -1, -1)
    return torch.cat([memory.to(keys.dtype), keys], dim=1)
