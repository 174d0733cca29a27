"""The controls of selection: what each one keeps, told by brute force."""

import copy

import forked_runs
import pytest
import torch
from torch import Tensor

from nsa import blocks
from nsa.attention import SparseAttention
from nsa.selection import attention_mass, random_blocks
from nsa.transformer import Transformer

DIM, D, H, G, SIZE, N = 16, 8, 4, 2, 8, 4


def build(selection: str, **options) -> SparseAttention:
    torch.manual_seed(0)
    attn = SparseAttention(
        DIM, D, H, 5, 6, 4, SIZE, N, kv_heads=G, compress_mlp_expand_factor=0.25,
        selection=selection, **options,
    )  # fmt: skip
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attn.double().eval()


def tokens_of(num_tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, num_tokens, DIM, dtype=torch.float64)


@pytest.mark.parametrize("shared", [True, False])
def test_the_oracle_keeps_the_blocks_of_the_largest_dense_attention_mass(shared: bool) -> None:
    attn = build("oracle", query_heads_share_selected_kv=shared, num_local_blocks=1)
    tokens = tokens_of(70)
    kept = attn.branches(tokens).block_indices
    x = attn._project(tokens)
    k = x.k_slc.repeat_interleave(H // G, dim=2)
    for b, t, j in ((0, 69, 0), (1, 69, 1), (0, 50, 1), (1, 41, 0), (0, 20, 0)):
        heads = range(j * H // G, (j + 1) * H // G) if shared else [j]
        mass: dict[int, float] = {}
        for h in heads:
            p = (k[b, : t + 1, h] @ x.q_rot[b, t, h] / D**0.5).softmax(0)
            for s in range(t + 1):
                mass[s // SIZE] = mass.get(s // SIZE, 0.0) + p[s].item()
        forced = {0, t // SIZE}
        free = sorted(set(mass) - forced, key=lambda s: -mass[s])[: N - len(forced)]
        want = sorted(forced | set(free))
        assert [s for s in kept[b, t, j].tolist() if s >= 0] == want


def test_the_mass_of_all_blocks_is_one_a_head_and_hides_the_future() -> None:
    attn, tokens = build("oracle"), tokens_of(33)
    x = attn._project(tokens)
    mass = attention_mass(x.q_rot, x.k_slc, attn.cfg)
    torch.testing.assert_close(mass.sum(-1), torch.full_like(mass[..., 0], H // G))
    assert not mass[:, 10, :, 2:].any()
    at = torch.tensor([[5, 20], [32, 1]])
    few = attention_mass(x.q_rot[torch.arange(2)[:, None], at], x.k_slc, attn.cfg, positions=at)
    torch.testing.assert_close(few, mass[torch.arange(2)[:, None], at])


def test_random_blocks_are_causal_distinct_and_as_many_as_the_learned_ones() -> None:
    tokens = tokens_of(70)
    learned = build("learned").branches(tokens).block_indices
    drawn = build("random").branches(tokens).block_indices
    assert drawn.shape == learned.shape and drawn.dtype == learned.dtype
    assert torch.equal((drawn >= 0).sum(-1), (learned >= 0).sum(-1))
    own = torch.arange(70)[:, None, None] // SIZE
    assert (drawn <= own).all() and (drawn.eq(own).any(-1)).all()
    slots = drawn[:, 32:]
    assert (slots.diff(dim=-1) > 0).all()


def test_random_blocks_are_drawn_evenly() -> None:
    cfg = build("random").cfg
    drawn = random_blocks(torch.arange(400), G, 80, cfg)[:, -1]
    shares = torch.stack([(drawn == s).any(-1).double().mean() for s in range(10)])
    assert shares[[0, 8, 9]].eq(1).all()  # forced
    assert (shares[1:8] - 1 / 7).abs().max() < 0.05  # one free choice of seven


def test_random_blocks_change_with_step_sequence_query_head_and_layer() -> None:
    attn, tokens = build("random"), tokens_of(80)
    fixed = attn.branches(tokens).block_indices
    assert torch.equal(fixed, attn.branches(tokens).block_indices)
    assert torch.equal(fixed[0], fixed[1])  # of a trained model: by position alone
    other_layer = build("random", selection_seed=1).branches(tokens).block_indices
    attn.train()
    torch.manual_seed(1)
    first, second = (attn.branches(tokens).block_indices for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, attn.branches(tokens).block_indices)
    pairs = [(fixed, other_layer), (first, second), (first[0], first[1])]
    pairs += [(first[:, :, 0], first[:, :, 1]), (first[:, 76], first[:, 77])]
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_compiled_programs_hold_no_sort() -> None:
    """TorchInductor would make a kernel of it that takes minutes to compile.

    In a process of its own: the tests' type checks cannot be traced.
    """
    program = """
import torch
from nsa.attention import SparseAttention
for selection in ("random", "oracle"):
    called = []
    def keep(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph
    attn = SparseAttention(16, 8, 4, 5, 6, 4, 8, 4, kv_heads=2, selection=selection).eval()
    tokens = torch.randn(2, 70, 16)
    torch.testing.assert_close(torch.compile(attn, backend=keep)(tokens), attn(tokens))
    assert called and not any("sort" in target for target in called), called
"""
    result = forked_runs.python(program)
    assert result.returncode == 0, result.stderr


def test_a_transformer_gives_each_layer_a_seed_of_its_own() -> None:
    attention = dict(
        sliding_window_size=4, compress_block_size=4, compress_block_sliding_stride=4,
        selection_block_size=4, num_selected_blocks=2, compress_network="mean_pool",
        compress_mlp_expand_factor=1.0, selection="random",
    )  # fmt: skip
    model = Transformer(8, 8, 2, 1, 8, attention=attention, seq_len=16)
    assert [block.attention.selection_seed for block in model.blocks] == [0, 1]


def test_none_is_the_layer_whose_selected_gate_is_zero() -> None:
    whole, none = build("learned"), build("none")
    state = copy.deepcopy(whole.state_dict())
    kv = state["to_kv.weight"].unflatten(0, (6, -1))
    state["to_kv.weight"] = kv[[0, 1, 4, 5]].flatten(0, 1)
    none.load_state_dict(state)
    tokens = tokens_of(70)
    parts = whole.branches(tokens)
    gates = parts.gates.clone()
    gates[..., 1] = 0.0
    out = gates[..., 0, None] * parts.compressed + gates[..., 2, None] * parts.sliding
    torch.testing.assert_close(none(tokens), whole.to_out(out.flatten(-2)))
    assert (
        none.cfg.num_selected_blocks == 0
        and not blocks.keys_per_query(9, none.cfg)["selected"].any()
    )
