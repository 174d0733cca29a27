"""Which keys a token sees, and which tokens see a key, under the masks of kernels.py.

Documents that share a row bound both: by `starts`, for each token the first token of its document,
and by `ends`, for each token the first one behind it. Both are None where a row is one document.
"""

import triton.language as tl

from nsa.kernels.jit import jit


@jit
def document_start(starts_ptr, b, t, T):
    """The first token of t's document in sequence b; 0 behind the last token."""
    if starts_ptr is None:
        return t * 0
    else:
        return tl.load(starts_ptr + b * T + t, mask=t < T, other=0)


@jit
def seen_keys(
    t, start, num_keys,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SPAN: tl.constexpr, STRIDE: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """The interval [first, end) of keys that token t may see; both ends grow with t.

    start is that of t's document. Memory keys, which stand before the others, are seen besides.
    """
    first = start
    end = t * 0 + num_keys
    if MASK == "band":
        first = tl.maximum(t - SPAN + 1, start)
    if MASK == "prefix":
        first = tl.where(start > 0, MEMORY + start // STRIDE, 0)
    if CAUSAL:
        end = t + 1
        if MASK == "prefix":
            end = MEMORY + tl.maximum(t + 1 - SPAN + STRIDE, 0) // STRIDE
    elif MASK == "band":
        end = t + SPAN
    return first, tl.minimum(end, num_keys)


@jit
def sees(offs_s, first, end, MEMORY: tl.constexpr):
    """Whether keys lie in [first, end), or are memory keys."""
    seen = (offs_s >= first) & (offs_s < end)
    if MEMORY > 0:
        seen = seen | (offs_s < MEMORY)
    return seen


@jit
def key_range(
    first, end, MASK: tl.constexpr, MEMORY: tl.constexpr, KEYS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Where a loop over tiles of the keys [first, end) begins and ends, and how far it leaps.

    It begins with the tiles that hold memory keys, and leaps (`leap`) from them to `first`.
    """
    if DOCUMENTS and MEMORY > 0:
        distance = tl.maximum(first - (MEMORY + KEYS - 1) // KEYS * KEYS, 0)
        return first * 0, tl.maximum(end - distance, MEMORY), distance
    elif DOCUMENTS and MASK == "bits":  # the blocks of a tile lie in one word
        return first // KEYS * KEYS, end, first * 0
    else:
        return first, end, first * 0


@jit
def leap(s0, distance, MEMORY: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The key at which the tile begins that a loop counts as s0."""
    if DOCUMENTS and MEMORY > 0:
        return tl.where(s0 < MEMORY, s0, s0 + distance)
    else:
        return s0


@jit
def seeing_tokens(
    s_lo, s_hi, T,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SPAN: tl.constexpr, STRIDE: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """The interval [first, end) of tokens that may see any of the keys s_lo ... s_hi.

    Of a document's key they end with the document: `document_end`.
    """
    first = s_lo * 0
    end = s_lo * 0 + T
    if MASK == "band":
        end = tl.minimum(s_hi + SPAN, T)
    if CAUSAL:
        first = s_lo
        if MASK == "prefix":
            ended = (s_lo - MEMORY) * STRIDE + SPAN - 1  # the token that ends block s_lo
            first = tl.where(s_lo < MEMORY, 0, ended)
    elif MASK == "band":
        first = tl.maximum(s_lo - SPAN + 1, 0)
    return first, end


@jit
def document_end(
    ends_ptr, b, offs_s, live_s, T,
    MASK: tl.constexpr, STRIDE: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """The end of the document in which each key begins; T of memory keys, and where not live."""
    if ends_ptr is None:
        return offs_s * 0 + T
    else:
        token = offs_s
        if MASK == "prefix":
            token = (offs_s - MEMORY) * STRIDE
        return tl.load(ends_ptr + b * T + token, mask=live_s & (offs_s >= MEMORY), other=T)


@jit
def word_row(words_ptr, bj, num_words, T, s0, SPAN: tl.constexpr):
    """Where the words that hold the blocks of key tile s0 begin: one for each token."""
    return words_ptr + (bj * num_words + s0 // SPAN // 32) * T


@jit
def has_bit(word, offs_s, SPAN: tl.constexpr):
    return ((word >> (offs_s // SPAN % 32)) & 1) != 0
