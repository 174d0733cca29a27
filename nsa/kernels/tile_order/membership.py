"""Who keeps which block, for the tile order: a bit for every block of a token."""

import torch
import triton.language as tl
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv, power_of_2
from nsa.kernels.registration import custom_op, register_fake


@jit
def membership_kernel(
    indices_ptr, words_ptr, T, num_words,
    J: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one index head: words [B, J, W, T] of a bit per kept block."""
    num_tiles = tl.cdiv(T, TOKENS)
    bj = (tl.program_id(0) // num_tiles).to(tl.int64)
    t = tl.program_id(0) % num_tiles * TOKENS + tl.arange(0, TOKENS)
    live = t < T
    n = tl.arange(0, PADDED_N)[None, :]
    slots = ((bj // J * T + t)[:, None] * J + bj % J) * N + n
    block = tl.load(indices_ptr + slots, mask=live[:, None] & (n < N), other=-1)
    for w in range(num_words):
        bits = tl.where((block >= 0) & (block // 32 == w), 1 << (block & 31), 0)
        tl.store(words_ptr + (bj * num_words + w) * T + t, tl.xor_sum(bits, 1), mask=live)


@custom_op
def membership(block_indices: Tensor, num_words: int) -> Tensor:
    """Words [B, J, num_words, T]: a bit for every block a token keeps."""
    B, T, J, N = block_indices.shape
    shape, device = (B, J, num_words, T), block_indices.device
    if N == 0:
        return torch.zeros(shape, dtype=torch.int32, device=device)
    words = torch.empty(shape, dtype=torch.int32, device=device)
    tokens = max(1, 2048 // power_of_2(N))
    with torch.cuda.device_of(words):
        membership_kernel[(cdiv(T, tokens) * B * J,)](
            block_indices, words, T, num_words,
            J=J, N=N, PADDED_N=power_of_2(N), TOKENS=tokens, num_warps=4,
        )  # fmt: skip
    return words


@register_fake(membership)
def _(block_indices, num_words):
    B, T, J, _ = block_indices.shape
    return block_indices.new_empty(B, J, num_words, T)
