"""φ: every network folds blocks as its name says, and `BlockCompressor` folds the right tokens."""

import pytest
import torch
from torch import nn

from nsa import blocks
from nsa.compress_networks import (
    AttentionPool,
    BlockCompressor,
    CompressMLP,
    ConvLinearCompress,
    GroupedMLP,
    MeanPool,
    SingleProjection,
    build_compress_network,
    check_folds,
)
from nsa.compress_transformers import CompressTransformer, PerHeadTransformer
from nsa.config import NSAConfig
from nsa.pooling import block_means

HEADS, L, D = 2, 6, 8
NETWORKS = {
    "mean_pool": MeanPool(),
    "mlp": CompressMLP(D, L, 0.5),
    "grouped_mlp": GroupedMLP(D, L, HEADS, 0.5),
    "single_projection": SingleProjection(D, L, HEADS),
    "conv_linear": ConvLinearCompress(HEADS, D, L),
    "attention_pool": AttentionPool(D, L),
    "compress_transformer": CompressTransformer(2, HEADS * D, 2),
    "per_head_transformer": PerHeadTransformer(2, D, 2),
}


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("name", NETWORKS)
def test_each_block_of_each_head_is_folded_alone(name: str) -> None:
    """Gradients of one block of one head reach that block only, and every token of it.

    `CompressTransformer` mixes the heads of a block, and only them.
    """
    network = randomise(NETWORKS[name])
    windows = torch.randn(2, HEADS, 3, L, D, requires_grad=True)
    out = network(windows)
    assert out.shape == (2, HEADS, 3, D)
    (grad,) = torch.autograd.grad(out[1, 0, 2].square().sum(), windows)
    touched = grad.abs().sum(-1) > 0
    mixed = HEADS if name == "compress_transformer" else 1
    assert touched[1, :mixed, 2].all() and touched.sum() == mixed * L


@pytest.mark.parametrize("name", NETWORKS)
def test_order_matters_to_all_but_the_symmetric_ones(name: str) -> None:
    network, windows = randomise(NETWORKS[name]), torch.randn(1, HEADS, 3, L, D)
    same = torch.allclose(network(windows), network(windows.flip(3)), atol=1e-5)
    assert same == (name in ("mean_pool", "per_head_transformer"))  # positions are added before φ


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_built_by_name(name: str) -> None:
    built = build_compress_network(
        name, dim_head=D, kv_heads=HEADS, compress_block_size=L, expand_factor=0.5
    )
    for_all_heads = {"single_projection": SingleProjection(D, L)}  # conv_linear has one a head
    wanted = for_all_heads.get(name, NETWORKS[name])
    assert type(built) is type(wanted)
    if not name.endswith("_transformer"):  # built with one layer
        assert [p.shape for p in built.parameters()] == [p.shape for p in wanted.parameters()]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compress_network='mean-pool' is unknown: .*mean_pool"):
        build("mean-pool")


def build(network) -> nn.Module:
    return build_compress_network(network, dim_head=D, kv_heads=HEADS, compress_block_size=L)


class LastToken(nn.Module):
    """A φ of a test's own, that asks for what it needs by name."""

    def __init__(self, dim_head: int, compress_window_size: int, scale: float) -> None:
        super().__init__()
        self.sizes = dim_head, compress_window_size
        self.scale = nn.Parameter(torch.full((dim_head,), scale))

    def forward(self, windows):
        return windows[:, :, :, -1] * self.scale


def test_ones_own_network_is_named_by_its_path() -> None:
    network = build({"_target_": f"{__name__}.LastToken", "scale": 2.0})
    assert type(network).__name__ == "LastToken" and network.sizes == (D, L)
    windows = torch.randn(1, HEADS, 3, L, D)
    torch.testing.assert_close(network(windows), 2 * windows[:, :, :, -1])


def test_options_reach_a_built_in_network() -> None:
    options = {"num_layers": 3, "num_heads": 4, "ff_hidden_dim": 20, "dropout": 0.5}
    network = build({"name": "compress_transformer", **options})
    assert len(network.layers) == 3 and network.layers[0].num_heads == 4
    assert network.layers[0].feed_forward[1].out_features == 20
    windows = torch.randn(1, HEADS, 3, L, D)
    assert not torch.equal(network(windows), network(windows))
    network.eval()
    assert torch.equal(network(windows), network(windows))
    assert build({"name": "per_head_transformer", "num_heads": 4}).layers[0].num_heads == 4
    assert build({"name": "single_projection", "heads": HEADS}).weight.shape[0] == HEADS


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"width": 3}, "must have one of name .* and _target_"),
        ({"name": "mlp", "width": 3}, "mlp takes no width; it takes dim_head, compress_window_s"),
        ({"_target_": "nowhere.Phi"}, "_target_=nowhere.Phi cannot be imported .*nowhere"),
        ({"_target_": f"{__name__}.Phi"}, "Phi cannot be imported"),
        ({"_target_": f"{__name__}.D"}, "is 8: it must be a class or function"),
        ({"_target_": f"{__name__}.LastToken"}, r"LastToken needs scale: set it beside its name"),
    ],
)
def test_what_cannot_be_built_is_refused(network: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(network)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            nn.Identity(),
            r"compress_mlp=Identity gives shape \(1, 2, 3, 6, 8\).*must give \(1, 2, 3, 8",
        ),
        (nn.Linear(5, 8), "compress_mlp=Linear fails on blocks of shape .*: mat1 and mat2"),
        (CompressTransformer(1, D, 2), r"dim must be kv_heads \* dim_head = 2 \* 8 = 16"),
    ],
)
def test_a_network_of_another_shape_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_folds(network, HEADS, L, D)


def test_the_check_of_shapes_draws_nothing_and_changes_nothing() -> None:
    network = CompressTransformer(1, HEADS * D, 2, dropout=0.5)
    before = torch.get_rng_state()
    check_folds(network, HEADS, L, D)
    assert torch.equal(before, torch.get_rng_state()) and network.training


def test_heads_have_weights_of_their_own_where_it_says_so() -> None:
    # The heads of CompressTransformer are places in a row.
    OWN_WEIGHTS = ("grouped_mlp", "single_projection", "conv_linear", "compress_transformer")
    same = torch.randn(1, 1, 3, L, D).expand(1, HEADS, 3, L, D)
    for name, network in NETWORKS.items():
        out = randomise(network)(same)
        alike = torch.allclose(out[:, 0], out[:, 1], atol=1e-6)
        assert alike == (name not in OWN_WEIGHTS), name
    shared = randomise(SingleProjection(D, L))(same)
    torch.testing.assert_close(shared[:, 0], shared[:, 1])


def test_the_single_projection_is_a_linear_map_of_the_block() -> None:
    linear, windows = SingleProjection(D, L), torch.randn(2, HEADS, 3, L, D)
    want = windows.flatten(-2) @ linear.weight[0] + linear.bias[0]
    torch.testing.assert_close(linear(windows), want)


def test_pools_start_as_the_mean() -> None:
    windows = torch.randn(2, HEADS, 3, L, D)
    torch.testing.assert_close(MeanPool()(windows), windows.mean(-2))
    torch.testing.assert_close(AttentionPool(D, L)(windows), windows.mean(-2))


def test_the_expand_factor_sets_the_hidden_width() -> None:
    assert CompressMLP(D, L, 0.25).layers[0].out_features == L * D // 4
    assert GroupedMLP(D, L, HEADS, 0.25).weight_in.shape == (HEADS, L * D, L * D // 4)
    with pytest.raises(ValueError, match=r"expand_factor=0.0 must be above 0"):
        CompressMLP(D, L, 0.0)
    with pytest.raises(ValueError, match=r"dim=8 must be a multiple of num_heads=3"):
        CompressTransformer(1, D, 3)


CFG = NSAConfig(compress_block_size=L, compress_block_sliding_stride=4, selection_block_size=8)


@pytest.mark.parametrize("num_tokens", [1, 5, 6, 30])
def test_the_compressor_folds_l_tokens_every_d_with_their_positions(num_tokens: int) -> None:
    compressor = randomise(BlockCompressor(AttentionPool(D, L), CFG, HEADS, D, positions=True))
    x = torch.randn(2, num_tokens, HEADS, D)
    out = compressor(x)
    assert out.shape == (2, blocks.num_compress_blocks(num_tokens, CFG), HEADS, D)
    for c in range(out.shape[1]):
        window = x[:, 4 * c : 4 * c + L].transpose(1, 2)[:, :, None]  # [B G 1 l D]
        want = compressor.network(window + compressor.positions)
        torch.testing.assert_close(out[:, c], want[:, :, 0])
    out.sum().backward()  # also of no block at all
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressor.parameters())


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 6, 31])
def test_the_compressor_pools_without_windows(num_tokens: int, positions: bool) -> None:
    """What the network would give on the windows, to the tokens' and the positions' gradients."""
    compressor = randomise(BlockCompressor(MeanPool(), CFG, HEADS, D, positions=positions))
    x = torch.randn(2, num_tokens, HEADS, D, requires_grad=True)
    out = compressor(x)
    windows = blocks.compress_windows(nn.functional.pad(x, (0, 0, 0, 0, 0, L)), CFG)
    windows = windows[:, :, : out.shape[1]]
    if positions:
        windows = windows + compressor.positions
    want = MeanPool()(windows).transpose(1, 2)
    torch.testing.assert_close(out, want)
    inputs = [x, *compressor.parameters()]
    grads = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, want))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("sizes", [(4, 2), (6, 4), (7, 3), (5, 5), (3, 1)])
@pytest.mark.parametrize("num_tokens", [7, 12, 17])
def test_block_means(sizes: tuple[int, int], num_tokens: int) -> None:
    """Blocks that share any part of their tokens, and a tail that no block covers."""
    size, stride = sizes
    cfg = NSAConfig(
        compress_block_size=size, compress_block_sliding_stride=stride,
        selection_block_size=4 * stride if size > stride else stride,
    )  # fmt: skip
    x = torch.randn(2, num_tokens, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(block_means(x, cfg), x.unfold(1, size, stride).mean(-1))
    torch.autograd.gradcheck(lambda x: block_means(x, cfg), x)
    torch.autograd.gradgradcheck(lambda x: block_means(x, cfg), x)


def test_the_compressor_copies_its_network() -> None:
    network = CompressMLP(D, L)
    keys, values = (BlockCompressor(network, CFG, HEADS, D, positions=True) for _ in range(2))
    given = {id(p) for module in (network, keys, values) for p in module.parameters()}
    assert len(given) == 4 + 5 + 5
    torch.testing.assert_close(keys.network.state_dict(), values.network.state_dict())
    assert BlockCompressor(network, CFG, HEADS, D, positions=False).positions is None


@pytest.mark.parametrize("name", NETWORKS)
def test_under_autocast_keys_keep_their_dtype(name: str) -> None:
    compressor = BlockCompressor(NETWORKS[name], CFG, HEADS, D, positions=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compressor(torch.randn(1, 20, HEADS, D).bfloat16()).dtype == torch.bfloat16
