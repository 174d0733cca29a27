"""What every kernel shares: loading rows, a row's delta, dtypes.

Kernels see contiguous [B, T, H, D] arrays. The R query heads of a key head are packed into the
rows of a tile: row i of index head j is token i // R, query head j * R + i % R. Softmax runs in
base 2 inside kernels; every lse that leaves one is a natural log.
"""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from nsa.kernels.jit import jit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@jit
def div_mod(x, n: tl.constexpr):
    """x // n and x % n of what is never negative: a shift and a mask where n is a power of two."""
    x = x.to(tl.uint32)
    return (x // n).to(tl.int32), (x % n).to(tl.int32)


@jit
def load_rows(ptr, rows, live, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Rows of a [*, D] array, 0 where not live and beyond D.  [rows, PADDED_D]"""
    offs_d = tl.arange(0, PADDED_D)
    mask = live[:, None]
    if D != PADDED_D:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0)


@jit
def store_rows(ptr, rows, live, x, D: tl.constexpr, PADDED_D: tl.constexpr):
    """The counterpart of load_rows; casts to the array's dtype."""
    offs_d = tl.arange(0, PADDED_D)
    mask = live[:, None]
    if D != PADDED_D:
        mask = mask & (offs_d < D)[None, :]
    tl.store(ptr + rows[:, None] * D + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@jit
def load_lse2(ptr, rows, live):
    """A row's lse in base 2.

    A row that is not live gets some probabilities: either its q, dO and delta are 0, so that they
    add nothing, or they are masked. One that saw nothing has -inf, and is masked as well.
    """
    return tl.load(ptr + rows, mask=live, other=0.0) * LOG2E


@jit
def finite(m):
    """A maximum to subtract: 0 where nothing was seen, so that exp2(-inf - m) is 0, not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@jit
def softmax_step(s, v, m, norm, acc, scale, PRECISION: tl.constexpr):
    """One more tile of unscaled scores s, -inf where unseen, and of values v.

    m is the rows' maximum in base 2, norm the sum of their exponents, acc that of weighted values.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
    p = tl.exp2(s * (scale * LOG2E) - finite(m_new)[:, None])
    alpha = tl.exp2(m - finite(m_new))
    norm = norm * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, norm, acc


@jit
def row_delta(out_ptr, dout, dlse_ptr, rows, live, DV: tl.constexpr, PADDED_DV: tl.constexpr):
    """What is taken from every dP of a row, sum(dO * O) - dlse.

    A row that saw nothing has out 0; its dlse counts for nothing later.
    """
    out = load_rows(out_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    delta = tl.sum(out * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=live, other=0.0)
    return delta


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(width: int) -> int:
    """A head dimension as a tile holds it: a power of two, at least what tl.dot takes."""
    return max(16, power_of_2(width))


def precision() -> str:
    """How tl.dot multiplies float32: PyTorch's own switch decides (16-bit inputs ignore it)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at least; the interpreter runs one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def whole(x: Tensor | None) -> Tensor | None:
    """A contiguous array, if there is any."""
    return None if x is None else x.contiguous()


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as kernels multiply them: contiguous, of one dtype, under autocast of its own."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(x.to(dtype).contiguous() for x in tensors)
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"dtypes {sorted(map(str, dtypes))}: kernels multiply tensors of one dtype, float32, "
            "bfloat16 or float16; cast them, run under autocast, or use backend='torch'"
        )
    return tuple(x.contiguous() for x in tensors)
