"""The modules: wired as the paper says, causal and trainable in every option, each option real."""

import copy
import math

import forked_runs
import jaxtyping
import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa import blocks, reference
from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.compress_networks import (
    AttentionPool,
    CompressMLP,
    GroupedMLP,
    MeanPool,
)
from nsa.compress_transformers import CompressTransformer
from nsa.rotary import Rotary, rotate

DIM, D, H, G = 24, 8, 4, 2
SIZES = {
    "dim": DIM,
    "dim_head": D,
    "heads": H,
    "kv_heads": G,
    "sliding_window_size": 5,
    "compress_block_size": 6,
    "compress_block_sliding_stride": 4,
    "selection_block_size": 8,
    "num_selected_blocks": 4,
    "compress_mlp_expand_factor": 0.25,
}
YARN = {"type": "yarn", "factor": 4, "original_seq_len": 32}
OPTIONS = {
    "paper": {},
    "one key/value head": {"kv_heads": 1},
    "as many key/value heads": {"kv_heads": None},
    "memory": {"num_compressed_mem_kv": 2},
    "no norm": {"norm": False},
    "use_diff_topk": {"use_diff_topk": True},
    "a selection a head": {"query_heads_share_selected_kv": False},
    "gates a head": {"query_heads_share_selected_kv": False, "use_diff_topk": True},
    "attention pool": {"compress_mlp": AttentionPool(D, 6)},
    "gate network": {"strategy_combine_mlp": nn.Sequential(nn.Linear(DIM, 3 * H), nn.Tanh())},
    "more forced blocks": {"num_initial_blocks": 2, "num_local_blocks": 1},
    "fewer than forced": {"num_selected_blocks": 2},
    "no selection": {"num_selected_blocks": 0},
    "logit mean": {"importance": "logit_mean"},
    "logit mean with gates": {"importance": "logit_mean", "use_diff_topk": True},
    "shared keys": {"kv_per_branch": False},
    "random selection": {"selection": "random"},
    "oracle": {"selection": "oracle"},
    "gate bias": {"gate_bias": [-2.0, -2.0, 2.0]},
    "slow rotation": {"rope_base": 500.0},
    "yarn and normed keys": {"rope_scaling": YARN, "qk_norm": True},
    "normed shared keys": {"kv_per_branch": False, "qk_norm": True},
    "normed scores by gates": {"compressed_output": False, "use_diff_topk": True, "qk_norm": True},
    "scores by gates": {"compressed_output": False, "use_diff_topk": True},
    "scores by shared keys": {
        "compressed_output": False,
        "kv_per_branch": False,
        "compress_mlp": MeanPool(),
    },
}
LENGTHS = (1, 17, 64, 100)


def build(seed: int = 0, **options) -> SparseAttention:
    """The module with every parameter drawn at random, so that no zero hides an error."""
    torch.manual_seed(seed)
    attn = SparseAttention(**(SIZES | options)).double().eval()
    return randomise(attn)


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def tokens_of(num_tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, num_tokens, DIM, dtype=torch.float64)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_learns_at_any_length(option: str) -> None:
    attn = build(**OPTIONS[option])
    for num_tokens in LENGTHS:
        attn.zero_grad()
        tokens = tokens_of(num_tokens)
        out = attn(tokens)
        assert out.shape == tokens.shape
        out.square().mean().backward()
        for name, parameter in attn.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name, parameter in attn.named_parameters():
        assert parameter.grad.ne(0).any(), name


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_sees_the_future(option: str) -> None:
    attn, tokens = build(**OPTIONS[option]), tokens_of(70)
    later = tokens.clone()
    cut = 37
    later[:, cut:] = tokens_of(70)[:, cut:]
    for ours, theirs in zip(attn.branches(tokens), attn.branches(later), strict=True):
        torch.testing.assert_close(ours[:, :cut], theirs[:, :cut], atol=1e-12, rtol=1e-9)
    ours, theirs = attn(tokens), attn(later)
    torch.testing.assert_close(ours[:, :cut], theirs[:, :cut], atol=1e-12, rtol=1e-9)
    assert not torch.isclose(ours[:, cut:], theirs[:, cut:]).all()


def test_without_causality_every_branch_sees_the_future() -> None:
    attn, tokens = build(causal=False), tokens_of(70)
    later = tokens.clone()
    later[:, 68:] += 1.0
    before, after = attn.branches(tokens), attn.branches(later)
    for branch, since in (("compressed", 0), ("selected", 64), ("sliding", 64)):
        changed = (getattr(before, branch) - getattr(after, branch)).abs().amax((0, 2, 3)) > 1e-9
        assert changed[since:].all(), branch
    assert before.sliding[:, :64].equal(after.sliding[:, :64])


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("option", ["paper", "memory", "use_diff_topk", "shared keys"])
def test_the_module_is_the_paper(option: str, num_tokens: int) -> None:
    """The whole of it, put together by hand from the oracle."""
    attn, tokens = build(**OPTIONS[option]), tokens_of(num_tokens)
    normed = attn.norm(tokens)
    q = rearrange(attn.to_q(normed), "B T (H D) -> B T H D", H=H)
    kv = rearrange(attn.to_kv(normed), "B T (P G D) -> P B T G D", G=G, D=D)
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = kv if len(kv) == 6 else [*kv] * 3
    k_cmp, v_cmp = attn.compress_k(k_cmp), attn.compress_v(v_cmp)
    angles = Rotary(D).angles(num_tokens)
    cfg = attn.cfg
    compressed, lse = reference.compressed_attention(q, k_cmp, v_cmp, cfg, attn.mem_k, attn.mem_v)
    indices = reference.select_blocks(q, k_cmp, lse, cfg)
    turned = rotate(q, angles)
    selected = reference.selected_attention(turned, rotate(k_slc, angles), v_slc, indices, cfg)
    sliding = reference.sliding_window_attention(turned, rotate(k_win, angles), v_win, cfg)
    gates = attn.to_gates(normed).sigmoid().unflatten(-1, (H, 3))
    branches = attn.branches(tokens)
    for ours, theirs in zip(branches, (compressed, selected, sliding, gates, indices), strict=True):
        torch.testing.assert_close(ours, theirs)
    out = reference.combine(gates, compressed, selected, sliding).flatten(-2)
    torch.testing.assert_close(attn(tokens), attn.to_out(out))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("branch", ["selected", "sliding"])
def test_seeing_all_it_is_dense_attention(branch: str, causal: bool) -> None:
    """Every block selected, or everything in the window, the other gates shut; gradients too."""
    sparse = build(
        num_selected_blocks=20, sliding_window_size=64, kv_per_branch=False, causal=causal
    )
    dense = Attention(DIM, D, H, G, causal).double()
    dense.load_state_dict({name: sparse.state_dict()[name] for name in dense.state_dict()})
    nn.init.zeros_(sparse.to_gates.weight)
    opened = torch.tensor([branch == name for name in ("compressed", "selected", "sliding")])
    bias = torch.where(opened, 100.0, -math.inf).double().repeat(H)
    sparse.to_gates.bias = nn.Parameter(bias, requires_grad=False)
    tokens = tokens_of(50)
    ours, theirs = sparse(tokens), dense(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    for module, out in ((sparse, ours), (dense, theirs)):
        module.zero_grad()
        out.square().sum().backward()
    for name, parameter in dense.named_parameters():
        same = sparse.get_parameter(name).grad
        torch.testing.assert_close(same, parameter.grad, atol=1e-6, rtol=1e-6)


CHANGING = [  # options that leave the parameters as they are, so that two modules can share them
    {"sliding_window_size": 6},
    {"num_selected_blocks": 5},
    {"causal": False},
    {"norm": False},
    {"query_heads_share_selected_kv": False},
    {"num_initial_blocks": 0},
    {"num_local_blocks": 3},
    {"importance": "logit_mean"},
    {"kv_per_branch": False},
    {"num_compressed_mem_kv": 1},
    {"num_selected_blocks": 0},
    {"compress_mlp": GroupedMLP(D, 6, G, 0.25)},
    {"compress_mlp_expand_factor": 0.5},
    {"strategy_combine_mlp": nn.Linear(DIM, 3 * H, bias=False)},
    {"rope_base": 100.0},
    {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_scaling": YARN},
    {"qk_norm": True},
    {"selection": "random"},
    {"selection": "oracle"},
    {"selection": "none"},
]


@pytest.mark.parametrize("change", CHANGING, ids=lambda change: "-".join(change))
def test_every_option_changes_the_output(change: dict) -> None:
    """With equal weights, as far as the option leaves them the same shape."""
    attn, changed = build(), build(**change)
    ours, theirs = attn.state_dict(), changed.state_dict()
    alike = {k: v for k, v in ours.items() if k in theirs and theirs[k].shape == v.shape}
    changed.load_state_dict(theirs | alike)
    tokens = tokens_of(90)
    assert not torch.allclose(attn(tokens), changed(tokens), atol=1e-4)


def test_forced_blocks_are_always_kept() -> None:
    attn = build(num_initial_blocks=2, num_local_blocks=2, num_selected_blocks=5)
    indices = attn.branches(tokens_of(90)).block_indices
    own = torch.arange(90) // 8
    for forced in (own, (own - 1).clamp(min=0), own.clamp(max=0), own.clamp(max=1)):
        assert (indices == forced[:, None, None]).any(-1).all()
    few = build(num_selected_blocks=2).branches(tokens_of(90)).block_indices
    assert torch.equal(few[:, 20:, 0, 0], torch.zeros(2, 70).int())
    assert torch.equal(few[0, 20:, 0, 1], own[20:].int())


def test_selection_is_shared_by_a_group_or_not() -> None:
    tokens = tokens_of(90)
    shared = build().branches(tokens).block_indices
    alone = build(query_heads_share_selected_kv=False).branches(tokens).block_indices
    assert shared.shape == (2, 90, G, 4) and alone.shape == (2, 90, H, 4)
    assert not torch.equal(alone[:, :, 0], alone[:, :, 1])


def test_diff_topk_changes_gradients_of_the_scores_and_nothing_in_forward() -> None:
    plain, gated = build(), build(use_diff_topk=True)
    gated.load_state_dict(plain.state_dict())
    tokens = tokens_of(90)
    assert torch.equal(plain(tokens), gated(tokens))
    for attn in (plain, gated):
        attn.branches(tokens).selected.square().sum().backward()
    assert all(p.grad is None for p in plain.compress_k.parameters())
    assert all(p.grad.ne(0).any() for p in gated.compress_k.parameters())


def test_compressed_keys_carry_no_rotation() -> None:
    tokens = tokens_of(60)
    one, other = build(), build(rope_base=10.0)
    torch.testing.assert_close(one.branches(tokens).compressed, other.branches(tokens).compressed)
    assert not torch.allclose(one.branches(tokens).sliding, other.branches(tokens).sliding)


def test_gates_start_at_their_bias_and_depend_on_the_token_once_trained() -> None:
    for bias, want in ((0.0, [0.0] * 3), ([-2.0, -1.0, 2.0], [-2.0, -1.0, 2.0])):
        attn = SparseAttention(**SIZES, gate_bias=bias)
        gates = attn.branches(torch.randn(2, 20, DIM)).gates
        torch.testing.assert_close(gates, torch.tensor(want).sigmoid().expand(2, 20, H, 3))
    gates = build().branches(tokens_of(20)).gates
    assert gates.std(dim=1).min() > 0.01 and gates.min() > 0 and gates.max() < 1


def test_keys_and_values_are_projected_once_a_branch_or_once() -> None:
    width = 2 * G * D
    assert build().to_kv.weight.shape == (3 * width, DIM)
    assert build(kv_per_branch=False).to_kv.weight.shape == (width, DIM)
    assert build(num_selected_blocks=0).to_kv.weight.shape == (2 * width, DIM)
    scored = build(compressed_output=False, use_diff_topk=True)
    assert scored.to_kv.weight.shape == (2 * width + G * D, DIM) and scored.compress_v is None


def test_branches_that_are_off_give_zero() -> None:
    tokens = tokens_of(40)
    no_selection = build(num_selected_blocks=0).branches(tokens)
    assert no_selection.selected.eq(0).all() and no_selection.block_indices.shape == (2, 40, G, 0)
    scored = build(compressed_output=False, use_diff_topk=True).branches(tokens)
    assert scored.compressed.eq(0).all() and scored.selected.ne(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ({"dim_head": 7}, "dim_head=7 must be even"),
        ({"selection_block_size": 10}, "selection_block_size=10 must be a multiple of"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
        ({"selection": "best"}, "selection='best' must be one of learned, random, oracle, none"),
        ({"backend": "flex", "use_diff_topk": True}, "backend='flex' does not cover use_diff_topk"),
        ({"gate_bias": [0.0, 1.0]}, "gate_bias=.* must be one number, or three"),
        (
            {"gate_bias": 1.0, "strategy_combine_mlp": nn.Linear(DIM, 3 * H)},
            "a strategy_combine_mlp brings its own",
        ),
        ({"compressed_output": False}, "leaves nothing to train the scores"),
        (
            {"compressed_output": False, "compress_mlp": MeanPool()},
            "leaves nothing to train the scores",
        ),
        (
            {"compressed_output": False, "kv_per_branch": False},
            "leaves nothing to train the scores",
        ),
        (
            {"compressed_output": False, "use_diff_topk": True, "num_compressed_mem_kv": 1},
            "num_compressed_mem_kv=1 needs compressed_output=True",
        ),
        ({"compressed_output": False, "num_selected_blocks": 0}, "use WindowAttention"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAttention(**(SIZES | options))


def test_a_gate_network_of_the_wrong_width_is_refused() -> None:
    attn = SparseAttention(**SIZES, strategy_combine_mlp=nn.Linear(DIM, H))
    with pytest.raises(ValueError, match=r"gives 4 numbers a token: it must give 3 \* heads = 12"):
        attn(torch.randn(1, 9, DIM))


def test_code_of_the_known_package_runs_with_the_import_changed() -> None:
    kv_heads, dim_head = 2, 64
    phi = CompressTransformer(num_layers=2, dim=dim_head * kv_heads, num_heads=kv_heads)
    attn = SparseAttention(
        dim=512, dim_head=dim_head, heads=8, kv_heads=kv_heads, sliding_window_size=2,
        compress_block_size=4, compress_block_sliding_stride=2, selection_block_size=4,
        num_selected_blocks=2, compress_mlp=phi,
    )  # fmt: skip
    tokens = torch.randn(2, 31, 512)
    assert attn(tokens).shape == tokens.shape


def test_a_network_of_another_shape_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="compress_mlp=Identity gives shape"):
        SparseAttention(**SIZES, compress_mlp=nn.Identity())


def test_a_network_that_outweighs_the_layer_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    sizes = SIZES | {"compress_mlp_expand_factor": 1.0}
    whole = sum(p.numel() for p in SparseAttention(**sizes).parameters())
    phi = 2 * sum(p.numel() for p in CompressMLP(D, 6, 1.0).parameters())
    assert len(caplog.records) == 1 and phi > whole / 2
    assert f"({phi / whole:.0%})" in caplog.text and "MeanPool()" in caplog.text
    SparseAttention(**sizes)
    SparseAttention(**SIZES)  # a small one
    SparseAttention(**sizes, compress_mlp=AttentionPool(D, 6))
    assert len(caplog.records) == 1


def test_inputs_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would complain first
    layers = SparseAttention(**SIZES), WindowAttention(DIM, D, H, 5, G), Attention(DIM, D, H, G)
    for attn in layers:
        for tokens, message in (
            (torch.randn(9, DIM), r"tokens has shape \(9, 24\): it must be .* dim=24; tokens.None"),
            (torch.randn(2, 9, 7), r"tokens has shape \(2, 9, 7\): it must be"),
            (torch.randn(2, 0, DIM), "tokens is empty"),
            (torch.ones(2, 9, DIM).long(), "dtype torch.int64: attention takes floats"),
        ):
            with pytest.raises(ValueError, match=message):
                attn(tokens)


def test_a_layer_shows_its_sizes() -> None:
    shown = "w=5, l=6, d=4, l′=8, n=4, heads=4, kv_heads=2, causal=True, backend=torch"
    assert shown in repr(SparseAttention(**SIZES))
    assert "w=5, heads=4, kv_heads=2" in repr(WindowAttention(DIM, D, H, 5, G))
    assert "heads=4, kv_heads=2, causal=True" in repr(Attention(DIM, D, H, G))


def mean_score(scores, lse, visible, overlap):
    """An importance rule of a test's own."""
    return (scores.mean(2) * visible[:, 0]) @ overlap


def test_ones_own_importance_rule_by_path_or_itself() -> None:
    by_path = {"_target_": f"{__name__}.mean_score"}
    tokens = tokens_of(90)
    chosen = [
        build(importance=rule).branches(tokens).block_indices
        for rule in (by_path, mean_score, "probability_sum")
    ]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    with pytest.raises(ValueError, match=r"importance=test_attention\.mean_score"):
        SparseAttention(**SIZES, importance=by_path, backend="triton")


@pytest.mark.parametrize("option", OPTIONS)
def test_torch_and_reference_agree(option: str) -> None:
    attn, tokens = build(**OPTIONS[option]), tokens_of(70)
    outs, grads = [], []
    for backend in ("torch", "reference"):
        attn.backend = backend
        outs.append(attn(tokens))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [*attn.parameters()]))
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads)


def test_the_chosen_backend_is_readable_and_used() -> None:
    assert SparseAttention(**SIZES).backend == "torch"
    attn = SparseAttention(**SIZES, backend="flex")
    window = WindowAttention(DIM, D, H, 5, G, backend="flex")
    assert attn.backend == window.backend == "flex"
    for module in (attn, window):
        with pytest.raises(ValueError, match="backend='flex' has no backward on a CPU"):
            module(torch.randn(1, 20, DIM))


def test_dense_attention_is_causal_and_its_gate_starts_half_open() -> None:
    plain, gated = Attention(DIM, D, H, G), Attention(DIM, D, H, G, output_gate=True)
    gated.load_state_dict(gated.state_dict() | plain.state_dict())
    tokens = torch.randn(2, 30, DIM)
    torch.testing.assert_close(2 * gated(tokens), plain(tokens))
    attn = randomise(Attention(DIM, D, H, G, output_gate=True))
    later = tokens.clone()
    later[:, 20:] += 1
    torch.testing.assert_close(attn(tokens)[:, :20], attn(later)[:, :20])
    attn(tokens).square().sum().backward()
    assert all(p.grad.ne(0).any() for p in attn.parameters())
    both_ways = copy.deepcopy(attn)
    both_ways.causal = False
    assert not torch.allclose(both_ways(tokens)[:, :20], both_ways(later)[:, :20])


@pytest.mark.parametrize("causal", [True, False])
def test_window_attention_sees_exactly_its_window(causal: bool) -> None:
    attn, tokens = randomise(WindowAttention(DIM, D, H, 5, G, causal)), torch.randn(1, 30, DIM)
    for s in (0, 14, 29):
        later = tokens.clone()
        later[:, s] = torch.randn(DIM)
        changed = (attn(tokens) - attn(later)).abs().amax((0, 2)) > 1e-6
        assert torch.equal(changed, blocks.sliding_window(30, attn.cfg)[:, s])
    attn(tokens).square().sum().backward()
    assert all(p.grad.ne(0).any() for p in attn.parameters())


def test_a_window_of_one_key_leaves_no_parameter_without_a_gradient() -> None:
    attn = WindowAttention(DIM, D, H, 1)
    attn(torch.randn(1, 9, DIM)).sum().backward()
    assert all(p.grad is not None for p in attn.parameters())


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, D).expand(1, 20, 1, D), torch.randn(1, 1, 1, D).expand(1, 20, 1, D)
    angles = Rotary(D).angles(20)
    scores = rotate(q, angles)[0, :, 0] @ rotate(k, angles)[0, :, 0].T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.01
    torch.testing.assert_close(Rotary(D).angles_at(torch.arange(15, 20)), angles[15:])
    assert rotate(q.bfloat16(), angles).dtype == torch.bfloat16
    assert rotate(q.double(), angles).dtype == torch.float64
    torch.testing.assert_close(rotate(q, angles).norm(dim=-1), q.norm(dim=-1))


def test_checkpointed_gradients_are_the_same_bit_for_bit() -> None:
    attn, tokens = build(use_diff_topk=True).float(), tokens_of(64).float().requires_grad_()
    grads = []
    for run in (attn, lambda x: checkpoint(attn, x, use_reentrant=False)):
        attn.zero_grad()
        tokens.grad = None
        run(tokens).square().sum().backward()
        grads.append([tokens.grad, *(p.grad for p in attn.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("option", ["paper", "memory", "use_diff_topk", "attention pool"])
def test_autocast_stays_close_to_float32(option: str) -> None:
    attn, tokens = build(**OPTIONS[option]).float(), tokens_of(64).float()
    want = attn(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branches = attn.branches(tokens)
        got = attn(tokens)
    assert {x.dtype for x in branches[:4]} == {torch.bfloat16}
    error = (got.float() - want).norm() / want.norm()
    assert error < 0.1  # a block that ranks differently after rounding counts in full
    got.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in attn.parameters())


def test_it_compiles_without_a_break() -> None:
    """In a process of its own: the tests' type checks cannot be traced."""
    program = """
import warnings
import torch
from nsa.attention import SparseAttention
warnings.simplefilter("error")
# Dynamo itself makes a context as torch deprecates it.
warnings.filterwarnings("ignore", "<class 'torch.autograd.function.Function'> should not")
from nsa.compress_networks import MeanPool
for phi in (None, MeanPool()):
    attn = SparseAttention(24, 8, 4, 5, 6, 4, 8, 3, kv_heads=2, use_diff_topk=True,
                           num_compressed_mem_kv=1, compress_mlp=phi)
    tokens = torch.randn(2, 40, 24)
    out = torch.compile(attn, fullgraph=True, backend="aot_eager")(tokens)
    torch.testing.assert_close(out, attn(tokens))
    out.sum().backward()
    assert all(p.grad is not None for p in attn.parameters())
"""
    result = forked_runs.python(program)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "torch", "flex", "triton"])
def test_it_trains_on_a_gpu_in_bfloat16(backend: str) -> None:
    sizes = SIZES | {"dim_head": 32, "sliding_window_size": 64}
    attn = SparseAttention(**sizes, backend=backend).cuda()
    tokens = torch.randn(2, 300, DIM, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        attn(tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attn.parameters())
    judge = copy.deepcopy(attn).double().cpu()
    judge.backend = "reference"
    want = judge(tokens.double().cpu())
    torch.testing.assert_close(attn(tokens).double().cpu(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("phi", [AttentionPool(D, 6), MeanPool()])
def test_flops_of_compression_are_counted_without_an_op(phi: nn.Module, monkeypatch) -> None:
    """Kernels take no meta tensors."""
    attn = build(compress_mlp=phi)
    for op in ("attention_pool", "block_means"):
        monkeypatch.setattr(f"nsa.ops.{op}", None)
    assert (attn.compress_flops(24) > 0) == isinstance(phi, AttentionPool)
