"""Decoding with a cache gives what one forward pass over all tokens gives, selections included."""

import pytest
import torch
from kernel_inputs import DEVICE
from test_transformer import ATTENTION as SIZES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.cache import LayerCache, sparse_cache
from nsa.compress_networks import build_compress_network
from nsa.config import NSAConfig
from nsa.decoding import most_tokens
from nsa.transformer import Transformer

M, D, H, G = 24, 6, 4, 2
W, L, STRIDE, BLOCK, N = 7, 6, 4, 8, 3
T = 45


def randomised(module: nn.Module) -> nn.Module:
    """No parameter at its initial zero or one: gates, positions, memory keys, biases."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * (0.5 if x.ndim < 2 else 0.3))
    return module.double()


def sparse(phi: str = "attention_pool", **options) -> SparseAttention:
    options = {"backend": "reference", "num_compressed_mem_kv": 2} | options
    network = build_compress_network(phi, dim_head=D, kv_heads=G, compress_block_size=L)
    layer = SparseAttention(
        M, D, H, W, L, STRIDE, BLOCK, N, kv_heads=G, compress_mlp=network, **options
    )
    return randomised(layer)


def tokens(batch: int = 2, length: int = T) -> Tensor:
    return torch.randn(batch, length, M, dtype=torch.float64)


class CountOperators(TorchDispatchMode):
    """How many operators torch is asked for, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


YARN = {"type": "yarn", "factor": 4, "original_seq_len": 20}
OPTIONS = {
    "paper": {},
    "diff_topk": dict(use_diff_topk=True),
    "per_head": dict(query_heads_share_selected_kv=False),
    "shared_kv": dict(kv_per_branch=False),
    "no_output": dict(compressed_output=False, use_diff_topk=True, num_compressed_mem_kv=0),
    "logit_mean": dict(importance="logit_mean"),
    "no_memory": dict(num_compressed_mem_kv=0),
    "no_initial": dict(num_initial_blocks=0, num_local_blocks=1),
    "random": dict(selection="random", selection_seed=3),
    "oracle": dict(selection="oracle"),
    "yarn": dict(rope_scaling=YARN),
    "qk_norm": dict(qk_norm=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_token_by_token_equals_the_forward_pass(name: str) -> None:
    attn, x = sparse(**OPTIONS[name]).eval(), tokens()
    want, branches = attn(x), attn.branches(x)
    out, cache = attn(x[:, :3], return_cache=True)  # shorter than any block
    got, indices = [out], [branches.block_indices[:, :3]]
    for t in range(3, T):
        if t % 2:
            out, cache = attn(x[:, t : t + 1], cache=cache, return_cache=True)
            indices.append(branches.block_indices[:, t : t + 1])
        else:
            b = attn.branches(x[:, t : t + 1], cache)
            parts = b.compressed, b.selected, b.sliding
            out = attn.to_out(
                sum(
                    g[..., None] * p for g, p in zip(b.gates.unbind(-1), parts, strict=True)
                ).flatten(-2)
            )
            indices.append(b.block_indices)
        got.append(out)
    close(torch.cat(got, 1), want)
    assert torch.equal(torch.cat(indices, 1), branches.block_indices)
    assert cache.lengths.tolist() == [T, T]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cpu_step_equals_the_forward_pass(name: str) -> None:
    """Token by token, for sequences of one length and of several."""
    attn, x = sparse(backend="torch", **OPTIONS[name]), tokens()
    lengths, row = torch.tensor([3, 3]), torch.arange(2)
    if name in ("paper", "per_head"):
        lengths[1] = 11
    cache = attn.empty_cache(2, T)
    attn(x[:, :11], cache=cache, counts=lengths)
    want = attn(x)
    while lengths.max() < T:
        out = attn(x[row, lengths][:, None], cache=cache)
        close(out[:, 0], want[row, lengths])
        lengths += 1
    assert torch.equal(cache.lengths, lengths)


@pytest.mark.parametrize(
    "phi",
    ["mlp", "grouped_mlp", "single_projection", "conv_linear", "compress_transformer", "mean_pool"],
)
def test_every_compress_network(phi: str) -> None:
    x = tokens(1)
    for backend in ("reference", "torch"):  # which folds one block at a time
        attn = sparse(phi, backend=backend)
        out, cache = attn(x[:, :9], return_cache=True)
        rest = [attn(x[:, t : t + 1], cache=cache) for t in range(9, T)]
        close(torch.cat([out, *rest], 1), attn(x))


@pytest.mark.parametrize("kind", ["window", "dense"])
def test_the_cpu_step_of_the_twins(kind: str) -> None:
    """From the first token on, which is longer than the window in the end."""
    options: dict = dict(rope_scaling=YARN, qk_norm=True)
    attn = WindowAttention(M, D, H, W, G, **options)
    if kind == "dense":
        attn = Attention(M, D, H, G, output_gate=True, **options)
    attn, x = randomised(attn), tokens(2, 20)
    cache = attn.empty_cache(2, 4)
    close(torch.cat([attn(x[:, t : t + 1], cache=cache) for t in range(20)], 1), attn(x))


@pytest.mark.parametrize(("kind", "most"), [("nsa", 357), ("window", 155), ("dense", 163)])
def test_a_step_on_a_cpu_asks_for_few_operators(kind: str, most: int) -> None:
    """Of each, its time is mostly what it costs the host. Fewer are welcome: lower the numbers."""
    attention = SIZES | {"compress_network": "attention_pool", "num_selected_blocks": 2}
    attention |= {"backend": "torch"}
    model = Transformer(
        31, 16, 4, 4, 4, kv_heads=2, seq_len=64, attention=attention, layer_pattern=(kind,)
    )
    stream = model.stream(torch.zeros(1, 40, dtype=torch.long), 60, seed=0)
    next(stream)
    next(stream)
    with CountOperators() as counted:
        for _ in range(8):
            next(stream)
    assert counted.number / 8 <= most, counted.number / 8


@pytest.mark.parametrize("prompt", range(1, 2 * BLOCK + 2))
def test_every_prompt_length_and_several_tokens_a_call(prompt: int) -> None:
    """All residues of d, l, l' and w; then calls of 1, 2, 5, 11 tokens and the rest."""
    attn, x = sparse(), tokens(1)
    want = attn.branches(x).block_indices
    _, cache = attn(x[:, :prompt], return_cache=True)
    outs, start = [], prompt
    for size in (1, 2, 5, 11, T):
        outs.append(attn(x[:, start : start + size], cache=cache))
        start += size
    close(torch.cat(outs, 1), attn(x)[:, prompt:])
    again = attn.empty_cache(1, 4)
    attn(x[:, :prompt], cache=again)
    got = attn.branches(x[:, prompt:], again).block_indices
    assert torch.equal(got, want[:, prompt:])


@pytest.mark.parametrize("kind", ["nsa", "window", "dense"])
def test_prompts_of_different_lengths(kind: str) -> None:
    layers = {
        "nsa": sparse,
        "window": lambda: randomised(WindowAttention(M, D, H, W, G, backend="reference")),
        "dense": lambda: randomised(Attention(M, D, H, G, output_gate=True)),
    }
    attn, x = layers[kind](), tokens(4)
    lengths = torch.tensor([1, 5, 17, 30])
    cache: LayerCache = attn.empty_cache(4, 30)
    attn(x[:, :30], cache=cache, counts=lengths)
    assert torch.equal(cache.lengths, lengths)
    want = attn(x)
    for step in range(10):
        at = lengths + step
        row = torch.arange(4)
        out = attn(x[row, at][:, None], cache=cache)
        close(out[:, 0], want[row, at])


def test_no_selection_and_short_sequences() -> None:
    attn = randomised(
        SparseAttention(M, D, H, W, L, STRIDE, BLOCK, 0, kv_heads=G, backend="reference")
    )
    x = tokens(1, 20)
    out, cache = attn(x[:, :1], return_cache=True)
    rest = [attn(x[:, t : t + 1], cache=cache) for t in range(1, 20)]
    close(torch.cat([out, *rest], 1), attn(x))
    assert cache.bytes()["selected"] == 0


def test_a_whole_model_of_mixed_layers() -> None:
    attention = SIZES | {"num_compressed_mem_kv": 1, "compress_network": "attention_pool"}
    attention |= {"rope_scaling": YARN, "qk_norm": True}
    model = Transformer(
        31, 16, 3, 4, 4, kv_heads=2, seq_len=64, attention=attention,
        layer_pattern=("nsa", "window", "dense"),
    )  # fmt: skip
    model = randomised(model)
    ids = torch.randint(31, (2, 50))
    want = model(ids)
    logits, cache = model(ids[:, :20], return_cache=True)
    close(logits, want[:, :20])
    chunk, cache = model(ids[:, 20:40], cache=cache, return_cache=True)
    close(chunk, want[:, 20:40])
    for t in range(40, 50):
        logits, cache = model(ids[:, t : t + 1], cache=cache, return_cache=True)
        close(logits, want[:, t : t + 1])
    last = model(ids, cache=model.empty_cache(2, 50), only_last=True)
    close(last, want[:, -1:])


def test_bytes_are_those_of_the_tensors() -> None:
    cache = sparse().empty_cache(2, 100)
    row = 2 * 2 * G * D * 8  # two sequences, keys and values, float64
    blocks = (100 - L) // STRIDE + 1
    assert cache.bytes() == {
        "selected": 100 * row, "compressed": (blocks + 1) * row, "tail": L * row, "window": W * row
    }  # fmt: skip


def test_a_layer_that_looks_ahead_has_no_cache() -> None:
    attn = sparse(causal=False)
    with pytest.raises(ValueError, match="causal=False"):
        attn(tokens(1, 4), return_cache=True)


def test_triton_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, several tokens, one by one: the float64 reference to the rounding of float32."""
    monkeypatch.setattr("nsa.decoding.most_tokens", lambda q, cache: 4)
    options = {"rope_scaling": YARN, "qk_norm": True}
    exact, x = sparse(**options), tokens(2, 26).to(DEVICE)
    fast = sparse(backend="triton", **options).float().to(DEVICE)
    exact = exact.to(DEVICE)
    lengths = torch.tensor([5, 10], device=DEVICE)
    cache = fast.empty_cache(2, 10)
    x = x.to(DEVICE)
    fast(x[:, :10].float(), cache=cache, counts=lengths)
    want, row = exact(x), torch.arange(2, device=DEVICE)[:, None]
    for size in (5, 1, 1):
        at = cache.positions(size)
        got = fast(x[row, at].float(), cache=cache)
        torch.testing.assert_close(got.double(), want[row, at], atol=2e-5, rtol=2e-5)


@pytest.mark.gpu  # the interpreter takes half a minute
def test_triton_takes_many_tokens_in_one_launch() -> None:
    exact, fast = sparse().to(DEVICE), sparse(backend="triton").float().to(DEVICE)
    x = tokens(2, 160).to(DEVICE)
    cache = fast.empty_cache(2, 160)
    fast(x[:, :10].float(), cache=cache)
    got = fast(x[:, 10:].float(), cache=cache)
    torch.testing.assert_close(got.double(), exact(x)[:, 10:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("batch", "heads", "width", "num_tokens", "most"),
    [(1, 16, 64, 32768, 7489), (1, 64, 128, 65536, 936), (4096, 64, 256, 65536, 1)],
)
def test_what_a_launch_keeps_is_bounded(
    batch: int, heads: int, width: int, num_tokens: int, most: int
) -> None:
    q = torch.empty(batch, 1, heads, width, device="meta")
    cache = sparse_cache(NSAConfig(), q[:, :, :1], num_tokens)
    assert most_tokens(q, cache) == most


def test_triton_without_compressed_output() -> None:
    """The token that ends a block, of a layer that keeps no compressed values."""
    x, options = tokens(1, 10).to(DEVICE), OPTIONS["no_output"]
    exact = sparse(**options).to(DEVICE)
    fast = sparse(backend="triton", **options).float().to(DEVICE)
    _, cache = fast(x[:, :9].float(), return_cache=True)
    got = fast(x[:, 9:].float(), cache=cache)
    torch.testing.assert_close(got.double(), exact(x)[:, 9:], atol=2e-5, rtol=2e-5)
