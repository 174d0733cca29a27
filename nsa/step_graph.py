"""One decoding step of a whole model as a CUDA graph: the host launches it once a token."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.cache import ModelCache

WARM_UPS = 2  # calls before a graph is captured: kernels compile, libraries choose algorithms


class StepGraph:
    """model(ids, cache=cache) for one token a sequence, captured at the first call.

    The cache must keep its buffers from then on; how full it is does not matter, since lengths are
    read on the device.
    """

    def __init__(self, model: Any, cache: ModelCache) -> None:
        self.model, self.cache = model, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ids = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=cache.lengths.device)

    def __call__(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 V"]:
        """Logits of the next token; they are overwritten by the next call.

        Raises:
            ValueError: if the cache is full.
        """
        longest = self.cache.longest
        if longest >= self.cache.capacity:
            raise ValueError(f"the cache holds {self.cache.capacity} tokens: reserve more first")
        if self.graph is None:
            self._capture()
        self.ids.copy_(ids)
        assert self.graph is not None
        self.graph.replay()
        self.cache.longest = longest + 1
        return self.logits

    def _step(self) -> Tensor:
        # What reads the cache up to the longest sequence must read as much at every replay.
        self.cache.longest = self.cache.capacity - 1
        return self.model(self.ids, cache=self.cache, only_last=True)

    def _capture(self) -> None:
        before = self.cache.state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._step()
                self.cache.restore(before)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()
        self.cache.restore(before)
