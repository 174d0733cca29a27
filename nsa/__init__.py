"""Native Sparse Attention (arXiv 2502.11089): the layers, φ, and the model."""

from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.compress_networks import (
    AttentionPool,
    CompressMLP,
    ConvLinearCompress,
    GroupedMLP,
    MeanPool,
    SingleProjection,
    build_compress_network,
)
from nsa.compress_transformers import CompressTransformer, PerHeadTransformer
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
