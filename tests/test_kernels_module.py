"""SparseAttention on the Triton backend against the same module on the reference."""

import copy

import pytest
import torch

pytest.importorskip("triton")

from nsa.attention import SparseAttention, WindowAttention
from nsa.compress_networks import MeanPool

SIZES = dict(
    dim=32,
    dim_head=16,
    heads=4,
    kv_heads=2,
    sliding_window_size=8,
    compress_block_size=8,
    compress_block_sliding_stride=4,
    selection_block_size=8,
    num_local_blocks=1,
    num_selected_blocks=3,
)
OPTIONS = {
    "paper": {},
    "straight-through": {"use_diff_topk": True, "num_compressed_mem_kv": 2},
    "per head": {"query_heads_share_selected_kv": False, "kv_per_branch": False},
    "acausal": {"causal": False, "importance": "logit_mean"},
    "no selection": {"num_selected_blocks": 0},
    "mean pool": {"compress_mlp": MeanPool()},
    "random selection": {"selection": "random"},
    "oracle": {"selection": "oracle"},
}


def both(build, num_tokens: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Output and all gradients of a randomised module: on Triton, and on the reference's copy."""
    module = build("triton")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    judge = build("reference").to(dtype)
    judge.load_state_dict(copy.deepcopy(module.state_dict()))
    tokens = torch.randn(1, num_tokens, 32)
    upstream = torch.randn(1, num_tokens, 32)
    results = []
    for attend in (module.eval(), judge.eval()):
        kind = next(attend.parameters()).dtype
        x = tokens.to(kind).requires_grad_()
        out = attend(x)
        grads = torch.autograd.grad(out, [x, *attend.parameters()], upstream.to(kind))
        results.append([out, *grads])
    return results


@pytest.mark.parametrize("name", OPTIONS)
def test_the_module_is_the_references(name: str) -> None:
    def build(backend: str) -> SparseAttention:
        return SparseAttention(**(SIZES | OPTIONS[name]), backend=backend)

    for got, want in zip(*both(build, 28, torch.float64), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), atol=2e-4, rtol=1e-3)


def test_the_window_layer_is_the_references() -> None:
    def build(backend: str) -> WindowAttention:
        return WindowAttention(32, 16, 4, 8, 2, backend=backend)

    for got, want in zip(*both(build, 30, torch.float64), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), atol=2e-4, rtol=1e-3)
