"""Decode kernels against the float64 reference over the same cache; selections are equal."""

import pytest
import torch
from kernel_inputs import DEVICE

from nsa import blocks, reference
from nsa.config import NSAConfig
from nsa.kernels.decode import cached_attention
from nsa.testing import largest

CFG = dict(
    sliding_window_size=7, compress_block_size=6, compress_block_sliding_stride=4,
    selection_block_size=8, num_selected_blocks=3,
)  # fmt: skip
CASES = {
    "R2": (dict(), 4, 2, 16, 0, True),
    "R1 D6": (dict(), 2, 2, 6, 2, True),
    "per head": (dict(), 4, 2, 16, 2, False),
    "logit mean": (dict(importance="logit_mean"), 4, 2, 16, 0, True),
    "R16, many blocks": (dict(num_selected_blocks=9, num_local_blocks=1), 16, 1, 16, 1, True),
    "long blocks": (
        dict(selection_block_size=80, compress_block_size=32, compress_block_sliding_stride=16),
        4, 2, 16, 0, True,
    ),
    "no selection": (dict(num_selected_blocks=0), 4, 2, 16, 0, True),
}  # fmt: skip


def oracle(q, q_rot, gates, compressed, selected, keys, positions, cfg, mem, shared):
    """The reference with every token's window key at hand, instead of a ring."""
    num_tokens = selected[0].shape[1]
    at = dict(positions=positions, num_tokens=num_tokens)
    out, lse = reference.compressed_attention(q, *compressed, cfg, *mem, **at)
    indices = reference.select_blocks(q, compressed[0], lse, cfg, shared, **at)
    chosen = torch.zeros_like(q)
    if cfg.num_selected_blocks:
        chosen = reference.selected_attention(q_rot, *selected, indices, cfg, positions=positions)
    where = torch.arange(num_tokens, device=q.device).expand(len(q), -1)
    sliding = reference.sliding_window_attention(
        q_rot, *keys, cfg, positions=positions, key_positions=where
    )
    return reference.combine(gates, out, chosen, sliding), indices


def case(options, H, G, D, memories, shared, tokens=83, n=1, lengths=(1, 5, 40, 82)):
    cfg = NSAConfig(**(CFG | options))
    B = len(lengths)

    def new(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=DEVICE)

    C = blocks.num_compress_blocks(tokens, cfg)
    q, q_rot, gates = new(B, n, H, D), new(B, n, H, D), new(B, n, H, 3).sigmoid()
    compressed = new(B, C, G, D), new(B, C, G, D)
    selected, keys = ((new(B, tokens, G, D), new(B, tokens, G, D)) for _ in range(2))
    mem = (new(G, memories, D), new(G, memories, D)) if memories else (None, None)
    positions = torch.tensor(lengths, device=DEVICE)[:, None] - n + torch.arange(n, device=DEVICE)
    positions = positions.clamp(min=0)
    return cfg, q, q_rot, gates, compressed, selected, keys, positions, mem, shared


def ring_of(x, positions, size):
    """The last `size` tokens up to each sequence's newest, as a ring holds them."""
    slots = blocks.ring_positions(positions[:, -1] + 1, size)
    held = x.gather(1, slots.clamp(min=0)[..., None, None].expand(-1, -1, *x.shape[2:]))
    return held.masked_fill((slots < 0)[..., None, None], float("nan"))


def cast(x, dtype):
    return x if x is None else x.to(dtype)


def run(op_dtype, cfg, q, q_rot, gates, compressed, selected, keys, positions, mem, shared):
    size = cfg.sliding_window_size + q.shape[1] - 1
    window = [ring_of(x, positions, size) for x in keys]

    def to(pair):
        return tuple(cast(x, op_dtype) for x in pair)

    return cached_attention(
        *to((q, q_rot, gates)), to(compressed), to(selected), to(window), positions,
        cfg=cfg, mem_k=cast(mem[0], op_dtype), mem_v=cast(mem[1], op_dtype), shared=shared,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_token_a_sequence(name: str) -> None:
    made = case(*CASES[name])
    want, blocks_wanted = oracle(*made[1:7], made[7], made[0], *made[8:])
    out, indices = run(torch.float32, *made)
    assert torch.equal(indices, blocks_wanted)
    assert largest(out.double() - want) < 5e-6


def test_several_tokens_a_sequence_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the keys of a query are cut into parts, some of them empty."""
    monkeypatch.setattr("nsa.kernels.decode.num_splits", lambda programs, tiles, device: 3)
    made = case(*CASES["R2"], tokens=300, n=3, lengths=(9, 120, 300))
    want, blocks_wanted = oracle(*made[1:7], made[7], made[0], *made[8:])
    out, indices = run(torch.float32, *made)
    assert torch.equal(indices, blocks_wanted)
    assert largest(out.double() - want) < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G", "D"), [(64, 4, 128), (32, 8, 128), (8, 4, 64), (8, 2, 64)])
def test_bf16_at_real_sizes(H: int, G: int, D: int) -> None:
    """bf16 may err twice as much as eager PyTorch in bf16, on the same selected blocks."""
    paper = dict(
        sliding_window_size=512, compress_block_size=32, compress_block_sliding_stride=16,
        selection_block_size=64, num_selected_blocks=16,
    )  # fmt: skip
    made = case(paper, H, G, D, 0, True, tokens=8192, lengths=(31, 700, 4097, 8192))
    made = (made[0], *(tree_to(x, torch.bfloat16, torch.float64) for x in made[1:]))
    want, blocks_wanted = oracle(*made[1:7], made[7], made[0], *made[8:])
    eager, _ = oracle(
        *(tree_to(x, torch.bfloat16) for x in made[1:7]), made[7], made[0], made[8], made[9]
    )
    out, indices = run(torch.bfloat16, *made)
    same = (indices == blocks_wanted).all(-1).float().mean()
    assert same > 0.9, f"{same:.2f} of the lists are equal"
    rows = (indices == blocks_wanted).all(-1).repeat_interleave(H // G, -1)
    error = largest((out.double() - want)[rows])
    budget = 2 * largest((eager.double() - want)[rows]) + 2**-8 * largest(want)
    assert error <= budget, f"{error:.1e} over {budget:.1e}"


def tree_to(x, *dtypes):
    """Floats to one dtype after the other, also those in tuples."""
    if isinstance(x, tuple):
        return tuple(tree_to(each, *dtypes) for each in x)
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    for dtype in dtypes:
        x = x.to(dtype)
    return x
