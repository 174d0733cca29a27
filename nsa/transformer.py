"""The Transformer: embedding, blocks of attention and feed-forward, head.

Letters: B batch, T tokens, M model width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice, repeat
from math import lcm
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nsa import cost
from nsa.attention import SparseAttention
from nsa.cache import ModelCache
from nsa.documents import check_no_cache
from nsa.layer import AttentionLayer
from nsa.layer_kinds import ATTENTION_OPTIONS, LAYER_KINDS, build_layer
from nsa.plugins import Spec
from nsa.sampling import Draw, Prompts, stream
from nsa.transformer_block import Block, FeedForward


class Transformer(nn.Module):
    """A decoder-only language model whose layers are NSA, sliding-window or dense attention.

    Args:
        vocab_size: V.
        dim, depth, heads, dim_head, kv_heads: width, layers, query heads, width of a head and
            key/value heads (None: as many as query heads).
        seq_len: T in training; sampling looks back no further.
        layer_pattern: kinds of layers, repeated until there are `depth`: "nsa", "window", "dense",
            or one's own (see `nsa.plugins`).
        attention: NSA's sizes and options, by the names of `SparseAttention`, and
            `compress_network`, which names φ (`nsa.compress_networks.build_compress_network`).
        dense_output_gate: give dense layers a sigmoid output gate, so that NSA is not credited
            with what a gate alone gives (arXiv 2505.06708).
        feed_forward_expand: hidden width of the feed-forward over `dim`.
        dropout: on what attention and feed-forward add to the residual stream.
        tie_embeddings: the head uses the embedding's weights.
        embedding_std: standard deviation of the embedding at the start. GPT-2's .02 is small beside
            what a layer adds; 1 keeps it plain which token stands where, and tasks that look a
            token up by what it is are learned sooner.

    Raises:
        ValueError: for an impossible size, for an unknown option of `attention`, and if
            `layer_pattern` is empty or names an unknown kind of layer.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        *,
        attention: Mapping[str, Any],
        seq_len: int,
        kv_heads: int | None = None,
        layer_pattern: Sequence[Spec] = ("nsa",),
        dense_output_gate: bool = False,
        feed_forward_expand: float = 8 / 3,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        embedding_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_layers(layer_pattern, attention)
        check_sizes(
            vocab_size=vocab_size, dim=dim, depth=depth, heads=heads, dim_head=dim_head,
            seq_len=seq_len,
        )  # fmt: skip
        check_above_zero(feed_forward_expand=feed_forward_expand, embedding_std=embedding_std)
        self.seq_len = seq_len

        known = dict(dim=dim, dim_head=dim_head, heads=heads, output_gate=dense_output_gate)
        known["kv_heads"] = heads if kv_heads is None else kv_heads
        known |= dict(attention) | {"attention": attention}
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            Block(
                build_layer(kind, layer=layer, **known),
                FeedForward(dim, feed_forward_expand),
                dropout,
            )
            for layer, kind in enumerate(islice(cycle(layer_pattern), depth))
        )
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialise(embedding_std)

    def _initialise(self, embedding_std: float) -> None:
        """GPT-2's scheme: what feeds the residual stream shrinks with depth, logits are small."""
        residual_std = 0.02 * (2 * len(self.layers)) ** -0.5
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        if self.head.weight is not self.embedding.weight:
            nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.attention.to_out.weight, std=residual_std)
            nn.init.normal_(block.feed_forward.to_out.weight, std=residual_std)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        cache: ModelCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
        only_last: bool = False,
        document_starts: Int[Tensor, "B T"] | None = None,
        return_hidden: bool = False,
        layer_inputs: list[Tensor] | None = None,
    ) -> Any:
        """Logits [B T V]; with return_cache also the cache of what has been seen so far.

        Args:
            cache: of the tokens before these, without gradients then; None with return_cache
                makes an empty one, which grows as tokens come.
            counts: with a cache, how many of the T tokens each sequence has; the others, at the
                end, are padding.
            only_last: give the logits of each sequence's last token alone, [B 1 V].
            document_starts: int32, for each token the first token of its document, a multiple of
                `document_alignment`; None: a row is one document. See `nsa.documents`.
            return_hidden: give what the head reads, [B T M], in place of the logits.
            layer_inputs: a list that what each layer is given, [B T M], is appended to.
        """
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(
                f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}: it must be whole numbers "
                "of shape [batch, tokens]"
            )
        check_no_cache(document_starts, cache is not None or return_cache)
        if document_starts is not None:
            self._check_documents()
        if cache is None and return_cache:
            cache = self.empty_cache(*ids.shape)
        tokens = self.embedding(ids)
        for block, kept in zip(self.layers, cache.layers if cache else repeat(None), strict=False):
            if layer_inputs is not None:
                layer_inputs.append(tokens)
            if kept is None:
                tokens = block(tokens, document_starts=document_starts)
            else:
                tokens = block(tokens, kept, counts)
        if only_last and counts is not None:
            tokens = tokens[torch.arange(len(ids), device=ids.device), counts - 1][:, None]
        elif only_last:
            tokens = tokens[:, -1:]
        hidden = self.norm(tokens)
        out = hidden if return_hidden else self.head(hidden)
        return (out, cache) if return_cache else out

    def _check_documents(self) -> None:
        if self.document_alignment is None:
            layers = [block.attention for block in self.blocks]
            mixing = {type(each).__name__ for each in layers if each.document_alignment is None}
            raise ValueError(
                f"document_starts: layers of kind {', '.join(sorted(mixing))} do not keep the "
                "documents of a row apart; choose other layers, or pack the data as one stream"
            )

    @property
    def document_alignment(self) -> int | None:
        """At multiples of which token documents must start; None: a layer mixes documents."""
        multiples = [block.attention.document_alignment for block in self.blocks]
        known = [multiple for multiple in multiples if multiple is not None]
        return lcm(*known) if len(known) == len(multiples) else None

    @property
    def has_cache(self) -> bool:
        """Whether every layer can decode with a cache; one's own kind need not have one."""
        none = AttentionLayer.empty_cache
        return all(type(block.attention).empty_cache is not none for block in self.blocks)

    def empty_cache(self, batch: int, capacity: int) -> ModelCache:
        """A cache of no tokens, with room for `capacity` each of `batch` sequences."""
        return ModelCache([block.attention.empty_cache(batch, capacity) for block in self.blocks])

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return [cast(Block, layer) for layer in self.layers]

    @property
    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def visible_tokens(self, num_tokens: int) -> float:
        """See `nsa.cost.visible_tokens`."""
        return cost.visible_tokens(self.blocks, num_tokens)

    def flops_per_token(self, num_tokens: int) -> float:
        """The sum of `nsa.cost.training_flops`."""
        return sum(cost.training_flops(self.blocks, self.head, num_tokens).values())

    def sample(
        self,
        prompt: Prompts,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        use_cache_kv: bool = True,
        **options: Any,
    ) -> Int[Tensor, "B N"]:
        """Continue each prompt until the longest is `seq_len` tokens long; returns the new ones.

        No position exceeds the `seq_len` that the model was built for: a prompt beyond it is read
        from its last tokens on, and a sequence that fills the context goes on from its last half.

        Args:
            prompt: at least one token each: [B, P], or a list of sequences of any lengths.
            temperature, filter_thres: see `nsa.sampling.Draw`.
            use_cache_kv: False computes every token from the whole context: the same, slower.
            options: `top_k`, `top_p`, `min_p` and `repetition_penalty` of `Draw`; `seed` and
                `stop_tokens` of `nsa.sampling.stream`. After a stop token a row holds -1.

        Raises:
            ValueError: for an empty prompt, and for an option out of its range.
        """
        new = self.stream(prompt, seq_len, temperature, filter_thres, use_cache_kv, **options)
        return torch.stack(list(new), dim=1).to(self.embedding.weight.device)

    def stream(
        self,
        prompt: Prompts,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        use_cache_kv: bool = True,
        *,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
        **filters: Any,
    ) -> Iterator[Int[Tensor, " B"]]:
        """As `sample`, but yields the next token of every sequence as it comes."""
        longest = max((len(each) for each in prompt), default=0)
        if longest and seq_len <= longest:
            raise ValueError(
                f"seq_len={seq_len} counts the prompt's {longest} tokens too: raise it"
            )
        draw = Draw(temperature=temperature, filter_thres=filter_thres, **filters)
        was_training = self.training
        self.eval()
        try:
            yield from stream(
                self, prompt, seq_len - longest, draw,
                use_cache_kv=use_cache_kv, seed=seed, stop_tokens=stop_tokens,
            )  # fmt: skip
        finally:
            self.train(was_training)


def sparse_layers(model: Any) -> dict[int, SparseAttention]:
    """The NSA layers of a `Transformer`, by their place in it."""
    layers = {place: block.attention for place, block in enumerate(model.layers)}
    return {p: layer for p, layer in layers.items() if isinstance(layer, SparseAttention)}


def check_layers(layer_pattern: Sequence[Spec], attention: Mapping[str, Any]) -> None:
    """Raises ValueError for a pattern of no layers, and for an option that NSA does not have."""
    if not layer_pattern or isinstance(layer_pattern, str):
        raise ValueError(
            f"layer_pattern={layer_pattern} must be a non-empty list of {', '.join(LAYER_KINDS)}"
        )
    if unknown := sorted(set(attention) - ATTENTION_OPTIONS):
        raise ValueError(
            f"attention has unknown options: {', '.join(unknown)}; SparseAttention's are "
            f"{', '.join(sorted(ATTENTION_OPTIONS))}"
        )


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def check_above_zero(**numbers: float) -> None:
    """Raises ValueError for a number that is not above 0, by its name."""
    for name, number in numbers.items():
        if number <= 0:
            raise ValueError(f"{name}={number} must be above 0")
