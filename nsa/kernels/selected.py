"""Selected attention (eq. 12) in two loop orders.

The tile order (mask "bits"): a tile of neighbouring queries passes over every key so far and masks
by a bit. Best where the tile's queries together keep most of what is visible: short sequences.

The block order: each selection block is loaded once and meets the queries that keep it.
Best where a query keeps little of what it sees.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.blocks import Starts
from nsa.config import NSAConfig
from nsa.kernels.block_order.op import attend_blocks
from nsa.kernels.primitives import cdiv, operands, padded, whole
from nsa.kernels.tile_order.membership import membership
from nsa.kernels.tile_order.op import Mask, attend_tiles

# Up to how many tokens the tile order is taken, in multiples of those that a query keeps. Measured
# on an H100 (README.md). Short blocks are poor tiles of their own, so theirs reaches further.
TILE_REACH = 4
TILE_REACH_OF_SHORT_BLOCKS = 16
SHORT_BLOCK = 31  # tokens, at most

WIDEST_DENSE = 128  # padded head dimension up to which dense blocks pay (README.md)


def width_of(q: Tensor, v: Tensor) -> int:
    """The larger head dimension, as tiles hold it."""
    return max(padded(q.shape[3]), padded(v.shape[3]))


def longest_block(dtype: torch.dtype, width: int) -> int:
    """Tokens of a selection block that a program holds at once."""
    if dtype.itemsize == 4:
        return 64 if width <= 64 else 32 if width <= 128 else 16
    return 128 if width <= 128 else 64


def split_blocks(
    block_indices: Tensor, length: int, longest: int, num_tokens: int
) -> tuple[Tensor, int]:
    """The same tokens as blocks of at most `longest`: each index becomes those of its pieces."""
    pieces = next(n for n in range(1, length + 1) if length % n == 0 and length // n <= longest)
    if pieces == 1:
        return block_indices, length
    piece = torch.arange(pieces, dtype=torch.int32, device=block_indices.device)
    fine = block_indices[..., None] * pieces + piece
    beyond = fine >= cdiv(num_tokens, length // pieces)
    fine = fine.masked_fill((block_indices[..., None] < 0) | beyond, -1)
    return fine.flatten(-2), length // pieces


def in_order(
    block_indices: Tensor, q: Tensor, v: Tensor, cfg: NSAConfig, *, gated: bool = False
) -> tuple[bool, Tensor, int]:
    """Whether to take the tile order; the indices and the block length that the order needs."""
    indices, length = block_indices.int().contiguous(), cfg.selection_block_size
    if indices.shape[-1] == 0 or (not gated and prefers_tile_order(q.shape[1], cfg)):
        return True, indices, length
    longest = longest_block(q.dtype, width_of(q, v))
    return False, *split_blocks(indices, length, longest, q.shape[1])


def dense_blocks(cfg: NSAConfig, length: int, width: int) -> tuple[int, int]:
    """How many initial and how many local blocks to attend to densely, in blocks of `length`.

    Those that selection forces, where it pays. Without causality local blocks are not the last that
    a token sees: none is dense.
    """
    if not cfg.causal or width > WIDEST_DENSE:
        return 0, 0
    pieces = cfg.selection_block_size // length
    return cfg.num_initial_blocks * pieces, cfg.num_local_blocks * pieces


def num_words_of(k: Tensor, length: int) -> int:
    """Words of 32 bits that hold one for each selection block of k [B, T, G, D]."""
    return cdiv(cdiv(k.shape[1], length), 32)


def prefers_tile_order(num_tokens: int, cfg: NSAConfig) -> bool:
    """Whether a tile's queries keep so much of what they see that it is best to pass over all."""
    kept, length = cfg.num_selected_blocks * cfg.selection_block_size, cfg.selection_block_size
    reach = TILE_REACH_OF_SHORT_BLOCKS if length <= SHORT_BLOCK else TILE_REACH
    return num_tokens <= max(2048, reach * kept)


def selected_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    block_gates: Float[Tensor, "B T J N"] | None = None,
    *,
    document_starts: Starts = None,
) -> Float[Tensor, "B T H Dv"]:
    """Attention over the tokens of the selected blocks.

    J is G, or H, where every query head has a selection of its own.
    A token's indices are distinct, and blocks of its document. block_gates are straight-through:
    taken to be 1, they get the gradient of a factor on the scores of their block's tokens.
    """
    q, k, v = operands(q, k, v)
    tile_order, indices, length = in_order(block_indices, q, v, cfg, gated=block_gates is not None)
    if tile_order:
        words = membership(indices, num_words_of(k, length))
        mask = Mask("bits", cfg.causal, length)
        return attend_tiles(q, k, v, words, whole(document_starts), *mask)[0]
    if block_gates is not None:
        block_gates = block_gates.repeat_interleave(cfg.selection_block_size // length, dim=-1)
    sizes = length, cfg.causal, *dense_blocks(cfg, length, width_of(q, v))
    return attend_blocks(q, k, v, indices, block_gates, whole(document_starts), *sizes)[0]
