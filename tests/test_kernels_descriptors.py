"""Tiles by descriptor: what may be loaded so, and that it gives what loads by address give."""

import pytest
import torch
from kernel_inputs import DEVICE, heads

from benchmarks.workloads import Layout, Workload
from nsa import blocks, kernels, reference
from nsa.config import NSAConfig
from nsa.kernels import descriptors
from nsa.kernels.columns import key_slices
from nsa.kernels.tile_order import op as tile_order

CFG = NSAConfig(
    sliding_window_size=23, compress_block_size=8, compress_block_sliding_stride=4,
    selection_block_size=16, num_selected_blocks=3,
)  # fmt: skip


@pytest.fixture
def described(monkeypatch):
    """The shapes of the tiles that were described; every device and dtype has descriptors."""
    shapes = []
    describe = descriptors.TensorDescriptor.from_tensor
    monkeypatch.setattr(descriptors, "has_tma", lambda device, dtype: True)
    monkeypatch.setattr(tile_order, "DESCRIBED_ROWS", 0)
    monkeypatch.setattr(
        descriptors.TensorDescriptor,
        "from_tensor",
        lambda x, box: shapes.append(box) or describe(x, box),
    )
    return shapes


def results(B: int, T: int, H: int, G: int, D: int, Dv: int) -> list[torch.Tensor]:
    """Outputs and gradients of a window, of compressed and of selected attention."""
    C, found = blocks.num_compress_blocks(T, CFG), []
    kept = torch.arange(2, dtype=torch.int32, device=DEVICE).repeat(B, T, G, 1)
    for op, keys in (
        (kernels.sliding_window_attention, T),
        (lambda *x: kernels.compressed_attention(*x)[0], C),
        (lambda q, k, v, cfg: kernels.selected_attention(q, k, v, kept, cfg), T),
    ):
        torch.manual_seed(T)
        x = [each.float() for each in heads(B, T, keys, H, G, D, Dv)]
        x = [each.detach().requires_grad_() for each in x]
        out = op(*x, CFG)
        found += [out, *torch.autograd.grad(out.square().sum(), x)]
    return found


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        (2, (70, 1, 1, 16, 16)),
        (2, (18, 16, 1, 16, 32)),
        (2, (33, 2, 1, 32, 16)),
        (1, (33, 2, 1, 32, 16)),
        (2, (33, 2, 1, 192, 128)),
    ],
)
def test_the_same_as_by_address(batch, shape, monkeypatch, request):
    """Runs of no whole number of tiles, sequences that end within one, widths of their own."""
    by_address = results(batch, *shape)
    boxes = request.getfixturevalue("described")
    by_descriptor = results(batch, *shape)
    R = shape[1] // shape[2]
    assert {box[-2] for box in boxes} == {1, R}, "keys, and the rows of a group's heads"
    # A tile that ends within a sequence must not read the next one.
    assert max(len(box) for box in boxes) == (3 if batch == 1 else 4)
    for a, b in zip(by_descriptor, by_address, strict=True):
        torch.testing.assert_close(a, b)


def test_keys_come_in_slices():
    """One, but where two hold fewer columns."""
    widths = {D: key_slices(D) for D in (8, 64, 80, 128, 129, 192, 193, 256)}
    assert widths == {
        8: [16], 64: [64], 80: [128], 128: [128], 129: [128, 64], 192: [128, 64],
        193: [256], 256: [256],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "heads", "width", "dtype", "may"),
    [
        (64, 1, 128, torch.bfloat16, True),
        (64, 16, 64, torch.float16, True),
        (64, 64, 64, torch.bfloat16, True),
        (64, 3, 64, torch.bfloat16, False),  # a tile would end within a token
        (64, 128, 64, torch.bfloat16, False),
        (64, 16, 192, torch.bfloat16, True),  # two slices
        (64, 1, 160, torch.bfloat16, False),  # the second one padded to 64
        (64, 1, 96, torch.bfloat16, False),  # padded to 128
        (64, 1, 8, torch.bfloat16, False),
        (64, 1, 64, torch.float32, False),
    ],
)
def test_what_suits(rows, heads, width, dtype, may, monkeypatch):
    monkeypatch.setattr(descriptors, "capability", lambda device: 90)
    x = torch.zeros(1, 4, 2, width, dtype=dtype)
    assert descriptors.suits(x, rows, heads, key_slices(width)) == may
    assert descriptors.as_tiles(rows, heads, x, x[..., :128])[0] == may
    monkeypatch.setattr(descriptors, "capability", lambda device: 86)
    assert not descriptors.suits(x, rows, heads, key_slices(width)), "an older GPU has none"


def test_little_work_is_by_address(described, monkeypatch):
    """A descriptor costs the host 25 µs, which short kernels would wait for."""
    monkeypatch.setattr(tile_order, "DESCRIBED_ROWS", 2 * 8 * 2 + 1)
    results(2, 8, 2, 1, 16, 16)
    assert not described
    results(2, 9, 2, 1, 16, 16)
    assert described


@pytest.mark.parametrize("wrong_by_descriptor", [True, False])
def test_the_benchmark_judges_both(wrong_by_descriptor, described):
    """What is wrong by descriptor alone is refused, and so is what is wrong by address alone."""
    w = Workload(Layout(2, 1, 16), 40, torch.float32, torch.device(DEVICE), "triton", CFG)

    def oracle(q, k, v):
        return reference.sliding_window_attention(q, k, v, CFG)

    def right(q, k, v):
        return w.ops.sliding_window_attention(q, k, v, CFG)

    def wrong(q, k, v):
        by_descriptor = tile_order.DESCRIBED_ROWS == 0
        return right(q, k, v.roll(1, 1) if by_descriptor == wrong_by_descriptor else v)

    names = "out dq dk dv"
    assert w.compare(right, oracle, w.qkv, names)().ok and described
    assert not w.compare(wrong, oracle, w.qkv, names)().ok


def test_odd_addresses_are_no_descriptors(monkeypatch):
    monkeypatch.setattr(descriptors, "capability", lambda device: 90)
    flat = torch.zeros(65, dtype=torch.bfloat16)
    aligned, odd = flat[:64].view(1, 4, 1, 16), flat[1:].view(1, 4, 1, 16)
    assert descriptors.suits(aligned, 16, 1, [16]) and not descriptors.suits(odd, 16, 1, [16])
    assert descriptors.as_tiles(16, 1, aligned, odd) == (False, aligned, None, odd)
    lone = torch.zeros(64, 2, 16, 1, dtype=torch.bfloat16).permute(3, 0, 1, 2)
    assert lone.is_contiguous() and not descriptors.suits(lone, 16, 1, [1]), "a stride of one entry"
