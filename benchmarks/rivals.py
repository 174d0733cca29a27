"""What `benchmarks.attention` times ours against, each as its makers would have it called.

Dense causal attention takes [B, H, T, D], contiguous: no layout change is charged to it. Packages
that are not installed are said to be so.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.measure import version_of
from benchmarks.workers import Unavailable
from benchmarks.workloads import Item, Workload
from nsa import flex, reference
from nsa.config import NSAConfig

FLA = "fla-core"
LUCIDRAINS = "native-sparse-attention-pytorch"
LUCIDRAINS_AT_MOST = 8192  # tokens: its backward pass grows too slow beyond


def heads_first(w: Workload) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in w.qkv)


def dense_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on [B, H, T, D]: the reference's window, as wide as the sequence."""
    cfg = NSAConfig(sliding_window_size=q.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return reference.sliding_window_attention(q, k, v, cfg).transpose(1, 2)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def dense(w: Workload, kernel: SDPBackend) -> Item:
    """PyTorch's attention by one named kernel, or none at all."""
    needs_gpu(w)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product(q, k, v)

    inputs = heads_first(w)
    check = w.compare(op, dense_oracle, inputs, "out dq dk dv", strict=False)
    return Item(op, inputs, [check])


def dense_by_default(w: Workload) -> Item:
    """Whatever PyTorch takes on a CPU; on a GPU its kernels are timed by name."""
    if w.device.type == "cuda":
        raise Unavailable("dense cudnn and dense flash are timed instead")
    inputs = heads_first(w)
    check = w.compare(scaled_dot_product, dense_oracle, inputs, "out dq dk dv", strict=False)
    return Item(scaled_dot_product, inputs, [check])


def flex_item(w: Workload, mask: BlockMask, oracle: Callable[..., Tensor]) -> Item:
    """FlexAttention, compiled for this very length; making the mask is not charged to it."""
    torch._dynamo.reset()  # each length is a program of its own, and Dynamo bounds their number
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = w.layout.kv_heads < w.layout.heads

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    inputs = heads_first(w)
    check = w.compare(op, oracle, inputs, "out dq dk dv", strict=False)
    return Item(op, inputs, [check])


def dense_flex(w: Workload) -> Item:
    needs_gpu(w)
    return flex_item(w, causal_mask(w.tokens, w.device), dense_oracle)


def window_flex(w: Workload) -> Item:
    needs_gpu(w)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return reference.sliding_window_attention(q, k, v, w.cfg).transpose(1, 2)

    mask = flex.create_sliding_mask(w.tokens, w.cfg.sliding_window_size, device=w.device)
    return flex_item(w, mask, oracle)


def causal_mask(tokens: int, device: torch.device) -> BlockMask:
    """Tiles below the diagonal are full, so that only those on it are masked."""
    tiles = -(-tokens // flex.TILE)
    below = torch.ones(tiles, tiles, dtype=torch.bool, device=device).tril(-1)
    diagonal = torch.eye(tiles, dtype=torch.bool, device=device)

    def listed(shown: Tensor) -> tuple[Tensor, Tensor]:
        order = shown.int().argsort(dim=-1, descending=True, stable=True)
        return shown.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(diagonal),
        *listed(below),
        BLOCK_SIZE=flex.TILE,
        mask_mod=lambda b, h, t, s: s <= t,
        seq_lengths=(tokens, tokens),
    )


def fla(w: Workload) -> ModuleType:
    needs_gpu(w)
    module = installed(FLA, "fla.ops.nsa.training.parallel")
    group = w.layout.heads // w.layout.kv_heads
    if group < 16 or group & (group - 1):
        raise Unavailable(f"{FLA} wants 16 query heads a group or a higher power of 2, not {group}")
    return module


def fla_nsa(w: Workload) -> Item:
    """Its whole op: compressed blocks as long and as far apart as selection blocks."""
    module, cfg = fla(w), w.cfg
    has_window = module.flash_attn_func is not None

    def op(gates: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        g_cmp, g_slc, g_swa = gates.unbind(-1)
        return module.parallel_nsa(
            q=q,
            k=k,
            v=v,
            g_cmp=g_cmp,
            g_slc=g_slc,
            g_swa=g_swa,
            block_counts=cfg.num_selected_blocks,
            block_size=cfg.selection_block_size,
            window_size=cfg.sliding_window_size if has_window else 0,
        )

    unchecked = f"its sizes differ (l = d = l'{'' if has_window else ', no window: no flash-attn'})"
    return Item(op, (w.gates, *w.qkv), [], unchecked=unchecked)


def fla_selected(w: Workload) -> Item:
    module, cfg = fla(w), w.cfg
    indices = w.indices.long()

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module.parallel_nsa(
            q=q,
            k=k,
            v=v,
            block_indices=indices,
            block_counts=cfg.num_selected_blocks,
            block_size=cfg.selection_block_size,
        )

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.selected_attention(q, k, v, w.indices, cfg)

    check = w.compare(op, oracle, w.qkv, "out dq dk dv", strict=False)
    return Item(op, w.qkv, [check])


def lucidrains_selected(w: Workload) -> Item:
    """Its Triton kernel; the query's own block comes on top of the indices, so it is masked out."""
    needs_gpu(w)
    module = installed(LUCIDRAINS, "native_sparse_attention_pytorch.triton_native_sparse_attention")
    if w.tokens > LUCIDRAINS_AT_MOST:
        raise Unavailable(f"left out beyond {LUCIDRAINS_AT_MOST} tokens")
    size = w.cfg.selection_block_size
    own = torch.arange(w.tokens, device=w.device)[:, None] // size
    indices = w.indices.transpose(1, 2).long()  # [B, G, T, N]
    mask = ((indices >= 0) & (indices != own)).contiguous()
    indices = indices.clamp(min=0).contiguous()

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module.native_sparse_attend(q, k, v, size, indices, mask)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return reference.selected_attention(q, k, v, w.indices, w.cfg).transpose(1, 2)

    inputs = heads_first(w)
    check = w.compare(op, oracle, inputs, "out dq dk dv", strict=False)
    return Item(op, inputs, [check])


def needs_gpu(w: Workload) -> None:
    if w.device.type != "cuda":
        raise Unavailable("needs a GPU")


def installed(package: str, module: str) -> ModuleType:
    if version_of(package) is None:
        raise Unavailable(f"{package} is not installed")
    return importlib.import_module(module)


def backend_of(name: str) -> str:
    """The second word of a rival's name; of a package also its version."""
    rival = name.split()[1]
    package = {"fla": FLA, "lucidrains": LUCIDRAINS}.get(rival)
    return f"{package} {version_of(package)}" if package else rival


RIVALS: dict[str, Callable[[Workload], Item]] = {
    "dense cudnn": lambda w: dense(w, SDPBackend.CUDNN_ATTENTION),
    "dense flash": lambda w: dense(w, SDPBackend.FLASH_ATTENTION),
    "dense sdpa": dense_by_default,
    "nsa fla": fla_nsa,
    "selected fla": fla_selected,
    "selected lucidrains": lucidrains_selected,
    "window flex": window_flex,
    "dense flex": dense_flex,
}
