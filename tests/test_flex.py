"""FlexAttention's masks show exactly what `nsa.blocks` shows, and skip nothing that is shown."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from nsa import blocks, flex, ops, reference
from nsa.backends import resolve_backend
from nsa.config import NSAConfig
from nsa.documents import document_starts

LENGTHS = (1, 17, 130, 300)  # below a tile of 128, a little over one, and some


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention traces the masks, and cannot trace what jaxtyping wraps around them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def config(causal: bool, window: int = 40) -> NSAConfig:
    return NSAConfig(
        sliding_window_size=window,
        compress_block_size=6,
        compress_block_sliding_stride=4,
        selection_block_size=20,
        num_selected_blocks=3,
        causal=causal,
    )


def shown(mask: BlockMask, batch: int = 1, heads: int = 1) -> Tensor:
    return create_mask(mask.mask_mod, batch, heads, *mask.shape[-2:], device="cpu")


def tiles(dense: Tensor) -> Tensor:
    """The tiles of a dense mask that hold something."""
    rows, columns = (-n % flex.TILE for n in dense.shape[-2:])
    padded = F.pad(dense.float(), (0, columns, 0, rows))
    split = "... (Q q) (K k) -> ... Q K (q k)"
    return rearrange(padded, split, q=flex.TILE, k=flex.TILE).amax(-1) > 0


def some_indices(num_tokens: int, heads: int, cfg: NSAConfig, batch: int = 2) -> Tensor:
    num_blocks = blocks.num_selection_blocks(num_tokens, cfg)
    return reference.top_blocks(torch.rand(batch, num_tokens, heads, num_blocks), cfg)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_sliding_mask(num_tokens: int, causal: bool) -> None:
    for window in (1, 40, 129, 1000):
        mask = flex.create_sliding_mask(num_tokens, window, causal, device="cpu")
        want = blocks.sliding_window(num_tokens, config(causal, window))
        assert torch.equal(shown(mask)[0, 0], want)
        assert torch.equal(mask.to_dense()[0, 0] > 0, tiles(want))


def documents_of(num_tokens: int) -> Tensor:
    """Two rows, with documents that start anywhere."""
    return document_starts(torch.tensor([[0, 3, 100, 260], [0, 128, 129, 140]]), num_tokens)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_masks_of_documents(num_tokens: int) -> None:
    starts, told = documents_of(num_tokens), {"document_starts": documents_of(num_tokens)}
    windows = {
        window: (
            flex.create_sliding_mask(num_tokens, window, device="cpu", **told),
            blocks.sliding_window(num_tokens, config(True, window), **told),
        )
        for window in (1, 40, 129)
    }
    dense = flex.create_document_mask(starts), blocks.causal(num_tokens, **told)
    for mask, want in (*windows.values(), dense):
        assert torch.equal(shown(mask, batch=2)[:, 0], want)
        assert torch.equal(mask.to_dense()[:, 0] > 0, tiles(want))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("memories", [0, 2])
def test_compress_mask(memories: int, causal: bool) -> None:
    mask = flex.create_compress_mask(300, 6, 4, memories, causal, device="cpu")
    want = F.pad(blocks.compress_visible(300, config(causal)), (memories, 0), value=True)
    assert torch.equal(shown(mask)[0, 0], want)
    assert torch.equal(mask.to_dense()[0, 0] > 0, tiles(want))


def test_compress_mask_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_len=5 is shorter than compress_block_size=6"):
        flex.create_compress_mask(5, 6, 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_fine_mask(num_tokens: int, causal: bool) -> None:
    cfg = config(causal)
    indices = some_indices(num_tokens, 2, cfg)
    mask = flex.create_fine_mask(num_tokens, cfg.selection_block_size, causal)(indices, 2)
    want = blocks.selected_tokens(indices, num_tokens, cfg).transpose(1, 2).repeat_interleave(2, 1)
    assert torch.equal(shown(mask, 2, 4), want)
    assert not (tiles(want) & (mask.to_dense() == 0)).any()
    assert mask.kv_num_blocks.max() <= -(-num_tokens // flex.TILE)


def test_fine_mask_skips_tiles_in_which_nothing_is_chosen() -> None:
    indices = torch.full((1, 512, 1, 2), -1, dtype=torch.int32)
    indices[..., 0] = 0  # tokens 0 to 19: the first column of tiles
    mask = flex.create_fine_mask(512, 20)(indices)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 1, 1]]]


def inputs(num_tokens: int, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(2, num_tokens, 4, 16, **kwargs), torch.randn(2, num_tokens, 2, 16, **kwargs)
    return q, k, torch.randn(2, num_tokens, 2, 32, **kwargs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 130])
def test_the_backend_computes_what_the_reference_does(num_tokens: int, causal: bool) -> None:
    cfg = config(causal)
    q, k, v = inputs(num_tokens)
    for heads in (2, 4):  # a selection a key/value head, or a query head
        indices = some_indices(num_tokens, heads, cfg)
        indices[:, :: max(2, num_tokens - 1)] = -1
        got = ops.selected_attention(q, k, v, indices, cfg, backend="flex")
        torch.testing.assert_close(got, reference.selected_attention(q, k, v, indices, cfg))
    got = ops.sliding_window_attention(q, k, v, cfg, backend="flex")
    torch.testing.assert_close(got, reference.sliding_window_attention(q, k, v, cfg))


def test_training_on_a_cpu_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(17))
    with pytest.raises(ValueError, match="backend='flex' has no backward on a CPU"):
        ops.sliding_window_attention(q, k, v, config(True), backend="flex")
    with torch.no_grad():
        ops.sliding_window_attention(q, k, v, config(True), backend="flex")


def test_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="does not cover use_diff_topk=True"):
        resolve_backend("flex", options=["use_diff_topk=True"])
    cfg, (q, k, v) = config(True), inputs(17)
    indices = some_indices(17, 2, cfg)
    with pytest.raises(ValueError, match="takes no block_gates"):
        ops.selected_attention(q, k, v, indices, cfg, torch.ones(indices.shape), backend="flex")


def test_many_masks_and_lengths_may_be_compiled() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        flex._compiled_flex_attention.cache_clear()
        flex._compiled_flex_attention()
        assert torch._dynamo.config.recompile_limit == flex.PROGRAMS == 64


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", [64, 100, 300])
def test_compiled_on_a_gpu_it_trains(num_tokens: int, causal: bool) -> None:
    torch.compiler.reset()
    cfg = config(causal)
    qkv = [x.requires_grad_() for x in inputs(num_tokens, device="cuda")]
    for heads in (2, 4):
        indices = some_indices(num_tokens, heads, cfg).cuda()
        got = ops.selected_attention(*qkv, indices, cfg, backend="flex")
        want = reference.selected_attention(*qkv, indices, cfg)
        compare(got, want, qkv)
    got = ops.sliding_window_attention(*qkv, cfg, backend="flex")
    compare(got, reference.sliding_window_attention(*qkv, cfg), qkv)


def compare(got: Tensor, want: Tensor, qkv: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)  # products in TF32
    upstream = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, qkv, upstream),
        torch.autograd.grad(want, qkv, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
