"""Dense attention: PyTorch's, and within documents that share a row, without T x T numbers.

Documents: on a GPU FlexAttention skips the tiles that hold no key of a query's document. On a CPU,
where it has no backward pass, PyTorch's attention takes a run of queries at a time.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa.flex import attend, create_document_mask

QUERIES = 256  # of a run


def attend_within_documents(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G D"],
    document_starts: Int[Tensor, "B T"],
) -> Float[Tensor, "B T H D"]:
    """Attention of each query over the tokens of its document so far."""
    if q.device.type == "cuda":
        return attend(q, k, v, create_document_mask(document_starts))
    return torch.cat(
        [
            _attend_run(q[:, t0 : t0 + QUERIES], k, v, document_starts[:, t0 : t0 + QUERIES], t0)
            for t0 in range(0, q.shape[1], QUERIES)
        ],
        dim=1,
    )


def _attend_run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, t0: int) -> Tensor:
    """Attention of the queries from t0 on."""
    end = t0 + q.shape[1]
    s = torch.arange(end, device=q.device)
    t = torch.arange(t0, end, device=q.device)[:, None]
    seen = (s <= t) & (s >= starts[..., None])
    return scaled_dot_product(q, k[:, :end], v[:, :end], mask=seen[:, None])


def scaled_dot_product(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B K G D"],
    v: Float[Tensor, "B K G D"],
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Float[Tensor, "B T H D"]:
    """PyTorch's attention on our layout."""
    grouped = k.shape[2] < q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2)
