"""Documents that share a row: as if each stood alone, whatever its neighbours hold."""

from collections.abc import Callable
from functools import partial

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from nsa import Transformer
from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.compress_networks import AttentionPool, MeanPool
from nsa.documents import Layout, check_documents, document_ends, document_starts, layout, positions

SMALL, STRIDE, BLOCK = 8, 4, 16  # l, d, l'
LENGTHS = {
    "edges": [1, SMALL - 1, SMALL, BLOCK - 1, BLOCK, BLOCK + 1, 50, 3],
    "one document": [101],
    "many of 8": [8] * 12,
}
SIZES = dict(
    dim=12, dim_head=6, heads=2, kv_heads=1, sliding_window_size=10, compress_block_size=SMALL,
    compress_block_sliding_stride=STRIDE, selection_block_size=BLOCK, num_selected_blocks=2,
    num_local_blocks=1,
)  # fmt: skip
OPTIONS = {
    "paper": {"compress_mlp": AttentionPool(6, SMALL)},
    "straight-through, memory": {"use_diff_topk": True, "num_compressed_mem_kv": 2},
    "per head, logit mean": {
        "query_heads_share_selected_kv": False, "importance": "logit_mean", "use_diff_topk": True,
        "compress_mlp": MeanPool(),
    },
    "per head": {"query_heads_share_selected_kv": False, "compress_mlp": MeanPool()},
    "random": {"selection": "random"},
    "oracle": {"selection": "oracle", "num_local_blocks": 2, "num_initial_blocks": 2},
    "no selection": {"num_selected_blocks": 0},
}  # fmt: skip
LAYERS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(SparseAttention, **(SIZES | more)) for name, more in OPTIONS.items()},
    "window": partial(WindowAttention, 12, 6, 2, 10, 1),
    "window of one": partial(WindowAttention, 12, 6, 2, 1, 1),
}


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)[None]


def laid_out(lengths: list[int], alignment: int) -> Layout:
    borders = borders_of(lengths)
    aligned = sum(-(-n // alignment) * alignment for n in lengths)
    return layout(document_starts(borders, sum(lengths)), alignment, aligned + 5)


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def packed_and_alone(module: nn.Module, lengths: list[int], alignment: int) -> list[list[Tensor]]:
    """Output and every gradient: of documents in one row, and of each in a row of its own."""
    tokens = torch.randn(1, sum(lengths), 12, dtype=torch.float64).requires_grad_()
    upstream = torch.randn_like(tokens)
    leaves = [tokens, *module.parameters()]
    places = laid_out(lengths, alignment)
    together = module(places.align(tokens), document_starts=places.document_starts)
    alone = torch.cat([module(part) for part in tokens.split(lengths, dim=1)], dim=1)
    return [
        [out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True)]
        for out in (places.unalign(together), alone)
    ]


def assert_same(got: list[Tensor], want: list[Tensor], atol: float = 1e-9) -> None:
    for a, b in zip(got, want, strict=True):
        zero = torch.zeros(())  # None: no gradient
        a, b = (zero if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b.expand_as(a) if b.ndim == 0 else b, atol=atol, rtol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", LAYERS)
def test_documents_are_as_if_alone(name: str, backend: str) -> None:
    module = randomised(LAYERS[name](backend=backend))
    for lengths in LENGTHS.values():
        assert_same(*packed_and_alone(module, lengths, module.document_alignment))


def test_dense_documents_are_as_if_alone(monkeypatch) -> None:
    monkeypatch.setattr("nsa.dense.QUERIES", 32)
    module = randomised(Attention(12, 6, 2, 1, output_gate=True))
    for lengths in LENGTHS.values():
        assert_same(*packed_and_alone(module, lengths, 1))


def test_flex_documents_are_those_of_the_reference(monkeypatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    module = randomised(LAYERS["per head"](backend="flex")).float()
    judge = LAYERS["per head"](backend="reference").eval()
    judge.load_state_dict(module.state_dict())
    places = laid_out(LENGTHS["edges"], BLOCK)
    x = torch.randn(1, places.document_starts.shape[1], 12)
    with torch.no_grad():
        got, want = (each(x, document_starts=places.document_starts) for each in (module, judge))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[16, 16, 16], LENGTHS["edges"][:6]])
def test_triton_documents_are_those_of_the_reference(lengths: list[int]) -> None:
    pytest.importorskip("triton")
    options = dict(dim_head=16, compress_mlp=MeanPool())
    module, judge = (LAYERS["paper"](**options, backend=name) for name in ("triton", "reference"))
    judge.load_state_dict(randomised(module).float().state_dict())
    starts = laid_out(lengths, BLOCK).document_starts
    x = torch.randn(1, starts.shape[1], 12, requires_grad=True)
    results = []
    for each, dtype in ((module, torch.float32), (judge.double().eval(), torch.float64)):
        out = each(x.to(dtype), document_starts=starts)
        leaves = [x, *each.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "number"), [("paper", 100), ("window", 1000), ("dense", 1000)])
def test_a_thousand_documents_of_8_tokens(name: str, number: int) -> None:
    """The reference's selected branch has T x T scores, so a hundred do for it."""
    dense = partial(Attention, 12, 6, 2, 1)
    module = randomised(dense() if name == "dense" else LAYERS[name](backend="torch"))
    tokens = torch.randn(number, 8, 12, dtype=torch.float64)
    places = laid_out([8] * number, module.document_alignment)
    with torch.no_grad():
        packed = places.align(tokens.view(1, -1, 12))
        got = places.unalign(module(packed, document_starts=places.document_starts))
        torch.testing.assert_close(got.view_as(tokens), module(tokens), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["straight-through, memory", "paper", "window"])
def test_a_neighbour_changes_no_bit(name: str) -> None:
    """Outputs and gradients of tokens, where another document is perturbed."""
    module = randomised(LAYERS[name](backend="torch")).float()
    places = laid_out([30, 40, 20], BLOCK)
    x = torch.randn(1, places.document_starts.shape[1], 12)
    other = x.clone()
    second = places.document_starts[0] == 32
    other[:, second] = torch.randn_like(other[:, second]) * 3
    kept = []
    for tokens in (x, other):
        tokens = tokens.requires_grad_()
        out = module(tokens, document_starts=places.document_starts)
        weights = torch.ones_like(out)
        weights[:, second] = tokens[:, second].detach()  # its loss is another one, too
        (grad,) = torch.autograd.grad(out, tokens, weights)
        kept.append((out[:, ~second], grad[:, ~second]))
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


# ---- the model ------------------------------------------------------------


def model(**options) -> Transformer:
    attention = {key: value for key, value in SIZES.items() if "_" in key and key != "dim_head"}
    del attention["kv_heads"]
    attention |= dict(compress_network="mean_pool", compress_mlp_expand_factor=1.0)
    sizes = dict(vocab_size=20, dim=12, depth=3, heads=2, dim_head=6, kv_heads=1, seq_len=64)
    pattern = ("nsa", "window", "dense")
    return Transformer(**(sizes | dict(layer_pattern=pattern, attention=attention) | options))


def test_a_model_reads_documents_as_if_alone() -> None:
    net, lengths = randomised(model()), LENGTHS["edges"]
    assert net.document_alignment == BLOCK
    ids, places = torch.randint(20, (1, sum(lengths))), laid_out(lengths, BLOCK)
    together = places.unalign(net(places.align(ids), document_starts=places.document_starts))
    alone = torch.cat([net(part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=1e-9)
    parameters, upstream = list(net.parameters()), torch.randn_like(alone)
    grads = [torch.autograd.grad(out, parameters, upstream) for out in (together, alone)]
    assert_same(*grads)
    mixed = net(places.align(ids))
    assert not torch.allclose(places.unalign(mixed), alone), "without borders documents mix"


def test_rows_have_documents_of_their_own() -> None:
    net = randomised(model())
    starts = document_starts(torch.tensor([[0, 16, 48], [0, 48, 64]]), 64)
    ids = torch.randint(20, (2, 64))
    together = net(ids, document_starts=starts)
    for row in range(2):
        one = net(ids[row : row + 1], document_starts=starts[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], one, atol=1e-12, rtol=1e-12)


def test_what_cannot_take_documents_refuses_them() -> None:
    net, ids = model(), torch.zeros(1, 32, dtype=torch.long)
    starts = document_starts(torch.tensor([[0, 16]]), 32)
    with pytest.raises(ValueError, match="one document a row"):
        net(ids, return_cache=True, document_starts=starts)
    with pytest.raises(ValueError, match="one document a row"):
        net.blocks[0].attention(torch.randn(1, 32, 12), return_cache=True, document_starts=starts)
    with pytest.raises(ValueError, match="causal=True"):
        LAYERS["paper"](causal=False)(torch.randn(1, 32, 12), document_starts=starts)
    net.blocks[2].attention.document_alignment = None
    with pytest.raises(ValueError, match="kind Attention do not keep"):
        net(ids, document_starts=starts)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.tensor([[0, 0, 2, 2]]), "int32"),
        (torch.tensor([[0, 0, 2]], dtype=torch.int32), r"of shape \(1, 4\)"),
        (torch.tensor([[0, 0, 0, 3]], dtype=torch.int32), "multiples of 2"),
        (torch.tensor([[2, 2, 2, 2]], dtype=torch.int32), "first token"),
        (torch.tensor([[0, 0, 2, 0]], dtype=torch.int32), "first token"),
        (torch.tensor([[0, 0, 0, 2]], dtype=torch.int32), "first token"),
    ],
)
def test_starts_that_are_none_are_refused(starts: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_documents(starts, 1, 4, 2)


# ---- on a GPU ------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_a_graph_replays_other_documents_and_nothing_waits_for_the_gpu() -> None:
    """Forward and backward, recorded once: as they are without a graph."""
    sizes = SIZES | dict(dim=64, dim_head=64, heads=4, compress_mlp=MeanPool(), backend="triton")
    attn = SparseAttention(**sizes).cuda()
    x = torch.randn(2, 1024, 64, device="cuda", requires_grad=True)
    leaves = [x, *attn.parameters()]
    borders = torch.tensor([[0, 64, 128, 700], [0, 16, 512, 1008]], device="cuda") // BLOCK * BLOCK
    others = torch.tensor([[0, 32, 48, 64], [0, 528, 544, 1024]], device="cuda")
    starts = document_starts(borders, 1024)

    def step() -> list[Tensor]:
        out = attn(x, document_starts=starts)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    seen = []
    for each in (others, borders):
        starts.copy_(document_starts(each, 1024))
        graph.replay()
        for got, want in zip(recorded, step(), strict=True):
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        seen.append(recorded[0].clone())
    assert not torch.allclose(*seen)


@pytest.mark.gpu
def test_dense_documents_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    module = Attention(64, 64, 4, 2)
    x = torch.randn(2, 700, 64)
    starts = document_starts(torch.tensor([[0, 1, 128, 300], [0, 511, 512, 690]]), 700)
    results = []
    for device in ("cpu", "cuda"):
        module, tokens = module.to(device), x.to(device).requires_grad_()
        out = module(tokens, document_starts=starts.to(device))
        leaves = [tokens, *module.parameters()]
        grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append([each.cpu() for each in (out, *grads)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-2)


# ---- the layout ------------------------------------------------------------


def test_a_layout_aligns_documents_and_back() -> None:
    places = laid_out([3, 4, 5], 4)
    first = places.document_starts[0].tolist()
    assert first == [0] * 4 + [4] * 4 + [8] * 13 and places.document_starts.dtype == torch.int32
    check_documents(places.document_starts, 1, 21, 4)
    x = torch.arange(1, 13)[None]
    aligned = places.align(x)
    assert aligned[0].tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10, 11, 12] + [0] * 8
    assert torch.equal(places.unalign(aligned), x)
    with pytest.raises(ValueError, match="more than 12"):
        layout(document_starts(borders_of([3, 4, 5]), 12), 4, 12)


def test_where_documents_start_and_end() -> None:
    starts = document_starts(torch.tensor([[0, 2, 5, 5], [0, 1, 2, 4]]), 5)
    assert starts.tolist() == [[0, 0, 2, 2, 2], [0, 1, 2, 2, 4]]
    assert document_ends(starts).tolist() == [[2, 2, 5, 5, 5], [1, 2, 4, 4, 5]]
    assert positions(starts).tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]
