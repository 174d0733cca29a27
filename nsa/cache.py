"""What decoding keeps of the tokens that a layer has seen, and how many bytes that takes.

    part         of layers  keeps                                             tokens
    selected     nsa        rotated keys and values of the selected branch    all
    compressed   nsa        compressed keys and values                        one every d
    tail         nsa        keys and values that blocks are compressed from   the last l (a ring)
    window       nsa, window  rotated keys and values of the window           the last w (a ring)
    dense        dense      rotated keys and values                           all

A ring holds token t in slot t % size. Sequences of a batch have lengths of their own, on the
device: nothing here makes the host wait. Letters: B batch, K tokens there is room for, n new ones.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks
from nsa.config import NSAConfig


@dataclass
class KeysValues:
    """Keys and values side by side; `v` is None where nothing reads values."""

    k: Float[Tensor, "B K G D"]
    v: Float[Tensor, "B K G D"] | None

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors there are."""
        return iter([self.k] if self.v is None else [self.k, self.v])

    @property
    def values(self) -> Float[Tensor, "B K G D"]:
        """`v`, or what stands for it where nothing reads it."""
        return self.k if self.v is None else self.v

    @cached_property
    def by_head(self) -> tuple[Float[Tensor, "B G K D"], Float[Tensor, "B G K D"]]:
        """The same memory in the order of scaled_dot_product_attention."""
        return self.k.transpose(1, 2), self.values.transpose(1, 2)

    @cached_property
    def rows(self) -> tuple[Float[Tensor, "BKG D"], Float[Tensor, "BKG D"]]:
        """The same memory as one table."""
        D = self.k.shape[-1]
        return self.k.view(-1, D), self.values.view(-1, D)

    def put(self, slot: int, *new: Float[Tensor, "B G D"]) -> None:
        """One token, or one block, of each sequence into one slot."""
        for kept, x in zip(self, new, strict=False):
            kept[:, slot].copy_(x)

    def of_row(self, b: int) -> "KeysValues":
        """Those of one sequence, as a batch of one."""
        return KeysValues(self.k[b : b + 1], None if self.v is None else self.v[b : b + 1])


class LayerCache:
    """The parts that one layer keeps, by name, and how many tokens each sequence has.

    Attributes:
        parts: `KeysValues` by the names above.
        lengths: tokens of each sequence so far, int64 [B], on the device.
        capacity: tokens there is room for.
        longest: the most tokens a sequence may have so far, as the host knows it.
    """

    def __init__(
        self,
        rows: Callable[[int], Mapping[str, int]],
        like: Float[Tensor, "B T G D"],
        capacity: int,
    ) -> None:
        def buffer(size: int) -> Tensor:
            return like.new_zeros(like.shape[0], size, *like.shape[2:])  # no NaN for masks to meet

        self.rows = rows  # of each part, by capacity
        self.parts = {
            n: KeysValues(buffer(size), buffer(size)) for n, size in rows(capacity).items()
        }
        self.lengths = torch.zeros(like.shape[0], dtype=torch.long, device=like.device)
        self.capacity = capacity
        self.longest = 0

    def __getitem__(self, part: str) -> KeysValues:
        return self.parts[part]

    def bytes(self) -> dict[str, int]:
        """Bytes of each part, whether in use yet or not."""
        return {name: sum(x.nbytes for x in part) for name, part in self.parts.items()}

    def positions(self, num_new: int) -> Int[Tensor, "B n"]:
        """Where the next tokens stand."""
        return self.lengths[:, None] + torch.arange(num_new, device=self.lengths.device)

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens; what is there stays."""
        if capacity <= self.capacity:
            return
        for name, size in self.rows(capacity).items():
            k, v = self.parts[name].k, self.parts[name].v
            more = (0, 0, 0, 0, 0, size - k.shape[1])
            if size > k.shape[1]:
                self.parts[name] = KeysValues(F.pad(k, more), None if v is None else F.pad(v, more))
        self.capacity = capacity

    def keep_rows(self, rows: Int[Tensor, " B"]) -> None:
        """Keep these sequences of the batch, in this order; one may be kept several times."""
        for name, part in self.parts.items():
            self.parts[name] = KeysValues(part.k[rows], None if part.v is None else part.v[rows])
        self.lengths = self.lengths[rows]

    def advance(self, num_new: int, counts: Int[Tensor, " B"] | None = None) -> None:
        """Count `num_new` tokens more, or only `counts` of them, the others being padding."""
        self.lengths += num_new if counts is None else counts
        self.longest += num_new

    def write(self, part: str, new: Sequence[Tensor], positions: Int[Tensor, "B n"]) -> None:
        """Put new keys and values [B n G D] at their places of a part that keeps them all."""
        batch = torch.arange(len(positions), device=positions.device)[:, None]
        for kept, x in zip(self.parts[part], new, strict=False):
            kept[batch, positions] = x

    def push(self, part: str, new: Sequence[Tensor], after: Int[Tensor, " B"]) -> None:
        """Let new keys and values [B n G D] enter a ring that then ends at `after` tokens."""
        for kept, x in zip(self.parts[part], new, strict=False):
            if kept.shape[1]:
                slots = blocks.ring_positions(after, kept.shape[1])
                kept.copy_(recall(kept, x, self.lengths, slots))


def recall(
    ring: Float[Tensor, "B size G D"],
    new: Float[Tensor, "B n G D"],
    before: Int[Tensor, " B"],
    wanted: Int[Tensor, "B I"],
) -> Float[Tensor, "B I G D"]:
    """Tokens number `wanted`: of the first `before` from the ring, of the others from `new`.

    A token that neither holds gives some other one.
    """
    size, begin = ring.shape[1], before[:, None]
    place = torch.where(wanted < begin, wanted % size, size + wanted - begin)
    place = place.clamp(max=size + new.shape[1] - 1)
    both = torch.cat([ring, new], dim=1)
    return both.gather(1, place[..., None, None].expand(-1, -1, *both.shape[2:]))


def sparse_cache(
    cfg: NSAConfig, like: Float[Tensor, "B T G D"], capacity: int, *, values: bool = True
) -> LayerCache:
    """An empty cache of an NSA layer whose keys are like these.

    Args:
        capacity: tokens there is room for at first.
        values: False where the compressed branch has no output, and so no values.
    """

    def rows(capacity: int) -> dict[str, int]:
        return {
            "selected": capacity if cfg.num_selected_blocks else 0,
            # One more, never read: for blocks beyond the last, which are not whole.
            "compressed": blocks.num_compress_blocks(capacity, cfg) + 1,
            "tail": cfg.compress_block_size,
            "window": cfg.sliding_window_size,
        }

    cache = LayerCache(rows, like, capacity)
    if not values:
        for name in ("compressed", "tail"):
            cache.parts[name].v = None
    return cache


def window_cache(size: int, like: Float[Tensor, "B T G D"], capacity: int) -> LayerCache:
    """An empty cache of a sliding-window layer of `size` tokens."""
    return LayerCache(lambda capacity: {"window": size}, like, capacity)


def dense_cache(like: Float[Tensor, "B T G D"], capacity: int) -> LayerCache:
    """An empty cache of a dense layer."""
    return LayerCache(lambda capacity: {"dense": capacity}, like, capacity)


class ModelCache:
    """The caches of a model's layers, first to last."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = list(layers)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens of each sequence so far."""
        return self.layers[0].lengths

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return min(layer.capacity for layer in self.layers)

    @property
    def longest(self) -> int:
        """The most tokens a sequence may have so far, as the host knows it."""
        return self.layers[0].longest

    @longest.setter
    def longest(self, num_tokens: int) -> None:
        for layer in self.layers:
            layer.longest = num_tokens

    def reset(self) -> None:
        """Forget all tokens; the buffers stay."""
        for layer in self.layers:
            layer.lengths.zero_()
        self.longest = 0

    def state(self) -> list[Tensor]:
        """Copies of what a step overwrites: lengths, and rings."""
        return [x.clone() for x in self._overwritten()]

    def restore(self, state: list[Tensor]) -> None:
        """Be as at `state`, if no more than the next tokens were taken in since."""
        for x, was in zip(self._overwritten(), state, strict=True):
            x.copy_(was)

    def _overwritten(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield layer.lengths
            for name in sorted(layer.parts.keys() & {"tail", "window"}):
                yield from layer[name]

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens."""
        for layer in self.layers:
            layer.reserve(capacity)

    def keep_rows(self, rows: Int[Tensor, " B"]) -> None:
        """Keep these sequences of the batch, in this order, as beam search does."""
        for layer in self.layers:
            layer.keep_rows(rows)

    def bytes(self) -> dict[str, int]:
        """Bytes of each part, summed over the layers."""
        return dict(sum((Counter(layer.bytes()) for layer in self.layers), Counter()))
