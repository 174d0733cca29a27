"""φ of eq. 7 as attention pooling: scores, softmax and sum of a block's tokens in one kernel.

Token i of block c is y_i = x_{cd+i} + e_i. With scores s_i = W y_i + p_i and, in each channel,
a = softmax of s over the block, the block's key is Σ a_i y_i. Its gradient do gives

    ds_i = a_i do (y_i - Σ a_j y_j),    dy_i = a_i do + Wᵀ ds_i,

and those of W, p and e are sums of ds_i y_iᵀ, ds_i and dy_i over blocks. Windows are never stored.
Of the backward pass, one kernel takes tokens, each with every block over it, for dX; another takes
blocks for the parameters, in partial sums that are added in a fixed order.
"""

import triton.language as tl

from nsa.kernels.jit import jit
from nsa.kernels.primitives import load_rows, store_rows


@jit
def load_tokens(
    x_ptr, positions_ptr, rows, places, live,
    D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """y: tokens that start at `rows`, plus the learned vectors of their places."""
    features = tl.arange(0, PADDED_D)[None, :]
    mask = live[:, None] & (features < D)
    y = tl.load(x_ptr + rows[:, None] + features, mask=mask, other=0.0)
    if positions_ptr is not None:
        at = positions_ptr + places[:, None] * D + features
        y += tl.load(at, mask=mask, other=0.0).to(y.dtype)
    return y


@jit
def load_weight(weight_ptr, dtype, D: tl.constexpr, PADDED_D: tl.constexpr):
    """W, to which a score is a row."""
    rows = tl.arange(0, PADDED_D)
    return load_rows(weight_ptr, rows, rows < D, D, PADDED_D).to(dtype)


@jit
def score(
    y, weight, scores_ptr, place, live,
    D: tl.constexpr, PADDED_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s: W y and the scores of the places."""
    of_place = load_rows(scores_ptr, place, live, D, PADDED_D).to(tl.float32)
    return tl.dot(y, tl.trans(weight), of_place, input_precision=PRECISION)


@jit
def attention_pool_kernel(
    x_ptr, weight_ptr, scores_ptr, positions_ptr, out_ptr, lse_ptr, C, stride_b, stride_t, stride_g,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of one head: their keys, and the log of each softmax's sum."""
    tiles = tl.cdiv(C, BLOCKS)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, g = (head // G).to(tl.int64), head % G
    row = tl.arange(0, BLOCKS * PADDED_SIZE)
    c, place = tile * BLOCKS + row // PADDED_SIZE, row % PADDED_SIZE
    live = (c < C) & (place < SIZE)
    if positions_ptr is not None:
        positions_ptr += g * SIZE * D
    rows = b * stride_b + (c * STRIDE + place).to(tl.int64) * stride_t + g * stride_g
    y = load_tokens(x_ptr, positions_ptr, rows, place, live, D, PADDED_D)
    weight = load_weight(weight_ptr, y.dtype, D, PADDED_D)
    scores = score(y, weight, scores_ptr, place, live, D, PADDED_D, PRECISION)
    scores = tl.where((place < SIZE)[:, None], scores, float("-inf"))
    by_block = tl.reshape(scores, [BLOCKS, PADDED_SIZE, PADDED_D])
    most = tl.max(by_block, 1)
    weights = tl.exp(by_block - most[:, None, :])
    total = tl.sum(weights, 1)
    tokens = tl.reshape(y.to(tl.float32), [BLOCKS, PADDED_SIZE, PADDED_D])
    out = tl.sum(weights * tokens, 1) / total
    c = tile * BLOCKS + tl.arange(0, BLOCKS)
    key = (b * C + c) * G + g
    store_rows(out_ptr, key, c < C, out, D, PADDED_D)
    store_rows(lse_ptr, key, c < C, most + tl.log(total), D, PADDED_D)


@jit
def score_gradients(
    y, weight, scores_ptr, place, out_ptr, lse_ptr, dout_ptr, key, live,
    D: tl.constexpr, PADDED_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a do and ds of tokens y at places of the blocks whose rows are `key`; 0 where not live."""
    scores = score(y, weight, scores_ptr, place, live, D, PADDED_D, PRECISION)
    scores -= load_rows(lse_ptr, key, live, D, PADDED_D)
    dout = load_rows(dout_ptr, key, live, D, PADDED_D).to(tl.float32)
    out = load_rows(out_ptr, key, live, D, PADDED_D).to(tl.float32)
    weighed = tl.where(live[:, None], tl.exp(scores), 0.0) * dout
    return weighed, weighed * (y.to(tl.float32) - out)


@jit
def attention_pool_dx_kernel(
    x_ptr, weight_ptr, scores_ptr, positions_ptr, out_ptr, lse_ptr, dout_ptr, dx_ptr, T, C,
    stride_b, stride_t, stride_g,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head: dX, from each block over them."""
    tiles = tl.cdiv(T, ROWS)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, g = (head // G).to(tl.int64), head % G
    t = tile * ROWS + tl.arange(0, ROWS)
    rows = b * stride_b + t.to(tl.int64) * stride_t + g * stride_g
    if positions_ptr is not None:
        positions_ptr += g * SIZE * D
    dtype = x_ptr.dtype.element_ty
    weight = load_weight(weight_ptr, dtype, D, PADDED_D)
    dx = tl.zeros([ROWS, PADDED_D], tl.float32)
    for back in tl.static_range((SIZE + STRIDE - 1) // STRIDE):
        c, place = t // STRIDE - back, t % STRIDE + back * STRIDE
        live = (t < T) & (place < SIZE) & (c >= 0) & (c < C)
        y = load_tokens(x_ptr, positions_ptr, rows, place, live, D, PADDED_D)
        weighed, ds = score_gradients(
            y, weight, scores_ptr, place, out_ptr, lse_ptr, dout_ptr, (b * C + c) * G + g, live,
            D, PADDED_D, PRECISION,
        )  # fmt: skip
        dx = tl.dot(ds.to(dtype), weight, dx + weighed, input_precision=PRECISION)
    store_rows(dx_ptr, (b * T + t) * G + g, t < T, dx, D, PADDED_D)


@jit
def attention_pool_dw_kernel(
    x_ptr, weight_ptr, scores_ptr, positions_ptr, out_ptr, lse_ptr, dout_ptr, sums_ptr, B, C,
    stride_b, stride_t, stride_g,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th BLOCKS blocks of head g: their share of dW, dp and de."""
    program, programs, g = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = tl.arange(0, BLOCKS * PADDED_SIZE)
    place = row % PADDED_SIZE
    if positions_ptr is not None:
        positions_ptr += g * SIZE * D
    dtype = x_ptr.dtype.element_ty
    weight = load_weight(weight_ptr, dtype, D, PADDED_D)
    dweight = tl.zeros([PADDED_D, PADDED_D], tl.float32)
    dscores = tl.zeros([BLOCKS * PADDED_SIZE, PADDED_D], tl.float32)  # a row sums its own place
    dpositions = tl.zeros([BLOCKS * PADDED_SIZE, PADDED_D], tl.float32)
    tiles = tl.cdiv(C, BLOCKS)
    for tile in tl.range(program, B * tiles, programs, num_stages=1):
        b = (tile // tiles).to(tl.int64)
        c = tile % tiles * BLOCKS + row // PADDED_SIZE
        live = (c < C) & (place < SIZE)
        rows = b * stride_b + (c * STRIDE + place).to(tl.int64) * stride_t + g * stride_g
        y = load_tokens(x_ptr, positions_ptr, rows, place, live, D, PADDED_D)
        weighed, ds = score_gradients(
            y, weight, scores_ptr, place, out_ptr, lse_ptr, dout_ptr, (b * C + c) * G + g, live,
            D, PADDED_D, PRECISION,
        )  # fmt: skip
        dscores += ds
        dpositions += weighed
        dweight = tl.dot(tl.trans(ds.to(dtype)), y, dweight, input_precision=PRECISION)
    dpositions = tl.dot(dscores.to(dtype), weight, dpositions, input_precision=PRECISION)
    dscores = tl.sum(tl.reshape(dscores, [BLOCKS, PADDED_SIZE, PADDED_D]), 0)
    dpositions = tl.sum(tl.reshape(dpositions, [BLOCKS, PADDED_SIZE, PADDED_D]), 0)
    # [programs, G, rows of W | rows of p | rows of e, D]
    sums_ptr += (program * G + g).to(tl.int64) * (D + 2 * SIZE) * D
    channel, place = tl.arange(0, PADDED_D), tl.arange(0, PADDED_SIZE)
    store_rows(sums_ptr, channel, channel < D, dweight, D, PADDED_D)
    store_rows(sums_ptr + D * D, place, place < SIZE, dscores, D, PADDED_D)
    store_rows(sums_ptr + (D + SIZE) * D, place, place < SIZE, dpositions, D, PADDED_D)
