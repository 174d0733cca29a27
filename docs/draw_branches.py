"""Draw what each branch of NSA lets a query read.

`python -m docs.draw_branches` writes docs/branches.png.

Computed by the reference on random inputs, not drawn by hand: 128 tokens, l 8 d 4 l′ 16 n 4 w 16.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from nsa import blocks, reference
from nsa.config import NSAConfig

CFG = NSAConfig(
    sliding_window_size=16,
    compress_block_size=8,
    compress_block_sliding_stride=4,
    selection_block_size=16,
    num_selected_blocks=4,
    num_local_blocks=1,
)
NUM_TOKENS, DIM_HEAD = 128, 16


def branch_maps() -> dict[str, torch.Tensor]:
    """One [T, keys] map a branch: how strongly (compressed) or whether a query reads a key."""
    torch.manual_seed(2)
    q, k = 1.6 * torch.randn(2, 1, NUM_TOKENS, 1, DIM_HEAD)
    k_cmp = k.unfold(1, CFG.compress_block_size, CFG.compress_block_sliding_stride).mean(-1)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, CFG)
    scores = reference.scaled_scores(q, k_cmp)[0, 0, 0]
    visible = blocks.compress_visible(NUM_TOKENS, CFG)
    p_cmp = (scores - lse[0]).masked_fill(~visible, float("-inf")).exp()
    indices = reference.select_blocks(q, k_cmp, lse, CFG)
    selected = blocks.selected_tokens(indices, NUM_TOKENS, CFG)[0, :, 0]
    return {
        "compressed: blocks of the whole past": p_cmp.sqrt(),
        "selected: tokens of the blocks with the best scores": selected.float(),
        "sliding: the last w tokens": blocks.sliding_window(NUM_TOKENS, CFG).float(),
    }


def draw(path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    colours = ("Purples", "Oranges", "Greens")
    for axis, colour, (title, reads) in zip(axes, colours, branch_maps().items(), strict=True):
        axis.imshow(reads, cmap=colour, vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
        axis.set(title=title, xlabel="compressed key" if "comp" in title else "key")
    axes[0].set_ylabel("query")
    figure.suptitle("NSA: three gated branches, each its own softmax (128 tokens)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("branches.png"))
