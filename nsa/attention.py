"""`SparseAttention`: Native Sparse Attention (arXiv 2502.11089) as a layer.

Maps tokens [B T M] to tokens [B T M]; M is the model's width, other letters as in `nsa.reference`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa import blocks, decoding, ops
from nsa.backends import resolve_backend
from nsa.blocks import Starts
from nsa.branches import attend_branches, gated_attention
from nsa.cache import LayerCache, sparse_cache
from nsa.compress_networks import BlockCompressor, CompressMLP, check_folds
from nsa.config import NSAConfig
from nsa.gates import gate_network, split_gates
from nsa.heads import Branches, Heads, Projected
from nsa.layer import ProjectingLayer, check_heads, check_tokens, like_keys
from nsa.options import (
    check_scores_can_learn,
    importance_rule,
    kv_layout,
    warn_if_phi_is_large,
)
from nsa.plugins import Spec
from nsa.rotary import Rotary, find_scaling
from nsa.selection import check_selection, control_blocks
from nsa.twins import Attention, WindowAttention

__all__ = ["Attention", "SparseAttention", "WindowAttention"]


class SparseAttention(ProjectingLayer):
    """Native Sparse Attention: compressed, selected and sliding-window attention, gated (eq. 5).

    Positional arguments have the names and the order of native-sparse-attention-pytorch.

    Args:
        dim, dim_head, heads: model width, width of a head (even), query heads H.
        sliding_window_size … num_selected_blocks: w, l, d, l' and n of `NSAConfig`.
        kv_heads: key/value heads G, a divisor of `heads`; None means as many as `heads`.
        num_compressed_mem_kv: learned keys and values that the compressed branch always sees.
        norm: RMSNorm on the way in.
        use_diff_topk: multiply selected scores by straight-through gates, so that the loss reaches
            the importances that chose their blocks.
        query_heads_share_selected_kv: one selection a key/value head (the paper), or a query head.
        compress_mlp: φ, a module from [b h w n d] to [b h w d]; copied for keys and for values.
            None is the paper's MLP over a whole block (`CompressMLP`), which outweighs the layer
            at the paper's sizes: 34.6 of 49.4 million parameters with dim 2048, dim_head 128 and
            heads 16. Lighter: `AttentionPool`, `MeanPool`, a small `compress_mlp_expand_factor`.
        compress_mlp_expand_factor: hidden width of the MLP that is φ where `compress_mlp` is None.
        strategy_combine_mlp: a module from M to 3 * heads gate logits, branch fastest; None is a
            linear layer of zero weight and bias `gate_bias`.
        backend: an entry of `nsa.backends.BACKENDS`, or "auto"; `self.backend` is the choice made.
        num_initial_blocks, num_local_blocks: see `NSAConfig`.
        importance: a rule of `nsa.importance.RULES` by name, or one's own (see `nsa.plugins`).
        kv_per_branch: keys and values of their own for each branch (the paper), or shared ones.
        compressed_output: False keeps compressed keys for selection only.
        gate_bias: initial bias of the gate logits: one number, or one each for compressed,
            selected, sliding.
        rope_base: base of the rotary embedding of the selected and sliding branches.
        rope_scaling: slower rotation for sequences longer than those trained on before: None, or
            {type: linear, factor: 4}, and so on: see `nsa.rotary.SCALINGS`.
        qk_norm: RMSNorm over the head dimension of queries, and of each branch's keys. Keys are
            normed token by token, before φ and before rotation: a compressed key stays small
            where the keys of its block disagree. Memory keys are learned and not normed.
        selection: who chooses the blocks: "learned", or a control of `nsa.selection`. The oracle
            scores every query against every key: for short sequences.
        selection_seed: of the random selection where the layer does not train. A `Transformer`
            gives each layer its own; in training every step draws anew.

    Raises:
        ValueError: for sizes `NSAConfig` refuses, for options that exclude one another or that the
            backend lacks, and for a φ that does not give [b h w d].
    """

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        sliding_window_size: int,
        compress_block_size: int,
        compress_block_sliding_stride: int,
        selection_block_size: int,
        num_selected_blocks: int,
        kv_heads: int | None = None,
        num_compressed_mem_kv: int = 0,
        causal: bool = True,
        norm: bool = True,
        use_diff_topk: bool = False,
        query_heads_share_selected_kv: bool = True,
        compress_mlp: nn.Module | None = None,
        compress_mlp_expand_factor: float = 1.0,
        strategy_combine_mlp: nn.Module | None = None,
        backend: str = "auto",
        *,
        num_initial_blocks: int = 1,
        num_local_blocks: int = 2,
        importance: Spec = "probability_sum",
        kv_per_branch: bool = True,
        compressed_output: bool = True,
        gate_bias: float | Sequence[float] = 0.0,
        rope_base: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
        selection: str = "learned",
        selection_seed: int = 0,
    ) -> None:
        super().__init__()
        self.selection, self.selection_seed = check_selection(selection), selection_seed
        num_selected_blocks = 0 if selection == "none" else num_selected_blocks
        self.cfg = NSAConfig(
            sliding_window_size=sliding_window_size,
            compress_block_size=compress_block_size,
            compress_block_sliding_stride=compress_block_sliding_stride,
            selection_block_size=selection_block_size,
            num_selected_blocks=num_selected_blocks,
            num_initial_blocks=num_initial_blocks,
            num_local_blocks=num_local_blocks,
            causal=causal,
            importance=importance_rule(importance),
        )
        self.document_alignment = selection_block_size  # a multiple of d: where both blocks begin
        groups = check_heads(heads, kv_heads, dim_head)
        self.use_diff_topk = use_diff_topk and num_selected_blocks > 0
        self.causal, self.shared_selection = causal, query_heads_share_selected_kv
        self.compressed_output = compressed_output
        self.backend = self._resolve_backend(backend, num_compressed_mem_kv)
        phi = compress_mlp
        if phi is None:
            phi = CompressMLP(dim_head, compress_block_size, compress_mlp_expand_factor)
        layout = kv_layout(kv_per_branch, compressed_output, num_selected_blocks > 0)
        rotary = Rotary(dim_head, rope_base, find_scaling(rope_scaling))
        self.build_projections(
            dim, heads, groups, rotary, norm=norm, qk_norm=qk_norm, kv_layout=layout
        )
        self._build_compression(phi, num_compressed_mem_kv, kv_per_branch=kv_per_branch)
        self.to_gates = gate_network(dim, heads, gate_bias, strategy_combine_mlp)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        warn_if_phi_is_large(self, [c.network for c in self._compressors])

    def _resolve_backend(self, backend: str, num_memories: int) -> str:
        needed = {
            "causal=False": not self.cfg.causal,
            "num_compressed_mem_kv": num_memories > 0,
            "query_heads_share_selected_kv=False": not self.shared_selection,
            "use_diff_topk=True": self.use_diff_topk,
        }
        options = [option for option, wanted in needed.items() if wanted]
        return resolve_backend(backend, options=options, importance=self.cfg.importance)

    def _build_compression(self, phi: nn.Module, num_memories: int, *, kv_per_branch: bool) -> None:
        if num_memories < 0:
            raise ValueError(f"num_compressed_mem_kv={num_memories} must be at least 0")
        if not self.compressed_output:
            check_scores_can_learn(
                phi,
                num_selected_blocks=self.cfg.num_selected_blocks,
                use_diff_topk=self.use_diff_topk,
                kv_per_branch=kv_per_branch,
                num_memories=num_memories,
            )
        cfg, groups, width = self.cfg, self.kv_heads, self.dim_head
        check_folds(phi, groups, cfg.compress_block_size, width)
        # Compressed keys that only rank blocks have no gradient: no positions then.
        learns = self.compressed_output or self.use_diff_topk
        build = partial(BlockCompressor, phi, cfg, groups, width, backend=self.backend)
        self.compress_k = build(positions=learns)
        self.compress_v = self.mem_k = self.mem_v = None
        if self.compressed_output:
            self.compress_v = build(positions=True)
        if num_memories:
            self.mem_k = nn.Parameter(torch.randn(groups, num_memories, width) * 0.02)
            self.mem_v = nn.Parameter(torch.randn(groups, num_memories, width) * 0.02)

    @property
    def _compressors(self) -> list[BlockCompressor]:
        return [c for c in (self.compress_k, self.compress_v) if c is not None]

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
        document_starts: Starts = None,
    ) -> Any:
        """Tokens [B T M]; with return_cache also the cache of what has been seen so far.

        Args:
            cache: of the tokens before these; without gradients then. None with return_cache
                makes an empty one, which grows as tokens come.
            counts: with a cache, how many of the T tokens each sequence has; the others, at the
                end, are padding.
            document_starts: int32, for each token the first token of its document (see
                `nsa.documents`), a multiple of `selection_block_size`; no cache then.
        """
        check_tokens(tokens, self.to_q.in_features)
        self.check_documents(document_starts, tokens, caches=cache is not None or return_cache)
        if cache is None and not return_cache:
            x = self._project(tokens, document_starts)
            return self.to_out(self.gated_sum(x).flatten(-2))
        cache = self.empty_cache(*tokens.shape[:2]) if cache is None else cache
        out = self.to_out(decoding.sparse_attention(self, tokens, cache, counts).flatten(-2))
        return (out, cache) if return_cache else out

    def gated_sum(self, x: Projected) -> Float[Tensor, "B T H D"]:
        """The branches, weighed by their gates (eq. 5)."""
        known = control_blocks(self, x.q_rot, x.k_slc, document_starts=x.document_starts)
        return gated_attention(x, self.cfg, block_indices=known, **self._rules)

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """A cache of no tokens, with room for `capacity` each of `batch` sequences."""
        like = like_keys(self, batch)
        return sparse_cache(self.cfg, like, capacity, values=self.compressed_output)

    def branches(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        *,
        document_starts: Starts = None,
    ) -> Branches:
        """The outputs of the three branches, their gates and the selected blocks."""
        check_tokens(tokens, self.to_q.in_features)
        self.check_documents(document_starts, tokens, caches=cache is not None)
        if cache is not None:
            return decoding.sparse_branches(self, tokens, cache)
        x = self._project(tokens, document_starts)
        known = control_blocks(self, x.q_rot, x.k_slc, document_starts=document_starts)
        return attend_branches(x, self.cfg, block_indices=known, **self._rules)

    @property
    def _rules(self) -> dict[str, Any]:
        return dict(
            backend=self.backend,
            shared=self.shared_selection,
            use_diff_topk=self.use_diff_topk,
            compressed_output=self.compressed_output,
        )

    def _project(self, tokens: Float[Tensor, "B T M"], document_starts: Starts = None) -> Projected:
        return self.compress_and_rotate(self.split_heads(tokens), document_starts)

    def split_heads(self, tokens: Float[Tensor, "*B M"]) -> Heads:
        """Queries, the keys and values of each branch, and gates."""
        tokens = self.norm(tokens)
        q, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win) = self.project(tokens)
        k_slc, k_win = self.rotary.scale(k_slc), self.rotary.scale(k_win)
        gates = split_gates(self.to_gates(tokens), self.heads).sigmoid()
        return Heads(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)

    def compress_and_rotate(self, heads: Heads, document_starts: Starts = None) -> Projected:
        """What the branches of a whole sequence are computed from."""
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = heads
        angles = self.rotary.angles(q.shape[1], q.device, document_starts)
        q_rot, k_slc, k_win = (
            ops.rotate(x, angles, backend=self.backend) for x in (q, k_slc, k_win)
        )
        # Blocks are compressed, and scored, before rotation: a mean of rotated keys is meaningless.
        k_cmp = self.compress_k(k_cmp)
        # Where only the lse counts, any values do.
        v_cmp = k_cmp if self.compress_v is None else self.compress_v(v_cmp)
        mem_k, mem_v = self.memory(q)
        kv = k_slc, v_slc, k_win, v_win
        return Projected(q, k_cmp, v_cmp, mem_k, mem_v, q_rot, *kv, gates, document_starts)

    def memory(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Memory keys and values in a tensor's dtype; None twice if there are none."""
        if self.mem_k is None or self.mem_v is None:
            return None, None
        return self.mem_k.to(like), self.mem_v.to(like)

    def keys_per_query(self, num_tokens: int) -> dict[str, Int[Tensor, " T"]]:
        keys = blocks.keys_per_query(num_tokens, self.cfg)
        return keys if self.compressed_output else keys | {"compressed": 0 * keys["sliding"]}

    def compress_flops(self, num_tokens: int) -> float:
        """What φ spends on one block of keys and one of values, times C."""
        flops = sum(compressor.flops_per_block() for compressor in self._compressors)
        return flops * blocks.num_compress_blocks(num_tokens, self.cfg)

    def extra_repr(self) -> str:
        cfg = self.cfg
        return (
            f"w={cfg.sliding_window_size}, l={cfg.compress_block_size}, "
            f"d={cfg.compress_block_sliding_stride}, l′={cfg.selection_block_size}, "
            f"n={cfg.num_selected_blocks}, heads={self.heads}, kv_heads={self.kv_heads}, "
            f"causal={cfg.causal}, backend={self.backend}"
        )
