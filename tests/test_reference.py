"""The oracle against the paper by hand, against dense attention in float64, and under gradcheck."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from nsa import blocks, reference
from nsa.config import NSAConfig

B, H, G, D, DV = 2, 4, 2, 8, 6
CFG = NSAConfig(
    sliding_window_size=5,
    compress_block_size=6,
    compress_block_sliding_stride=4,
    selection_block_size=8,
    num_selected_blocks=4,
)
LENGTHS = (1, 17, 64, 100)


def config(**changes) -> NSAConfig:
    return NSAConfig(**(vars(CFG) | changes))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def qkv(num_tokens: int, heads: int = H, groups: int = G) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(B, num_tokens, heads, D),
        normal(B, num_tokens, groups, D),
        normal(B, num_tokens, groups, DV),
    )


def compressed(num_tokens: int, cfg: NSAConfig = CFG) -> tuple[Tensor, Tensor, Tensor]:
    num_blocks = blocks.num_compress_blocks(num_tokens, cfg)
    q, _, _ = qkv(num_tokens)
    return q, normal(B, num_blocks, G, D), normal(B, num_blocks, G, DV)


def some_indices(num_tokens: int, heads: int = G, cfg: NSAConfig = CFG) -> Tensor:
    num_blocks = blocks.num_selection_blocks(num_tokens, cfg)
    return reference.top_blocks(torch.rand(B, num_tokens, heads, num_blocks), cfg)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal=False) -> Tensor:
    """PyTorch's attention; every query must see a key."""
    q, k, v = (rearrange(x, "B T H D -> B H T D") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    return rearrange(out, "B H T D -> B T H D")


def assert_same_with_gradients(got: Tensor, want: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    upstream = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream, retain_graph=True),
        torch.autograd.grad(want, inputs, upstream, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_everything_selected_or_in_the_window_is_dense(
    num_tokens: int, groups: int, causal: bool
) -> None:
    cfg = config(num_selected_blocks=99, sliding_window_size=100, causal=causal)
    q, k, v = qkv(num_tokens, groups=groups)
    want = dense(q, k, v, causal=causal)
    indices = some_indices(num_tokens, groups, cfg)
    selected = reference.selected_attention(q, k, v, indices, cfg)
    assert_same_with_gradients(selected, want, q, k, v)
    assert_same_with_gradients(reference.sliding_window_attention(q, k, v, cfg), want, q, k, v)


@pytest.mark.parametrize("heads", [G, H])
def test_selection_and_window_see_what_their_masks_show(heads: int) -> None:
    """`heads`: one selection a key/value head, or one a query head."""
    q, k, v = qkv(50)
    indices = some_indices(50, heads)
    mask = repeat(blocks.selected_tokens(indices, 50, CFG), "B T J K -> B (J r) T K", r=H // heads)
    got = reference.selected_attention(q, k, v, indices, CFG)
    assert_same_with_gradients(got, dense(q, k, v, mask), q, k, v)
    window = blocks.sliding_window(50, CFG)
    got = reference.sliding_window_attention(q, k, v, CFG)
    assert_same_with_gradients(got, dense(q, k, v, window), q, k, v)


@pytest.mark.parametrize("causal", [True, False])
def test_compressed_attention_and_its_lse(causal: bool) -> None:
    cfg = config(causal=causal)
    q, k, v = compressed(50, cfg)
    out, lse = reference.compressed_attention(q, k, v, cfg)
    visible = blocks.compress_visible(50, cfg)
    sees = visible.any(-1)
    assert sees.all() != causal
    assert_same_with_gradients(out[:, sees], dense(q[:, sees], k, v, visible[sees]), q, k, v)
    scores = torch.einsum("bthd,bchd->bthc", q, k.repeat_interleave(H // G, 2)) / D**0.5
    want = scores.masked_fill(~visible[:, None], -math.inf).logsumexp(-1)
    assert_same_with_gradients(lse[:, sees], want[:, sees], q, k)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("num_tokens", [1, 5, 20])
def test_nothing_visible_gives_zero_and_finite_gradients(num_tokens: int) -> None:
    q, k, v = compressed(num_tokens)
    out, lse = reference.compressed_attention(q, k, v, CFG)
    blind = slice(0, CFG.compress_block_size - 1)
    assert out[:, blind].eq(0).all() and lse[:, blind].eq(-math.inf).all()
    assert out[:, CFG.compress_block_size - 1 :].ne(0).all()
    importance = reference.block_importance(q, k, lse, CFG)
    assert importance[:, blind].eq(0).all()

    k_slc, v_slc = qkv(num_tokens)[1:]
    empty = torch.full((B, num_tokens, G, 3), -1, dtype=torch.int32)
    selected = reference.selected_attention(q, k_slc, v_slc, empty, CFG)
    assert selected.eq(0).all()
    no_slots = reference.selected_attention(q, k_slc, v_slc, empty[..., :0], CFG)
    assert no_slots.eq(0).all()

    with torch.autograd.detect_anomaly(check_nan=True):
        loss = out.sum() + importance.square().sum() + selected.sum() + no_slots.sum()
        loss = loss + lse.masked_fill(lse.isinf(), 0.0).sum()
        grads = torch.autograd.grad(loss, (q, k, v, k_slc, v_slc), allow_unused=True)
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_memory_keys_stand_before_the_compressed_ones_and_are_always_visible() -> None:
    q, k, v = compressed(30)
    mem_k, mem_v = normal(G, 3, D), normal(G, 3, DV)
    out, lse = reference.compressed_attention(q, k, v, CFG, mem_k, mem_v)
    keys = torch.cat([mem_k.transpose(0, 1).expand(B, -1, -1, -1), k], dim=1)
    values = torch.cat([mem_v.transpose(0, 1).expand(B, -1, -1, -1), v], dim=1)
    mask = F.pad(blocks.compress_visible(30, CFG), (3, 0), value=True)
    assert_same_with_gradients(out, dense(q, keys, values, mask), q, k, v, mem_k, mem_v)
    _, without = reference.compressed_attention(q, k, v, CFG)
    scores = torch.einsum("bthd,hmd->bthm", q, mem_k.repeat_interleave(H // G, 0)) / D**0.5
    want = torch.cat([scores, without[..., None]], dim=-1).logsumexp(-1)
    torch.testing.assert_close(lse, want)


def test_importance_by_hand() -> None:
    """T = 256 with the paper's sizes: 15 compressed blocks, weights 1 2 2 2 1 (eq. 9)."""
    cfg = NSAConfig()
    p_cmp = torch.arange(1, 16, dtype=torch.float64)
    k_cmp = p_cmp.log()[None, :, None, None]  # with q = 1, D = 1 and lse = 0, p_cmp is exp(k)
    q, lse = torch.ones(1, 256, 2, 1, dtype=torch.float64), torch.zeros(1, 256, 2).double()
    p_slc = reference.block_importance(q, k_cmp, lse, cfg, shared=False)
    last = [
        2 * 1 + 2 * 2 + 2 * 3 + 1 * 4,
        1 * 4 + 2 * 5 + 2 * 6 + 2 * 7 + 1 * 8,
        1 * 8 + 2 * 9 + 2 * 10 + 2 * 11 + 1 * 12,
        1 * 12 + 2 * 13 + 2 * 14 + 2 * 15,
    ]
    torch.testing.assert_close(p_slc[0, 255, 0], torch.tensor(last).double())
    # Token 126 sees compressed blocks 0 to 5 (the last ends with token 111); 127 sees block 6 too.
    at_126 = torch.tensor([last[0], 1 * 4 + 2 * 5 + 2 * 6, 0, 0]).double()
    torch.testing.assert_close(p_slc[0, 126, 0], at_126)
    torch.testing.assert_close(p_slc[0, 127, 0], at_126 + torch.tensor([0, 2 * 7, 0, 0]))
    shared = reference.block_importance(q, k_cmp, lse, cfg)
    torch.testing.assert_close(shared, 2 * p_slc[:, :, :1])  # eq. 10: the sum over both heads


def test_importance_sums_the_probabilities_of_a_group() -> None:
    q, k, v = compressed(60)
    mem_k, mem_v = normal(G, 1, D), normal(G, 1, DV)
    _, lse = reference.compressed_attention(q, k, v, CFG, mem_k, mem_v)
    scores = torch.einsum("bthd,bchd->bthc", q, k.repeat_interleave(H // G, 2)) / D**0.5
    memory = torch.einsum("bthd,hmd->bthm", q, mem_k.repeat_interleave(H // G, 0)) / D**0.5
    scores = scores.masked_fill(~blocks.compress_visible(60, CFG)[:, None], -math.inf)
    p_cmp = torch.cat([memory, scores], dim=-1).softmax(-1)[..., 1:]  # memory is never scored
    per_head = p_cmp @ blocks.block_overlap(60, CFG).double()
    got = reference.block_importance(q, k, lse, CFG, shared=False)
    assert_same_with_gradients(got, per_head, q, k, mem_k)
    want = rearrange(per_head, "B T (G R) S -> B T G R S", G=G).sum(3)
    assert_same_with_gradients(reference.block_importance(q, k, lse, CFG), want, q, k, mem_k)


@pytest.mark.parametrize("shared", [True, False])
def test_importance_as_the_mean_of_logits(shared: bool) -> None:
    cfg = config(importance="logit_mean")
    q, k, v = compressed(40, cfg)
    _, lse = reference.compressed_attention(q, k, v, cfg)
    got = reference.block_importance(q, k, lse, cfg, shared)
    scores = torch.einsum("bthd,bchd->bthc", q, k.repeat_interleave(H // G, 2)) / D**0.5
    overlap, visible = blocks.block_overlap(40, cfg), blocks.compress_visible(40, cfg)
    for t, x, s in product(range(40), range(got.shape[2]), range(got.shape[3])):
        heads = range(x * H // G, (x + 1) * H // G) if shared else [x]
        weights = (overlap[:, s] * visible[t]).double()
        if weights.any():
            logits = torch.stack([scores[:, t, h] for h in heads]).mean(0)
            torch.testing.assert_close(got[:, t, x, s], logits @ weights / weights.sum())
        else:
            assert got[:, t, x, s].eq(torch.finfo(torch.float64).min).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_selected", [0, 1, 2, 3, 5, 20])
@pytest.mark.parametrize(("initial", "local"), [(1, 2), (0, 1), (2, 3)])
def test_top_blocks_by_sorting(initial: int, local: int, num_selected: int, causal: bool) -> None:
    """Forced blocks by priority, then the best; on a tie the lower block. Scores repeat often."""
    cfg = config(
        num_selected_blocks=num_selected,
        num_initial_blocks=initial,
        num_local_blocks=local,
        causal=causal,
    )
    importance = torch.randint(0, 3, (1, 70, 2, 9)).float()
    indices = reference.top_blocks(importance, cfg)
    assert indices.dtype == torch.int32 and indices.shape == (1, 70, 2, num_selected)
    priority = blocks.priority(70, cfg).tolist()
    for t, g in product(range(70), range(2)):
        score, rank = importance[0, t, g].tolist(), priority[t]
        kept = [s for s in range(9) if rank[s] != blocks.INELIGIBLE]
        kept.sort(key=lambda s: (-rank[s], -score[s] if rank[s] == blocks.FREE else 0, s))
        kept = sorted(kept[:num_selected])
        assert indices[0, t, g].tolist() == kept + [-1] * (num_selected - len(kept))


@pytest.mark.parametrize("importance", ["probability_sum", "logit_mean"])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_select_blocks_ranks_by_importance(num_tokens: int, importance: str) -> None:
    cfg = config(importance=importance)
    q, k, v = compressed(num_tokens, cfg)
    _, lse = reference.compressed_attention(q, k, v, cfg)
    for shared in (True, False):
        got = reference.select_blocks(q, k, lse, cfg, shared)
        scores = reference.block_importance(q, k, lse, cfg, shared)
        assert torch.equal(got, reference.top_blocks(scores, cfg)) and not got.requires_grad
        assert got.shape == (B, num_tokens, G if shared else H, cfg.num_selected_blocks)
        blocks_begun = torch.arange(num_tokens) // cfg.selection_block_size + 1
        want = blocks_begun.clamp(max=cfg.num_selected_blocks)[:, None].expand(-1, got.shape[2])
        assert torch.equal((got >= 0).sum(-1), want.expand(B, -1, -1))


def test_block_gates_multiply_the_logits_of_their_block() -> None:
    q, k, v = qkv(30)
    indices = some_indices(30)
    gates = (torch.rand(indices.shape, dtype=torch.float64) + 0.5).requires_grad_()
    got = reference.selected_attention(q, k, v, indices, CFG, gates)
    scores = torch.einsum("bthd,bkhd->bthk", q, k.repeat_interleave(H // G, 2)) / D**0.5
    factor = torch.zeros(B, 30, G, 30, dtype=torch.float64)
    for slot in range(indices.shape[-1]):
        hit = indices[..., slot, None] == torch.arange(30) // CFG.selection_block_size
        factor = factor + hit * gates[..., slot, None]
    mask = blocks.selected_tokens(indices, 30, CFG).repeat_interleave(H // G, 2)
    scores = scores * factor.repeat_interleave(H // G, 2)
    probs = scores.masked_fill(~mask, -math.inf).softmax(-1)
    want = torch.einsum("bthk,bkhd->bthd", probs, v.repeat_interleave(H // G, 2))
    assert_same_with_gradients(got, want, q, k, v, gates)
    ones = reference.selected_attention(q, k, v, indices, CFG, torch.ones_like(gates))
    assert torch.equal(ones, reference.selected_attention(q, k, v, indices, CFG))


def test_combine_weighs_the_branches_in_order() -> None:
    gates, branches = normal(B, 5, H, 3), [normal(B, 5, H, DV) for _ in range(3)]
    want = sum(gates[..., i, None] * branches[i] for i in range(3))
    torch.testing.assert_close(reference.combine(gates, *branches), want)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal: bool) -> None:
    cfg = NSAConfig(
        sliding_window_size=2,
        compress_block_size=3,
        compress_block_sliding_stride=2,
        selection_block_size=4,
        num_selected_blocks=2,
        causal=causal,
    )
    q, k, v = normal(1, 6, 2, 2), normal(1, 6, 1, 2), normal(1, 6, 1, 3)
    k_cmp, v_cmp, mem_k, mem_v = (
        normal(1, 2, 1, 2),
        normal(1, 2, 1, 3),
        normal(1, 1, 2),
        normal(1, 1, 3),
    )
    indices = reference.top_blocks(torch.rand(1, 6, 1, 2), cfg)
    gates = normal(1, 6, 1, 2)

    def compress_and_score(q, k_cmp, v_cmp, mem_k, mem_v):
        out, lse = reference.compressed_attention(q, k_cmp, v_cmp, cfg, mem_k, mem_v)
        return out, lse, reference.block_importance(q, k_cmp, lse, cfg)

    def select(q, k, v, gates):
        return reference.selected_attention(q, k, v, indices, cfg, gates)

    def slide(q, k, v):
        return reference.sliding_window_attention(q, k, v, cfg)

    assert torch.autograd.gradcheck(compress_and_score, (q, k_cmp, v_cmp, mem_k, mem_v))
    assert torch.autograd.gradcheck(select, (q, k, v, gates))
    assert torch.autograd.gradcheck(slide, (q, k, v))


def everything(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor) -> list[Tensor]:
    indices = torch.zeros(*q.shape[:2], k.shape[2], 4, dtype=torch.int32, device=q.device)
    out, lse = reference.compressed_attention(q, k_cmp, v_cmp, CFG)
    return [
        out,
        reference.selected_attention(
            q, k, v, indices, CFG, torch.ones_like(indices, dtype=q.dtype)
        ),
        reference.sliding_window_attention(q, k, v, CFG),
        reference.block_importance(q, k_cmp, lse, CFG),
        reference.select_blocks(q, k_cmp, lse, CFG),
    ]


def test_everything_stays_on_the_device_of_its_inputs() -> None:
    inputs = [x.to("meta") for x in (*qkv(40), *compressed(40)[1:])]
    assert {out.device.type for out in everything(*inputs)} == {"meta"}


def test_bfloat16_errs_by_its_own_rounding_and_scores_in_float32() -> None:
    exact = [x.detach() for x in (*qkv(64), *compressed(64)[1:])]
    rounded = [x.bfloat16() for x in exact]
    want = everything(*(x.double() for x in rounded))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = everything(*rounded)
        assert [x.dtype for x in got[:4]] == [torch.bfloat16] * 3 + [torch.float32]
        for ours, theirs in zip(got[:4], want, strict=False):
            torch.testing.assert_close(ours.double(), theirs, atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_a_gpu_computes_what_a_cpu_does() -> None:
    inputs = [x.detach() for x in (*qkv(100), *compressed(100)[1:])]
    for ours, theirs in zip(
        everything(*(x.cuda() for x in inputs)), everything(*inputs), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs)
