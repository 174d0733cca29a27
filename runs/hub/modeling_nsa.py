"""A Native Sparse Attention Transformer as transformers loads it, with `trust_remote_code=True`.

export.py puts this file into every folder it writes. It needs the package `nsa`, which holds the
model; here are only the names that transformers asks for. Letters: B batch, T tokens, V vocabulary.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nsa import Transformer


class NSATransformerConfig(PreTrainedConfig):
    """The arguments of `nsa.Transformer`, under `transformer`, and the sizes others look for."""

    model_type = "nsa_transformer"

    def __init__(self, transformer: dict[str, Any] | None = None, **options: Any) -> None:
        self.transformer = dict(transformer or {})
        for name, argument in (
            ("vocab_size", "vocab_size"),
            ("hidden_size", "dim"),
            ("num_hidden_layers", "depth"),
            ("num_attention_heads", "heads"),
            ("num_key_value_heads", "kv_heads"),
            ("head_dim", "dim_head"),
            ("max_position_embeddings", "seq_len"),
        ):
            setattr(self, name, options.pop(name, self.transformer.get(argument)))
        options.setdefault("tie_word_embeddings", self.transformer.get("tie_embeddings", False))
        super().__init__(**options)


class NSAForCausalLM(PreTrainedModel, GenerationMixin):
    """`nsa.Transformer` behind the interface of transformers, its cache behind `generate`."""

    config_class = NSATransformerConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: NSATransformerConfig) -> None:
        super().__init__(config)
        self.model = Transformer(**config.transformer)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """`nsa.Transformer` initialises itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes the cache

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,  # a `Past`
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the tokens that follow `input_ids` [B, T].

        Args:
            attention_mask: 0 on padding, which may stand before a text or behind it.
            past_key_values: what the forward pass of the tokens before returned.
            labels: the tokens themselves, −100 where they are not scored; gives `loss`.
            logits_to_keep: only those of the last tokens, or of these places; 0 keeps all.
        """
        padding = None if past_key_values is not None else find_padding(attention_mask)
        ids = input_ids if padding is None else padding.to_end(input_ids)
        if use_cache:
            cache = None if past_key_values is None else past_key_values.cache
            counts = None if padding is None else padding.lengths
            logits, cache = self.model(ids, cache, return_cache=True, counts=counts)
            before = 0 if past_key_values is None else past_key_values.num_tokens
            past_key_values = Past(cache, before + input_ids.shape[1])
        else:
            logits = self.model(ids)
        if padding is not None:
            logits = padding.back(logits)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = logits[:, keep]
        loss = None if labels is None else next_token_loss(logits, labels)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )


class Past:
    """The cache of `nsa` as `generate` handles it."""

    is_compileable = False

    def __init__(self, cache: Any, num_tokens: int) -> None:
        self.cache = cache
        self.num_tokens = num_tokens

    def get_seq_length(self) -> int:
        """Columns of `input_ids` that it has seen, padding included."""
        return self.num_tokens

    def reorder_cache(self, beams: Tensor) -> None:
        """Keep these rows of the batch, in this order: for beam search."""
        self.cache.keep_rows(beams)


class Padding:
    """Where each row's text begins and how long it is; rows as a model wants them and back."""

    def __init__(self, attention_mask: Tensor) -> None:
        self.lengths = attention_mask.sum(dim=1)
        self.first = attention_mask.to(torch.uint8).argmax(dim=1)

    def to_end(self, x: Tensor) -> Tensor:
        """Rows [B, T, ...] that begin with their text: padding goes behind it."""
        return self._rolled(x, self.first)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `to_end`."""
        return self._rolled(x, -self.first)

    @staticmethod
    def _rolled(x: Tensor, by: Tensor) -> Tensor:
        place = (torch.arange(x.shape[1], device=x.device) + by[:, None]) % x.shape[1]
        return x[torch.arange(x.shape[0], device=x.device)[:, None], place]


def find_padding(attention_mask: Tensor | None) -> Padding | None:
    """None where nothing is padded.

    Raises:
        ValueError: where a mask hides tokens within a text, which no layer here can do.
    """
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    mask = (attention_mask != 0).long()
    if bool((mask.diff(dim=1, prepend=mask[:, :1] * 0) == 1).sum(dim=1).ne(1).any()):
        raise ValueError(
            "attention_mask must show one run of tokens in each row: padding may stand before a "
            "text or behind it, not within it"
        )
    return Padding(mask)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy in nats of each token's logits with the label that follows."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
