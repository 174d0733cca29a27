"""Who keeps which block, for the block order: inverted lists, one of slots for every block.

Slot ((b * J + j) * T + t) * N + n names block block_indices[b, t, j, n]: the slots of an index head
(b, j) lie together. Sorting them by block, stably, gives every block of a head the list of its
slots, in the order of their tokens. Slots are many, so they are taken in chunks: several heads
whole, or a run of one head's tokens. Long lists (block 0 is in everyone's) are cut into items of
bounded length. All sizes follow from shapes, so nothing waits for the host.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv, div_mod

PARTIAL_BYTES = (2**28, 2**30)  # partial results of a chunk: least and most
ITEM_ROWS = 4096  # packed rows of one work item, about


@jit
def list_key_kernel(
    indices_ptr, keys_ptr, num_slots, T, num_blocks, chunk_heads, chunk_tokens, last,
    J: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """SLOTS slots: the list each belongs to, (chunk, head, block); `last` for empty ones."""
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    bj, t = slot // N // T, slot // N % T
    index = ((bj // J * T + t) * J + bj % J) * N + slot % N
    block = tl.load(indices_ptr + index, mask=slot < num_slots, other=-1)
    chunk = bj // chunk_heads * tl.cdiv(T, chunk_tokens) + t // chunk_tokens
    key = (chunk * chunk_heads + bj % chunk_heads) * num_blocks + block
    key = tl.where(block >= 0, key, last).to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + slot, key, mask=slot < num_slots)


@jit(do_not_specialize=["runs"])
def cut_kernel(
    starts_ptr, ends_ptr, item_lists_ptr, shared_ends_ptr, num_lists, num_items, runs, all_lists,
    ITEM: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """One chunk: its lists, one after the other, cut into items of at most ITEM slots.

    An empty list has an item, too, which writes zeros; one of a head that is not there has none.
    """
    chunk = tl.program_id(0)
    starts_ptr += chunk * num_lists
    ends_ptr += chunk * num_lists
    shared_ends_ptr += chunk * num_lists
    item_lists_ptr += chunk * num_items
    end, shared_end = 0, 0
    for l0 in range(0, num_lists, LISTS):
        list_id = l0 + tl.arange(0, LISTS)
        live = list_id < num_lists
        start = tl.load(starts_ptr + list_id, mask=live, other=0)
        items = tl.cdiv(tl.load(starts_ptr + list_id + 1, mask=live, other=0) - start, ITEM)
        there = live & (chunk // runs * num_lists + list_id < all_lists)
        items = tl.where(there, tl.maximum(items, 1), 0)
        shared = tl.where(items > 1, items, 0)
        ends = end + tl.cumsum(items, 0)
        tl.store(ends_ptr + list_id, ends, mask=live)
        tl.store(shared_ends_ptr + list_id, shared_end + tl.cumsum(shared, 0), mask=live)
        for place in range(tl.max(items, 0)):
            tl.store(item_lists_ptr + ends - items + place, list_id, mask=place < items)
        end += tl.sum(items, 0)
        shared_end += tl.sum(shared, 0)


@jit
def find_item(item_lists_ptr, ends_ptr, starts_ptr, item, ITEM: tl.constexpr):
    """The list of a work item, its place among that list's items, their number, its slots."""
    list_id = tl.load(item_lists_ptr + item)
    before = tl.load(ends_ptr + list_id - 1, mask=list_id > 0, other=0)
    place = item - before
    count = tl.load(ends_ptr + list_id) - before
    lo = tl.load(starts_ptr + list_id) + place * ITEM
    hi = tl.minimum(lo + ITEM, tl.load(starts_ptr + list_id + 1))
    return list_id, place, count, lo, hi


@jit
def load_slots(slots_ptr, lo, hi, offs_i, R: tl.constexpr):
    """The slots of packed rows of an item.

    Called a tile ahead: queries can be gathered early only if their addresses are known by then.
    """
    i = div_mod(offs_i, R)[0]
    return tl.load(slots_ptr + lo + i, mask=lo + i < hi, other=0)


class Plan(NamedTuple):
    """How the block order cuts its work; a function of shapes alone."""

    heads: int  # a chunk's index heads (b, j)
    tokens: int  # and how many of their tokens: all, if there are several heads
    chunks: int
    runs: int  # chunks that an index head's tokens fill
    lists: int  # a chunk's: index heads x selection blocks
    all_lists: int  # every index head x selection blocks
    item: int  # slots of a work item, at most
    items: int  # a chunk's work items, at most
    shared: int  # of these, items of lists that have several, at most


class Work(NamedTuple):
    """The slots in their lists, and how they are cut into items: of each chunk [chunks, ...]."""

    plan: Plan
    length: int  # tokens of a block
    causal: bool
    slots: Tensor
    starts: Tensor  # where each list starts in slots
    ends: Tensor  # where each list's items end
    item_lists: Tensor  # the list of each item
    shared_ends: Tensor  # as ends, with only lists of several items counted


class Chunk(NamedTuple):
    """Index heads first_head ... and their tokens first_token ..., as many as there are."""

    number: int
    first_head: int
    heads: int
    first_token: int
    tokens: int


def plan_work(q: Tensor, block_indices: Tensor, length: int, width: int) -> Plan:
    B, T, J, N = block_indices.shape
    R = q.shape[2] // J
    if B * T * J * N >= 2**31:
        raise ValueError(
            f"{B} x {T} tokens x {J} heads x {N} selected blocks are 2**31 slots or more: "
            "use a smaller micro-batch"
        )
    least, most = PARTIAL_BYTES
    budget = min(max(4 * q.numel() * q.element_size(), least), most)
    fitting = max(64, budget // (N * R * width * q.element_size()))  # tokens of an index head
    heads = cdiv(B * J, cdiv(B * J, max(1, fitting // T)))
    runs = cdiv(T, fitting)
    tokens = T if runs == 1 else cdiv(cdiv(T, runs), 64) * 64
    runs = cdiv(T, tokens)
    num_blocks, slots = cdiv(T, length), heads * tokens * N
    lists, item = heads * num_blocks, max(64, ITEM_ROWS // R)
    return Plan(
        heads, tokens, cdiv(B * J, heads) * runs, runs, lists, B * J * num_blocks, item,
        items=lists + slots // item, shared=2 * slots // item + 1,
    )  # fmt: skip


def chunks_of(plan: Plan, num_heads: int, num_tokens: int) -> Iterator[Chunk]:
    for number in range(plan.chunks):
        head, token = number // plan.runs * plan.heads, number % plan.runs * plan.tokens
        heads, tokens = min(plan.heads, num_heads - head), min(plan.tokens, num_tokens - token)
        yield Chunk(number, head, heads, token, tokens)


def sort_slots(block_indices: Tensor, plan: Plan, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Slots [B*J*T*N] int32 in the order of their lists; where each list starts, int32."""
    _, T, J, N = block_indices.shape
    last = plan.chunks * plan.lists
    dtype = torch.int16 if last < 2**15 else torch.int32  # half of the passes, where it suffices
    keys = torch.empty(block_indices.numel(), dtype=dtype, device=block_indices.device)
    list_key_kernel[(cdiv(keys.numel(), 1024),)](
        block_indices, keys, keys.numel(), T, num_blocks, plan.heads, plan.tokens, last,
        J=J, N=N, SLOTS=1024, num_warps=4,
    )  # fmt: skip
    keys, slots = torch.sort(keys, stable=True)
    lists = torch.arange(last + 1, dtype=dtype, device=keys.device)
    return slots.int(), torch.searchsorted(keys, lists, out_int32=True)


def cut_items(slots: Tensor, starts: Tensor, plan: Plan, length: int, *, causal: bool) -> Work:
    """The lists of every chunk, cut into items."""
    shapes = ((plan.chunks, plan.lists), (plan.chunks, plan.items), (plan.chunks, plan.lists))
    cut = [torch.empty(shape, dtype=torch.int32, device=starts.device) for shape in shapes]
    cut_kernel[(plan.chunks,)](
        starts, *cut, plan.lists, plan.items, plan.runs, plan.all_lists,
        ITEM=plan.item, LISTS=1024, num_warps=4,
    )  # fmt: skip
    return Work(plan, length, causal, slots, starts, *cut)
