"""A block of the Transformer: attention, then feed-forward, on a residual stream.

Letters: B batch, T tokens, M model width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import LayerCache
from nsa.layer import AttentionLayer


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): the hidden width is `expand` times the model's, in steps of 64."""

    def __init__(self, dim: int, expand: float = 8 / 3) -> None:
        super().__init__()
        hidden = -(-int(dim * expand) // 64) * 64
        self.norm = nn.RMSNorm(dim)
        self.to_hidden = nn.Linear(dim, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, tokens: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        hidden, gate = self.to_hidden(self.norm(tokens)).chunk(2, dim=-1)
        return self.to_out(hidden * F.silu(gate))


class Block(nn.Module):
    """Attention, then feed-forward; both norm their own input and add to the residual stream."""

    def __init__(
        self, attention: AttentionLayer, feed_forward: FeedForward, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)
        self.checkpoint: Callable[..., Tensor] | None = None  # nsa.training.parallel decides

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        counts: Int[Tensor, " B"] | None = None,
        document_starts: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Arguments as in `SparseAttention.forward`; the cache takes the tokens in."""
        if cache is not None:
            tokens = tokens + self.attention(tokens, cache=cache, counts=counts)
            return tokens + self.feed_forward(tokens)
        if self.checkpoint is None:
            return self._forward(tokens, document_starts)
        return self.checkpoint(self._forward, tokens, document_starts)

    def _forward(
        self, tokens: Float[Tensor, "B T M"], document_starts: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T M"]:
        # A layer kind of one's own need not know of documents.
        told = {} if document_starts is None else {"document_starts": document_starts}
        tokens = tokens + self.dropout(self.attention(tokens, **told))
        return tokens + self.dropout(self.feed_forward(tokens))
