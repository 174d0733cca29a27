"""Native Sparse Attention (arXiv 2502.11089): the modules, the model and the parts they are of."""

from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.compress_networks import (
    AttentionPool,
    CompressMLP,
    CompressTransformer,
    ConvLinearCompress,
    GroupedMLP,
    MeanPool,
    PerHeadTransformer,
    SingleProjection,
    build_compress_network,
)
from nsa.config import NSAConfig
from nsa.flex import create_compress_mask, create_fine_mask, create_sliding_mask
from nsa.transformer import Transformer

__all__ = [
    "Attention",
    "AttentionPool",
    "CompressMLP",
    "CompressTransformer",
    "ConvLinearCompress",
    "GroupedMLP",
    "MeanPool",
    "NSAConfig",
    "PerHeadTransformer",
    "SingleProjection",
    "SparseAttention",
    "Transformer",
    "WindowAttention",
    "build_compress_network",
    "create_compress_mask",
    "create_fine_mask",
    "create_sliding_mask",
]
