"""The whole model: how it starts, that it learns, what it costs, and how it samples."""

import math

import pytest
import torch
import torch.nn.functional as F

from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.cost import training_flops
from nsa.transformer import Transformer

V, DIM, HEADS, KV_HEADS, DIM_HEAD, DEPTH = 61, 32, 4, 2, 8, 2
ATTENTION = dict(
    sliding_window_size=8,
    compress_block_size=8,
    compress_block_sliding_stride=4,
    selection_block_size=16,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
    importance="probability_sum",
    compress_network="single_projection",
    compress_mlp_expand_factor=1.0,
    num_compressed_mem_kv=0,
    use_diff_topk=False,
    query_heads_share_selected_kv=True,
    kv_per_branch=True,
    compressed_output=True,
    gate_bias=0.0,
    backend="reference",
)


def transformer(*pattern: str, **options) -> Transformer:
    sizes = dict(dim=DIM, depth=DEPTH, heads=HEADS, dim_head=DIM_HEAD, kv_heads=KV_HEADS)
    sizes |= dict(seq_len=64, attention=ATTENTION, layer_pattern=pattern or ("nsa",))
    return Transformer(V, **(sizes | options))


def next_token_loss(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["nsa", "window", "dense"])
def test_loss_starts_at_ln_v_and_one_batch_is_learned_by_heart(kind: str) -> None:
    model, ids = transformer(kind), torch.randint(V, (2, 41))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = next_token_loss(model, ids)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(V), abs=0.1)
    assert losses[-1] < 0.5


def test_layer_pattern_cycles_over_the_layers() -> None:
    model = transformer("window", "nsa", "dense", depth=4)
    kinds = [type(block.attention) for block in model.layers]
    assert kinds == [WindowAttention, SparseAttention, Attention, WindowAttention]


@pytest.mark.parametrize("pattern", [(), ("nsa", "sparse")])
def test_an_unknown_layer_is_refused(pattern: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"layer_pattern=.*nsa, window, dense"):
        Transformer(
            V, DIM, DEPTH, HEADS, DIM_HEAD, attention=ATTENTION, seq_len=8, layer_pattern=pattern
        )


@pytest.mark.parametrize(
    "change", [{"dim": 0}, {"depth": 0}, {"heads": 0}, {"seq_len": 0}, {"feed_forward_expand": 0.0}]
)
def test_an_impossible_size_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}=0"):
        transformer(**change)


def test_no_key_value_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads=0"):
        transformer(kv_heads=0)


@pytest.mark.parametrize("pattern", [("nsa",), ("window", "nsa"), ("dense",)])
def test_no_logit_depends_on_a_later_token(pattern: tuple[str, ...]) -> None:
    model, ids = transformer(*pattern).double().eval(), torch.randint(V, (1, 50))
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % V
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


def test_dropout_acts_in_training_only() -> None:
    model, ids = transformer(dropout=0.5), torch.randint(V, (1, 20))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_tied_embeddings_and_the_dense_gate_change_the_parameters() -> None:
    untied, tied = transformer(), transformer(tie_embeddings=True)
    assert untied.num_params - tied.num_params == V * DIM
    gated, plain = transformer("dense", dense_output_gate=True), transformer("dense")
    assert gated.num_params > plain.num_params


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_begins_as_wide_as_it_is_told(tied: bool) -> None:
    for std in (0.02, 1.0):
        model = transformer(embedding_std=std, tie_embeddings=tied)
        assert model.embedding.weight.std().item() == pytest.approx(std, rel=0.1)
        head = std if tied else 0.02
        assert model.head.weight.std().item() == pytest.approx(head, rel=0.1)
    with pytest.raises(ValueError, match=r"embedding_std=0\.0 must be above 0"):
        transformer(embedding_std=0.0)


def test_feed_forward_width_follows_expand() -> None:
    model = transformer(feed_forward_expand=4.0)
    assert model.layers[0].feed_forward.to_out.in_features == 4 * DIM


def test_training_flops_equal_a_count_by_hand() -> None:
    num_tokens, layers, pair = 64, DEPTH, 4 * HEADS * DIM_HEAD
    inner, kv = HEADS * DIM_HEAD, KV_HEADS * DIM_HEAD
    hidden = 128  # 32 * 8 / 3, rounded up to a multiple of 64
    projections = DIM * inner + DIM * 6 * kv + DIM * 3 * HEADS + inner * DIM
    linear = layers * (projections + 3 * DIM * hidden) + DIM * V
    visible = sum(sum(4 * c + 7 <= t for c in range(15)) for t in range(num_tokens))
    selected = sum((min(3, t // 16 + 1) - 1) * 16 + t % 16 + 1 for t in range(num_tokens))
    sliding = sum(min(t + 1, 8) for t in range(num_tokens))
    phi = 2 * 15 * KV_HEADS * (2 * 8 * DIM_HEAD * DIM_HEAD)  # keys and values, 15 blocks
    by_hand = {
        "linear": 3 * 2 * linear,
        "compress": 3 * layers * phi / num_tokens,
        "compressed": 3 * layers * pair * visible / num_tokens,
        "selected": 3 * layers * pair * selected / num_tokens,
        "sliding": 3 * layers * pair * sliding / num_tokens,
    }
    model = transformer()
    assert training_flops(model.blocks, model.head, num_tokens) == pytest.approx(by_hand)
    assert model.flops_per_token(num_tokens) == pytest.approx(sum(by_hand.values()))


def test_flops_of_dense_attention_grow_with_the_sequence() -> None:
    pair = 4 * HEADS * DIM_HEAD
    dense = transformer("dense")
    flops = training_flops(dense.blocks, dense.head, 64)["dense"]
    assert flops == pytest.approx(3 * DEPTH * pair * 32.5)


@pytest.mark.parametrize(
    ("pattern", "visible"),
    [(("nsa",), 15 + 48 + 8), (("window",), 8), (("dense",), 64), (("window", "dense"), 36)],
)
def test_visible_tokens_are_those_of_the_last_query(pattern: tuple[str, ...], visible: int) -> None:
    assert transformer(*pattern).visible_tokens(64) == visible


def test_sampling_without_temperature_takes_the_likeliest_token() -> None:
    model, prompt = transformer(), torch.randint(V, (2, 3))
    model.head.weight.data.normal_()
    new = model.sample(prompt, seq_len=8, temperature=0.0)
    assert new.shape == (2, 5) and model.training
    model.eval()
    ids = torch.cat([prompt, new], dim=1)
    assert torch.equal(model(ids)[:, 2:-1].argmax(-1), new)


def test_temperature_and_filter_bound_what_is_drawn() -> None:
    model, prompt = transformer(), torch.randint(V, (1, 3)).expand(16, 3)
    model.head.weight.data.normal_()
    greedy = model.sample(prompt, seq_len=4, temperature=0.0)
    assert torch.equal(model.sample(prompt, seq_len=4, filter_thres=0.99), greedy)
    assert torch.equal(model.sample(prompt, seq_len=4, temperature=1e-4), greedy)
    assert model.sample(prompt, seq_len=4, temperature=9.0, filter_thres=0.0).unique().numel() > 1


def test_sampling_looks_back_one_sequence_length() -> None:
    model, prompt = transformer(seq_len=16).eval(), torch.randint(V, (1, 40))
    model.head.weight.data.normal_()
    whole = model.sample(prompt, seq_len=41, temperature=0.0)
    assert torch.equal(whole, model.sample(prompt[:, -16:], seq_len=17, temperature=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"filter_thres": 2.0}, "filter_thres=2.0 must lie between 0 and 1"),
        ({"seq_len": 3}, "seq_len=3 counts the prompt's 3 tokens too"),
    ],
)
def test_impossible_sampling_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer().sample(torch.randint(V, (1, 3)), **({"seq_len": 8} | options))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        transformer().sample(torch.zeros(1, 0, dtype=torch.long), seq_len=4)
