"""Native Sparse Attention (arXiv 2502.11089): the layers, φ, and the model."""

import einops
import torch

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

# Calls stay whole: a compiler that looked inside would spend most of its time reading patterns.
for _call in (einops.rearrange, einops.repeat, einops.reduce, einops.einsum):
    torch.compiler.allow_in_graph(_call)

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
