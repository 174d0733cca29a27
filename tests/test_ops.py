"""The public ops: what they refuse, what they dispatch to, and the library's sliding window."""

import dataclasses

import jaxtyping
import pytest
import torch
from torch import nn

from nsa import backends, blocks, importance, ops, reference
from nsa.backends import resolve_backend
from nsa.compress_networks import AttentionPool
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
DECLARED = ("importances", "covers", "reasons")
DECODING = ("append_token", "append_block", "cached_attention")  # see tests/test_cache.py


def test_the_reference_is_the_oracle_and_nothing_else() -> None:
    for name, op in vars(backends.REFERENCE).items():
        if name in (*DECODING, "gated_attention"):
            assert op is None, name
        elif name not in DECLARED:
            assert op is getattr(reference, name), name


@pytest.mark.parametrize("sizes", [(4, 2), (6, 4), (7, 3), (5, 5)])
@pytest.mark.parametrize("num_tokens", [7, 12, 17])
def test_torch_and_reference_agree_on_block_means(sizes: tuple[int, int], num_tokens: int) -> None:
    """Blocks that share part of their tokens or none, and a tail that no block covers."""
    length, stride = sizes
    cfg = NSAConfig(
        compress_block_size=length,
        compress_block_sliding_stride=stride,
        selection_block_size=4 * stride,
    )
    x = torch.randn(2, num_tokens, 2, 3, dtype=torch.float64, requires_grad=True)
    got, want = (ops.block_means(x, cfg, backend=name) for name in ("torch", "reference"))
    torch.testing.assert_close(got, want)
    by_hand = torch.stack(
        [x[:, c * stride : c * stride + length].mean(1) for c in range(want.shape[1])], 1
    )
    torch.testing.assert_close(want, by_hand)
    upstream = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream) for y in (got, want)))


@pytest.mark.parametrize("positions", [True, False])
def test_torch_and_reference_pool_as_the_network_does(positions: bool) -> None:
    phi = AttentionPool(8, CFG.compress_block_size).double()
    for parameter in phi.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 41, 2, 8, dtype=torch.float64, requires_grad=True)
    learned = torch.randn(2, CFG.compress_block_size, 8, dtype=torch.float64, requires_grad=True)
    given = x, phi.to_scores.weight, phi.position_scores, learned if positions else None, CFG
    got, want = (ops.attention_pool(*given, backend=name) for name in ("torch", "reference"))
    windows = blocks.compress_windows(x, CFG)
    by_hand = phi(windows + learned[:, None] if positions else windows).transpose(1, 2)
    inputs = [x, *phi.parameters()] + [learned] * positions
    upstream = torch.randn_like(want)
    expected = torch.autograd.grad(by_hand, inputs, upstream)
    for y in (got, want):
        torch.testing.assert_close(y, by_hand)
        torch.testing.assert_close(torch.autograd.grad(y, inputs, upstream), expected)


def test_pooling_refuses_what_does_not_fit_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would refuse first
    x, weight, scores = K, torch.ones(8, 8), torch.ones(CFG.compress_block_size, 8)
    with pytest.raises(ValueError, match="to_scores has shape"):
        ops.attention_pool(x, weight[:4], scores, None, CFG)
    with pytest.raises(ValueError, match="position_scores has shape"):
        ops.attention_pool(x, weight, scores[1:], None, CFG)
    with pytest.raises(ValueError, match="positions has shape"):
        ops.attention_pool(x, weight, scores, torch.ones(3, *scores.shape), CFG)
    with pytest.raises(ValueError, match="pad them to one"):
        ops.attention_pool(x[:, :2], weight, scores, None, CFG)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 8, 17, 200])
@pytest.mark.parametrize("num_tokens", [1, 17, 64, 100])
def test_the_librarys_window_is_the_oracles(num_tokens: int, window: int, causal: bool) -> None:
    """Exactly w keys, grouped heads, Dv apart from D, any T; gradients too."""
    cfg = NSAConfig(sliding_window_size=window, causal=causal)
    q = torch.randn(2, num_tokens, 6, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, num_tokens, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, num_tokens, 2, 5, dtype=torch.float64, requires_grad=True)
    got = ops.sliding_window_attention(q, k, v, cfg, backend="torch")
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
    for name in ("reference", "torch", "flex"):
        assert resolve_backend(name) == name
    assert resolve_backend("auto") == "torch"
    with pytest.raises(ValueError, match="backend='cuda' is unknown: choose one of auto, referen"):
        resolve_backend("cuda")


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA device"):
        resolve_backend("triton")
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        ops.sliding_window_attention(Q, K, K, CFG, backend="triton")


def test_auto_is_triton_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert resolve_backend("auto") == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert resolve_backend("auto") == "torch"


def most_likely_block(scores, lse, visible, overlap):
    """A rule of a test's own: the likeliest compressed block that overlaps."""
    p_cmp = (scores - lse[..., None]).masked_fill(~visible, float("-inf")).exp().sum(2)
    return (p_cmp[..., None] * (overlap > 0)).amax(-2)


def test_a_rule_that_a_backend_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importance.RULES, "most_likely_block", most_likely_block)
    cfg = dataclasses.replace(CFG, importance="most_likely_block")
    for name in ("reference", "torch", "flex"):
        assert resolve_backend(name, importance="most_likely_block") == name
        ops.select_blocks(Q, K_CMP, LSE, cfg, backend=name)
    refusal = "backend='triton' does not cover importance=most_likely_block: .*backend='torch'"
    with pytest.raises(ValueError, match=refusal):
        resolve_backend("triton", importance="most_likely_block")
    with pytest.raises(ValueError, match=refusal):
        ops.select_blocks(Q, K_CMP, LSE, cfg, backend="triton")
    with pytest.raises(ValueError, match=r"does not cover importance=test_ops\.most_likely_block"):
        resolve_backend("triton", importance=most_likely_block)


@pytest.mark.parametrize("name", ["reference", "torch", "flex", "triton"])
def test_an_option_that_nobody_declares_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{name}' does not cover sinks=True"):
        resolve_backend(name, options=["sinks=True"])


def test_one_rule_is_another_choice_than_the_next() -> None:
    q, k_cmp = torch.randn(1, 90, 4, 8), torch.randn(1, 22, 2, 8)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, CFG)
    rules = ("probability_sum", "logit_mean", most_likely_block)
    chosen = [
        ops.select_blocks(
            q, k_cmp, lse, dataclasses.replace(CFG, num_selected_blocks=4, importance=rule)
        )
        for rule in rules
    ]
    assert not any(torch.equal(chosen[i], chosen[i - 1]) for i in range(3))


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
    names = [name for name in vars(backends.TORCH) if name not in (*DECLARED, *DECODING)]
    recorder = backends.Backend(
        **{name: lambda *args, name=name: (name, len(args)) for name in names}
    )
    monkeypatch.setitem(backends.BACKENDS, "recorder", recorder)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # names are no tensors
    calls = {
        "block_means": (K, CFG),
        "attention_pool": (K, torch.ones(8, 8), torch.ones(CFG.compress_block_size, 8), None, CFG),
        "compressed_attention": (Q, K_CMP, K_CMP, CFG, None, None),
        "select_blocks": (Q, K_CMP, LSE, CFG, True),
        "selected_importance": (Q, K_CMP, LSE, INDICES, CFG, None),
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
