"""Triton kernels for every operation, with the signatures of `nsa.reference`.

Importing this package needs Triton. Kernels run on CUDA devices, and on a CPU in Triton's
interpreter (TRITON_INTERPRET=1, float32).
"""

from nsa.kernels.append import append_block, append_token
from nsa.kernels.attention_pooling.op import attention_pool
from nsa.kernels.combine import combine
from nsa.kernels.compressed import compressed_attention
from nsa.kernels.decode import cached_attention
from nsa.kernels.gated import gated_attention
from nsa.kernels.pooling import block_means
from nsa.kernels.rotary import rotate
from nsa.kernels.select import select_blocks
from nsa.kernels.selected import selected_attention
from nsa.kernels.selected_importance import selected_importance
from nsa.kernels.window import sliding_window_attention

__all__ = [
    "append_block",
    "append_token",
    "attention_pool",
    "block_means",
    "cached_attention",
    "combine",
    "compressed_attention",
    "gated_attention",
    "rotate",
    "select_blocks",
    "selected_attention",
    "selected_importance",
    "sliding_window_attention",
]
