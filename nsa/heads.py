"""What `SparseAttention` makes of tokens, step by step: heads, what branches need, branches.

Letters as in `nsa.reference`.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Heads(NamedTuple):
    """Tokens as `SparseAttention` projects them: nothing rotated, nothing compressed.

    *B is B T, or B alone where each sequence has one token.
    """

    q: Float[Tensor, "*B H D"]
    k_cmp: Float[Tensor, "*B G D"]
    v_cmp: Float[Tensor, "*B G D"]
    k_slc: Float[Tensor, "*B G D"]
    v_slc: Float[Tensor, "*B G D"]
    k_win: Float[Tensor, "*B G D"]
    v_win: Float[Tensor, "*B G D"]
    gates: Float[Tensor, "*B H 3"]


class Branches(NamedTuple):
    """What each branch of `SparseAttention` gives, before the gates weigh it."""

    compressed: Float[Tensor, "B T H D"]
    selected: Float[Tensor, "B T H D"]
    sliding: Float[Tensor, "B T H D"]
    gates: Float[Tensor, "B T H 3"]  # 0 to 1, of compressed, selected, sliding
    block_indices: Int[Tensor, "B T J N"]  # int32, -1 in empty slots; J is G, or H if not shared


class Projected(NamedTuple):
    """What `SparseAttention` computes its branches and their sum from."""

    q: Float[Tensor, "B T H D"]
    k_cmp: Float[Tensor, "B C G D"]
    v_cmp: Float[Tensor, "B C G D"]
    mem_k: Float[Tensor, "G Nm D"] | None
    mem_v: Float[Tensor, "G Nm D"] | None
    q_rot: Float[Tensor, "B T H D"]
    k_slc: Float[Tensor, "B T G D"]
    v_slc: Float[Tensor, "B T G D"]
    k_win: Float[Tensor, "B T G D"]
    v_win: Float[Tensor, "B T G D"]
    gates: Float[Tensor, "B T H 3"]
    document_starts: Int[Tensor, "B T"] | None = None  # see nsa.documents; None: one a row
