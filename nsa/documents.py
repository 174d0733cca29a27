"""Documents that share a row: where they start, and how to lay them out for sparse attention.

`document_starts`, int32 [B, T], is their one form from batch to kernel: for each token, the first
token of its document. A document ends where the next one starts, or the row; what fills it up
behind its last real token belongs to it, and no real token sees that.

Blocks restart with each document where documents start at multiples of l' (`selection_block_size`,
which d divides): blocks then lie as they would if each document stood alone. `Layout` moves
documents that start anywhere to such places and back. Nothing here waits for the GPU, and all
shapes follow from shapes. Letters: B rows, T tokens, L tokens of the layout.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

Starts = Int[Tensor, "B T"]


def document_starts(borders: Int[Tensor, "B N"], num_tokens: int) -> Starts:
    """From ascending borders in each row (`cu_seqlens`: the first is 0), of T = `num_tokens`.

    Borders at or behind the row's end are no documents: they fill rows up that have fewer.
    """
    t = torch.arange(num_tokens, device=borders.device).expand(len(borders), -1).contiguous()
    document = torch.searchsorted(borders.contiguous(), t, right=True) - 1
    return borders.gather(1, document).int()


def document_ends(document_starts: Starts) -> Starts:
    """For each token, the first token behind its document, int32."""
    starts = document_starts.contiguous()
    return torch.searchsorted(starts, starts, right=True, out_int32=True)


class Extents(NamedTuple):
    """Where the documents of a row start and end, by token; None twice where a row is one."""

    starts: Starts | None
    ends: Starts | None


def extents_of(document_starts: Starts | None) -> Extents:
    """`Extents` of documents, or of none."""
    if document_starts is None:
        return Extents(None, None)
    return Extents(document_starts, document_ends(document_starts))


def positions(document_starts: Starts) -> Starts:
    """Where each token stands in its document."""
    tokens = torch.arange(document_starts.shape[1], device=document_starts.device)
    return tokens.int() - document_starts


class Layout(NamedTuple):
    """Where the tokens of documents stand once each document starts at a multiple of l'."""

    document_starts: Int[Tensor, "B L"]  # of the layout
    slots: Int[Tensor, "B T"]  # where each token stands in it

    def align(self, x: Tensor) -> Tensor:
        """[B L ...] from [B T ...], zero where no token stands."""
        B, L = self.document_starts.shape
        return x.new_zeros(B, L, *x.shape[2:]).scatter(1, self._slots_of(x), x)

    def unalign(self, x: Tensor) -> Tensor:
        """[B T ...] from [B L ...]."""
        return x.gather(1, self._slots_of(x))

    def _slots_of(self, x: Tensor) -> Tensor:
        slots = self.slots.reshape(*self.slots.shape, *[1] * (x.ndim - 2))
        return slots.expand(*self.slots.shape, *x.shape[2:])


def layout(document_starts: Starts, alignment: int, length: int) -> Layout:
    """The layout of `length` tokens a row for documents that start anywhere.

    Raises:
        ValueError: on a CPU, where a row does not fit. On a GPU an assertion of the device fails.
    """
    first = positions(document_starts) == 0
    size = document_ends(document_starts) - document_starts
    taken = -(-size // alignment) * alignment  # of the layout, by the token's document
    aligned_start = (taken * first).cumsum(1) - taken
    slots = aligned_start + positions(document_starts)
    check_values(
        (slots < length).all(),
        f"documents aligned to {alignment} need more than {length} tokens a row: raise the length",
    )
    starts = slots.new_zeros(len(slots), length)
    starts = starts.scatter_reduce(1, slots, aligned_start, "amax").cummax(1).values
    return Layout(starts.int(), slots)


def check_documents(document_starts: Tensor, num_rows: int, num_tokens: int, align: int) -> None:
    """Raises ValueError unless these are the starts of documents at multiples of `align`.

    Values on a GPU are asserted there, so that nothing waits for them.
    """
    shape = tuple(document_starts.shape)
    if shape != (num_rows, num_tokens) or document_starts.dtype != torch.int32:
        raise ValueError(
            f"document_starts has shape {shape} and dtype {document_starts.dtype}: it must be "
            f"torch.int32 of shape {(num_rows, num_tokens)}, for each token the first token of its "
            "document"
        )
    starts, t = document_starts, torch.arange(num_tokens, device=document_starts.device)
    goes_on = (starts[:, 1:] == starts[:, :-1]) | (starts[:, 1:] == t[1:])
    check_values(
        goes_on.all() & (starts[:, :1] == 0).all() & (starts % align == 0).all(),
        "document_starts must give each token the first token of its document, and documents must "
        f"start at multiples of {align}, as blocks do (nsa.documents.layout moves them there)",
    )


def check_no_cache(document_starts: Starts | None, caches: bool) -> None:
    """Raises ValueError where documents meet a cache."""
    if document_starts is not None and caches:
        raise ValueError(
            "document_starts with a cache: a cache holds one document a row, so give each document "
            "a row of its own"
        )


def check_values(holds: Tensor, message: str) -> None:
    """Raises ValueError on a CPU; on a GPU, or compiled, an assertion that nothing waits for."""
    if holds.is_cuda or torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(holds, message)
    elif not holds:
        raise ValueError(message)
