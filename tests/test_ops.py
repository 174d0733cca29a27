"""The public ops: what they refuse, what they dispatch to, and the library's sliding window."""

import dataclasses

import jaxtyping
import pytest
import torch

from nsa import ops, reference
from nsa.config import NSAConfig

CFG = NSAConfig(
    sliding_window_size=5,
    compress_block_size=6,
    compress_block_sliding_stride=4,
    selection_block_size=8,
    num_selected_blocks=2,
)
Q, K, K_CMP = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 1, 2, 8)
LSE, INDICES = torch.randn(2, 9, 4), torch.zeros(2, 9, 2, 2, dtype=torch.int32)
ANGLES = torch.randn(9, 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 8, 17, 200])
@pytest.mark.parametrize("num_tokens", [1, 17, 64, 100])
def test_the_librarys_window_is_the_oracles(num_tokens: int, window: int, causal: bool) -> None:
    """Exactly w keys, grouped heads, Dv apart from D, any T; gradients too."""
    cfg = NSAConfig(sliding_window_size=window, causal=causal)
    q = torch.randn(2, num_tokens, 6, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, num_tokens, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, num_tokens, 2, 5, dtype=torch.float64, requires_grad=True)
    got = ops.sliding_window_attention(q, k, v, cfg)
    want = reference.sliding_window_attention(q, k, v, cfg)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(want, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_backends_are_resolved_by_name() -> None:
    assert ops.resolve_backend("reference") == "reference"
    assert ops.resolve_backend("flex") == "flex"
    assert ops.resolve_backend("auto") == "reference"
    with pytest.raises(ValueError, match="backend='cuda' is unknown: choose one of auto, referen"):
        ops.resolve_backend("cuda")


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA device"):
        ops.resolve_backend("triton")
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        ops.sliding_window_attention(Q, K, K, CFG, backend="triton")


def test_auto_is_triton_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert ops.resolve_backend("auto") == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert ops.resolve_backend("auto") == "reference"


def test_selected_importance_is_that_of_the_chosen_blocks() -> None:
    cfg = dataclasses.replace(CFG, num_selected_blocks=3)
    q, k_cmp = torch.randn(1, 40, 4, 8), torch.randn(1, 9, 2, 8)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, cfg)
    for shared in (True, False):
        indices = reference.select_blocks(q, k_cmp, lse, cfg, shared)
        got = ops.selected_importance(q, k_cmp, lse, indices, cfg)
        whole = reference.block_importance(q, k_cmp, lse, cfg, shared)
        for place in torch.cartesian_prod(*map(torch.arange, indices.shape)).tolist():
            block = indices[tuple(place)]
            want = whole[(*place[:3], block)] if block >= 0 else torch.tensor(0.0)
            torch.testing.assert_close(got[tuple(place)], want)


def test_an_op_calls_the_backend_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [entry.name for entry in dataclasses.fields(ops.Backend) if entry.name != "lacks"]
    recorder = ops.Backend(**{name: lambda *args, name=name: (name, len(args)) for name in names})
    monkeypatch.setitem(ops.BACKENDS, "recorder", recorder)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # names are no tensors
    calls = {
        "block_means": (K, CFG),
        "compressed_attention": (Q, K_CMP, K_CMP, CFG, None, None),
        "select_blocks": (Q, K_CMP, LSE, CFG, True),
        "selected_importance": (Q, K_CMP, LSE, INDICES, CFG),
        "selected_attention": (Q, K, K, INDICES, CFG, None),
        "sliding_window_attention": (Q, K, K, CFG),
        "combine": (torch.ones(2, 9, 4, 3), Q, Q, Q),
        "rotate": (Q, ANGLES),
        "gated_attention": (
            *(torch.ones(2, 9, 4, 3), Q, K_CMP, K_CMP, Q, LSE, Q, K, K, INDICES, K, K),
            *(CFG, None, None),
        ),
    }
    assert list(calls) == names
    for name, args in calls.items():
        assert getattr(ops, name)(*args, backend="recorder") == (name, len(args))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.sliding_window_attention(Q, K.double(), K, CFG), "k is torch.float64 on cpu"),
        (lambda: ops.sliding_window_attention(Q, K, K.to("meta"), CFG), "v is torch.float32 on me"),
        (lambda: ops.sliding_window_attention(Q[0], K, K, CFG), "it must be .B, T, heads, D"),
        (lambda: ops.sliding_window_attention(Q, K[..., :4], K, CFG), "k has shape .2, 9, 2, 4."),
        (lambda: ops.sliding_window_attention(Q, K, K[:, :4], CFG), "v has shape .2, 4, 2, 8."),
        (lambda: ops.sliding_window_attention(Q[:, :, :3], K, K, CFG), "q has 3 heads and k 2"),
        (lambda: ops.sliding_window_attention(Q[:, :5], K, K, CFG), "k has 9 tokens and q 5"),
        (lambda: ops.block_means(K[:, :1], CFG), "1 tokens have no block of compress_block_size="),
        (lambda: ops.compressed_attention(Q, K, K, CFG), "k_cmp has 9 compressed blocks: 9 tok"),
        (
            lambda: ops.compressed_attention(Q, K_CMP, K_CMP, CFG, mem_k=torch.randn(2, 1, 8)),
            "mem_k and mem_v come together",
        ),
        (
            lambda: ops.compressed_attention(
                Q, K_CMP, K_CMP, CFG, torch.randn(1, 1, 8), torch.randn(2, 1, 8)
            ),
            "mem_k has shape .1, 1, 8.: it must be .2, 1, 8.",
        ),
        (lambda: ops.select_blocks(Q, K_CMP, LSE[:1], CFG), "lse has shape .1, 9, 4.: it must be"),
        (lambda: ops.selected_importance(Q, K, LSE, INDICES, CFG), "k_cmp has 9 compressed blocks"),
        (lambda: ops.selected_attention(Q, K, K, INDICES.long(), CFG), "it must be torch.int32"),
        (
            lambda: ops.selected_attention(Q, K, K, INDICES.repeat(1, 1, 4, 1), CFG),
            "with G=2 key/value heads, or .B, T, H, N. with H=4 query heads",
        ),
        (lambda: ops.selected_attention(Q, K, K, INDICES[:, :5], CFG), "block_indices has shape"),
        (
            lambda: ops.selected_attention(Q, K, K, INDICES, CFG, torch.ones(2, 9, 2, 1)),
            "block_gates has shape",
        ),
        (lambda: ops.combine(torch.ones(2, 9, 4, 2), Q, Q, Q), "gates has shape"),
        (lambda: ops.combine(torch.ones(2, 9, 4, 3), Q, K, Q), "selected has shape"),
    ],
)
def test_wrong_inputs_are_refused(call, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would complain first
    with pytest.raises(ValueError, match=message):
        call()
