"""One decoding step of a layer's attention, ours and dense, and a check of ours against float64."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from nsa import blocks, kernels, reference
from nsa.config import NSAConfig

H, G, D = 64, 4, 128
CFG = NSAConfig()
SHAPES = (  # context, batch: the bar first
    (65536, 32), (65536, 1), (131072, 8), (131072, 1), (65536, 8), (32768, 32), (32768, 8),
    (32768, 1), (16384, 32), (16384, 1), (8192, 32), (8192, 8), (8192, 1), (4096, 32), (4096, 1),
)  # fmt: skip
BARS = {(65536, 32): 6.0, (65536, 1): 2.0, (131072, 8): 7.0}
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def new(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


class Step:
    """One decoding step of an NSA layer, from its projected heads."""

    def __init__(self, context: int, batch: int) -> None:
        C = blocks.num_compress_blocks(context, CFG) + 1
        self.q, self.gates = new(batch, 1, H, D), new(batch, 1, H, 3).sigmoid()
        self.new = [new(batch, 1, G, D) for _ in range(6)]
        rows = dict(
            compressed=C, selected=context, window=CFG.sliding_window_size,
            tail=CFG.compress_block_size,
        )  # fmt: skip
        self.parts = {
            name: (new(batch, size, G, D), new(batch, size, G, D)) for name, size in rows.items()
        }
        self.frequencies = torch.rand(D // 2, device=DEVICE)
        self.lengths = torch.full((batch,), context - 1, device=DEVICE)

    def append(self) -> Tensor:
        """The token enters the cache; φ is the mean, without learned positions."""
        mean = None, None, None
        return kernels.append_token(
            self.q, self.new, self.frequencies, self.lengths, self.parts, CFG, [mean, mean]
        )[0]

    def attend(self, q_rot: Tensor) -> tuple[Tensor, Tensor]:
        keys = (self.parts[name] for name in ("compressed", "selected", "window"))
        return kernels.cached_attention(
            self.q, q_rot, self.gates, *keys, self.lengths[:, None], cfg=CFG
        )  # fmt: skip

    def __call__(self) -> Tensor:
        return self.attend(self.append())[0]

    @staticmethod
    def floor_bytes(context: int, batch: int) -> int:
        """The keys and values that a step has to read: n*l' + T/d + w of each key head."""
        selected = CFG.num_selected_blocks * CFG.selection_block_size
        keys = selected + context // CFG.compress_block_sliding_stride + CFG.sliding_window_size
        return batch * keys * G * 2 * D * DTYPE.itemsize

    @staticmethod
    def read_bytes(context: int, batch: int) -> int:
        """With the scores, written and read once in float32."""
        scores = batch * H * (context // CFG.compress_block_sliding_stride) * 4
        return Step.floor_bytes(context, batch) + 2 * scores


def check() -> None:
    """The kernels against float64 at 8,192 tokens; raises AssertionError if they err too much."""
    step = Step(8192, 2)
    step.lengths[0] = 5001
    q_rot = step.append()
    out, indices = step.attend(q_rot)
    positions = step.lengths[:, None]

    def want(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, rot, gates = (x.to(dtype) for x in (step.q, q_rot, step.gates))
        C = blocks.num_compress_blocks(8192, CFG)
        k_cmp, v_cmp = (x[:, :C].to(dtype) for x in step.parts["compressed"])
        cmp, lse = reference.compressed_attention(
            q, k_cmp, v_cmp, CFG, positions=positions, num_tokens=8192
        )
        chosen = reference.select_blocks(q, k_cmp, lse, CFG, positions=positions, num_tokens=8192)
        k_slc, v_slc = (x.to(dtype) for x in step.parts["selected"])
        k_win, v_win = (x.to(dtype) for x in step.parts["window"])
        slc = reference.selected_attention(rot, k_slc, v_slc, indices, CFG, positions=positions)
        slots = blocks.ring_positions(step.lengths + 1, CFG.sliding_window_size)
        win = reference.sliding_window_attention(
            rot, k_win, v_win, CFG, positions=positions, key_positions=slots
        )
        return reference.combine(gates, cmp, slc, win), chosen

    (exact, chosen), (eager, _) = want(torch.float64), want(DTYPE)
    same = (chosen == indices).float().mean().item()
    error, budget = ((x.double() - exact).abs().max().item() for x in (out, eager))
    budget = 2 * budget + torch.finfo(DTYPE).eps * exact.abs().max().item()
    print(f"check: error {error:.2e}, budget {budget:.2e}; {same:.1%} of the blocks are equal")
    assert error <= budget and same > 0.99, "the kernels err: nothing is timed"


def dense_steps(context: int, batch: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Dense decoding: the newest key and value enter the cache, then attention, by kernel."""
    q, k, v = new(batch, H, 1, D), new(batch, G, context, D), new(batch, G, context, D)
    last, new_k, new_v = context - 1, new(batch, G, D), new(batch, G, D)
    for name, kernel in SDPA.items():

        def step(kernel: SDPBackend = kernel, *, repeat: bool = name == "efficient") -> Tensor:
            k[:, :, last], v[:, :, last] = new_k, new_v
            with sdpa_kernel(kernel):
                if repeat:  # it has no grouped heads: queries of a head become its rows
                    rows = q.view(batch, G, H // G, D)
                    return F.scaled_dot_product_attention(rows, k, v)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def rows_step(kernel: SDPBackend = kernel) -> Tensor:
            k[:, :, last], v[:, :, last] = new_k, new_v
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q.view(batch, G, H // G, D), k, v)

        yield name, step
        if name in ("cudnn", "flash"):  # the same product with a group's heads as rows
            yield f"{name} rows", rows_step
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex() -> Tensor:
        k[:, :, last], v[:, :, last] = new_k, new_v
        return compiled(q, k, v, enable_gqa=True)

    if (context, batch) in BARS:  # it compiles anew for every shape
        yield "flex", flex
