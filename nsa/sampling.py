"""How the next token is drawn, and how a text grows token by token.

Letters: B batch, V vocabulary, n new tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nsa.step_graph import StepGraph

ENDED = -1  # what a sequence gives after its stop token
Prompts = Int[Tensor, "B P"] | Sequence[Int[Tensor, "..."]]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How one token is drawn from logits; every filter given applies.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        filter_thres: the share of the vocabulary that is never drawn, the least likely first.
        top_k: only the k likeliest tokens.
        top_p: only the likeliest tokens that together reach this probability (arXiv 1904.09751).
        min_p: only tokens with at least this share of the likeliest's probability (2407.01082).
        repetition_penalty: divides the positive logits of tokens that the context has, and
            multiplies the negative ones (arXiv 1909.05858); 1 changes nothing.

    Raises:
        ValueError: for a value out of its range.
    """

    temperature: float = 1.0
    filter_thres: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature} must be at least 0; 0 takes the likeliest token"
            )
        for name in ("filter_thres", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0")

    def __call__(
        self,
        logits: Float[Tensor, "B V"],
        seen: Bool[Tensor, "B V"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B 1"]:
        """One token a row; `seen` are the tokens that each context has."""
        logits = logits.float()
        if seen is not None and self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            less = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(seen, less, logits)
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        values, indices = (logits / self.temperature).topk(self._most(logits.shape[-1]), dim=-1)
        probs = self._filter(values.softmax(dim=-1))
        return indices.gather(-1, probs.multinomial(1, generator=generator))

    def _most(self, vocabulary: int) -> int:
        """How many tokens `filter_thres` and `top_k` leave."""
        kept = max(1, int((1 - self.filter_thres) * vocabulary))
        return kept if self.top_k is None else min(kept, self.top_k)

    def _filter(self, probs: Float[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """`top_p` and `min_p` on probabilities in falling order; the likeliest always stays."""
        if self.top_p is not None:
            before = probs.cumsum(dim=-1) - probs
            unlikely = before >= self.top_p
            unlikely[:, 0] = False
            probs = probs.masked_fill(unlikely, 0.0)
        if self.min_p is not None:
            probs = probs.masked_fill(probs < self.min_p * probs[:, :1], 0.0)
        return probs


class Context:
    """The tokens of a batch of sequences, and which of them the model looks at.

    A position is never higher than the model was trained on. A prompt longer than `seq_len` is
    looked at from its last `seq_len` tokens on; a sequence that has filled its context goes on from
    the last half of it, as if that were the prompt.
    """

    def __init__(self, prompts: Prompts, seq_len: int) -> None:
        self.rows = [prompt.tolist() for prompt in prompts]
        if not self.rows or not all(self.rows):
            raise ValueError("prompt is empty: sampling needs at least one token to go on from")
        self.seq_len = seq_len
        self.starts = [max(0, len(row) - seq_len) for row in self.rows]

    def append(self, ids: Sequence[int]) -> bool:
        """One more token each; whether some sequence has a new context now."""
        moved = False
        for b, token in enumerate(ids):
            self.rows[b].append(token)
            if len(self.rows[b]) - self.starts[b] > self.seq_len:
                self.starts[b] = len(self.rows[b]) - max(1, self.seq_len // 2)
                moved = True
        return moved

    def batch(self, device: torch.device) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        """What the model looks at, padded at the end, and how many tokens that is of each."""
        seen = [torch.tensor(row[b:]) for row, b in zip(self.rows, self.starts, strict=True)]
        counts = torch.tensor([len(row) for row in seen])
        return pad_sequence(seen, batch_first=True).to(device), counts.to(device)


class Decoder:
    """The logits of the next token, from a cache that holds the tokens before it."""

    def __init__(self, model: Any, batch: int, capacity: int, *, graph: bool) -> None:
        self.model = model
        self.cache = model.empty_cache(batch, capacity)
        self.graph = StepGraph(model, self.cache) if graph else None
        # In inference mode an operator costs the host less. FSDP cannot train on with weights that
        # it gathered in it.
        self.inference = all(type(weight) is nn.Parameter for weight in model.parameters())

    def prefill(self, ids: Int[Tensor, "B T"], counts: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Forget everything and take a whole context in."""
        self.cache.reset()
        return self.model(ids, cache=self.cache, counts=counts, only_last=True)[:, 0]

    def step(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Take one more token of each sequence in."""
        if self.graph is not None:
            return self.graph(ids)[:, 0]
        with torch.inference_mode(self.inference):
            return self.model(ids, cache=self.cache, only_last=True)[:, 0]


class Recomputer:
    """The same logits without a cache: each from a forward pass over the whole context."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, ids: Int[Tensor, "B T"], counts: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """A forward pass; the logits at each sequence's last token."""
        return self.model(ids)[torch.arange(len(ids), device=ids.device), counts - 1]


def source_of_logits(
    model: Any, context: Context, num_new: int, *, use_cache_kv: bool
) -> Decoder | Recomputer:
    """A cache with room for the context and `num_new` tokens, or none."""
    if not (use_cache_kv and model.has_cache):
        return Recomputer(model)
    capacity = min(model.seq_len, max(map(len, context.rows)) + num_new)
    graph = next(model.parameters()).is_cuda and num_new > 8  # recording takes some steps' time
    return Decoder(model, len(context.rows), capacity, graph=graph)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # every length would compile anew
def stream(
    model: Any,
    prompts: Prompts,
    num_new: int,
    draw: Draw,
    *,
    use_cache_kv: bool = True,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[Int[Tensor, " B"]]:
    """Yield the next token of every sequence, at most `num_new` times.

    A sequence that has drawn one of `stop_tokens` yields `ENDED` from then on; the stream ends when
    all have. A model with a layer that has no cache is asked for its whole context at every token,
    as without `use_cache_kv`: the same tokens, slower. `seed` gives the draws random numbers of
    their own; None takes torch's. `Context` says what happens beyond the model's length.
    """
    device = next(model.parameters()).device
    context = Context(prompts, model.seq_len)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    source = source_of_logits(model, context, num_new, use_cache_kv=use_cache_kv)
    running = [True] * len(context.rows)
    logits = source.prefill(*context.batch(device))
    for step in range(num_new):
        seen = seen_tokens(context, logits) if draw.repetition_penalty != 1 else None
        new = draw(logits, seen, generator)
        drawn = new[:, 0].tolist()
        yield torch.tensor(
            [token if on else ENDED for token, on in zip(drawn, running, strict=True)]
        )
        running = [
            on and token not in stop_tokens for on, token in zip(running, drawn, strict=True)
        ]
        if not any(running) or step == num_new - 1:
            return
        moved = context.append(drawn)
        if moved or not isinstance(source, Decoder):
            logits = source.prefill(*context.batch(device))
        else:
            logits = source.step(new)


def seen_tokens(context: Context, logits: Float[Tensor, "B V"]) -> Bool[Tensor, "B V"]:
    """Which tokens each sequence has in its context."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for b, (row, start) in enumerate(zip(context.rows, context.starts, strict=True)):
        seen[b, row[start:]] = True
    return seen.to(logits.device)
