"""The three attentions a layer can have; all map tokens [B T M] to tokens [B T M].

`SparseAttention` is Native Sparse Attention (arXiv 2502.11089), `WindowAttention` and `Attention`
its sliding-window and dense counterparts. Letters as in `nsa.reference`; M is the model's width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa import decoding, ops
from nsa.cache import LayerCache, dense_cache, sparse_cache, window_cache
from nsa.compress_networks import BlockCompressor, CompressMLP
from nsa.config import NSAConfig
from nsa.heads import Branches, Heads, Projected
from nsa.rotary import angles_at, rotary_angles, rotate


class SparseAttention(nn.Module):
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
        compress_mlp_expand_factor: hidden width of the MLP that is φ where `compress_mlp` is None.
        strategy_combine_mlp: a module from M to 3 * heads gate logits, branch fastest; None is a
            linear layer of zero weight and bias `gate_bias`.
        backend: an entry of `ops.BACKENDS`, or "auto"; `self.backend` is the choice made.
        num_initial_blocks, num_local_blocks, importance: see `NSAConfig`.
        kv_per_branch: keys and values of their own for each branch (the paper), or shared ones.
        compressed_output: False keeps compressed keys for selection only.
        gate_bias: initial bias of the gate logits: one number, or one each for compressed,
            selected, sliding.
        rope_base: base of the rotary embedding of the selected and sliding branches.

    Raises:
        ValueError: for sizes `NSAConfig` refuses, and for options that exclude one another.
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
        importance: str = "probability_sum",
        kv_per_branch: bool = True,
        compressed_output: bool = True,
        gate_bias: float | Sequence[float] = 0.0,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.cfg = NSAConfig(
            sliding_window_size=sliding_window_size,
            compress_block_size=compress_block_size,
            compress_block_sliding_stride=compress_block_sliding_stride,
            selection_block_size=selection_block_size,
            num_selected_blocks=num_selected_blocks,
            num_initial_blocks=num_initial_blocks,
            num_local_blocks=num_local_blocks,
            causal=causal,
            importance=importance,
        )
        self.heads, self.dim_head = heads, dim_head
        self.kv_heads = _check_heads(heads, kv_heads, dim_head)
        self.use_diff_topk = use_diff_topk and num_selected_blocks > 0
        self.shared_selection = query_heads_share_selected_kv
        self.compressed_output = compressed_output
        self.rope_base = rope_base
        self.backend = ops.resolve_backend(backend, use_diff_topk=self.use_diff_topk)
        phi = compress_mlp
        if phi is None:
            phi = CompressMLP(dim_head, compress_block_size, compress_mlp_expand_factor)
        if not compressed_output:
            _check_scores_can_learn(self, phi, kv_per_branch, num_compressed_mem_kv)

        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.kv_layout = _kv_layout(kv_per_branch, compressed_output, num_selected_blocks > 0)
        kv_width = (max(self.kv_layout) + 1) * self.kv_heads * dim_head
        self.to_kv = nn.Linear(dim, kv_width, bias=False)
        self._build_compression(phi, num_compressed_mem_kv)
        self.to_gates = _gate_network(dim, heads, gate_bias, strategy_combine_mlp)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def _build_compression(self, phi: nn.Module, num_memories: int) -> None:
        if num_memories < 0:
            raise ValueError(f"num_compressed_mem_kv={num_memories} must be at least 0")
        cfg, groups, width = self.cfg, self.kv_heads, self.dim_head
        # Compressed keys that only rank blocks have no gradient: no positions then.
        learns = self.compressed_output or self.use_diff_topk
        means = partial(ops.block_means, backend=self.backend)
        build = partial(BlockCompressor, phi, cfg, groups, width, means=means)
        self.compress_k = build(positions=learns)
        self.compress_v = self.mem_k = self.mem_v = None
        if self.compressed_output:
            self.compress_v = build(positions=True)
        if num_memories:
            self.mem_k = nn.Parameter(torch.randn(groups, num_memories, width) * 0.02)
            self.mem_v = nn.Parameter(torch.randn(groups, num_memories, width) * 0.02)

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
    ) -> Any:
        """Tokens [B T M]; with return_cache also the cache of what has been seen so far.

        Args:
            cache: of the tokens before these; without gradients then. None with return_cache
                makes an empty one, which grows as tokens come.
            counts: with a cache, how many of the T tokens each sequence has; the others, at the
                end, are padding.
        """
        if cache is None and not return_cache:
            return self.to_out(self.gated_sum(self._project(tokens)).flatten(-2))
        cache = self.empty_cache(*tokens.shape[:2]) if cache is None else cache
        out = self.to_out(decoding.sparse_attention(self, tokens, cache, counts).flatten(-2))
        return (out, cache) if return_cache else out

    def gated_sum(self, x: Projected) -> Float[Tensor, "B T H D"]:
        """The branches, weighed by their gates (eq. 5)."""
        if self.attends_at_once:
            return self._attend_at_once(x)
        compressed, selected, sliding, gates, _ = self.attend(x)
        return ops.combine(gates, compressed, selected, sliding, backend=self.backend)

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """A cache of no tokens, with room for `capacity` each of `batch` sequences."""
        like = _like_keys(self, batch)
        return sparse_cache(self.cfg, like, capacity, values=self.compressed_output)

    @property
    def attends_at_once(self) -> bool:
        """Whether the backend has one op for the branches of such a layer and their sum."""
        plain = self.compressed_output and self.cfg.num_selected_blocks and not self.use_diff_topk
        return bool(plain) and ops.BACKENDS[self.backend].gated_attention is not None

    def branches(self, tokens: Float[Tensor, "B T M"], cache: LayerCache | None = None) -> Branches:
        """The outputs of the three branches, their gates and the selected blocks."""
        if cache is not None:
            return decoding.sparse_branches(self, tokens, cache)
        return self.attend(self._project(tokens))

    def _project(self, tokens: Float[Tensor, "B T M"]) -> Projected:
        return self.compress_and_rotate(self.split_heads(tokens))

    def split_heads(self, tokens: Float[Tensor, "B T M"]) -> Heads:
        """Queries, the keys and values of each branch, and gates."""
        tokens = self.norm(tokens)
        q = self.to_q(tokens).unflatten(-1, (self.heads, self.dim_head))
        kv = self.to_kv(tokens).unflatten(-1, (-1, self.kv_heads, self.dim_head)).unbind(2)
        gates = _split_gates(self.to_gates(tokens), self.heads).sigmoid()
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = (kv[i] for i in self.kv_layout)
        return Heads(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)

    def compress_and_rotate(self, heads: Heads) -> Projected:
        """What the branches of a whole sequence are computed from."""
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = heads
        angles = rotary_angles(q.shape[1], self.dim_head, base=self.rope_base, device=q.device)
        q_rot, k_slc, k_win = (
            ops.rotate(x, angles, backend=self.backend) for x in (q, k_slc, k_win)
        )
        # Blocks are compressed, and scored, before rotation: a mean of turned keys is no key.
        k_cmp = self.compress_k(k_cmp)
        # Where only the lse counts, values do not matter.
        v_cmp = k_cmp if self.compress_v is None else self.compress_v(v_cmp)
        mem_k, mem_v = self.memory(q)
        return Projected(q, k_cmp, v_cmp, mem_k, mem_v, q_rot, k_slc, v_slc, k_win, v_win, gates)

    def memory(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Memory keys and values in a tensor's dtype; None twice if there are none."""
        if self.mem_k is None or self.mem_v is None:
            return None, None
        return self.mem_k.to(like), self.mem_v.to(like)

    def _attend_at_once(self, x: Projected) -> Float[Tensor, "B T H D"]:
        """The gated sum from one op that has the gradients of all branches."""
        q, k_cmp, v_cmp = x.q.detach(), x.k_cmp.detach(), x.v_cmp.detach()
        memory = (None if mem is None else mem.detach() for mem in (x.mem_k, x.mem_v))
        compressed, lse = ops.compressed_attention(
            q, k_cmp, v_cmp, self.cfg, *memory, backend=self.backend
        )
        block_indices = ops.select_blocks(
            q, k_cmp, lse, self.cfg, self.shared_selection, backend=self.backend
        )
        return ops.gated_attention(
            x.gates, x.q, x.k_cmp, x.v_cmp, compressed, lse,
            x.q_rot, x.k_slc, x.v_slc, block_indices, x.k_win, x.v_win,
            self.cfg, x.mem_k, x.mem_v, backend=self.backend,
        )  # fmt: skip

    def attend(self, x: Projected) -> Branches:
        """The branches of a whole sequence, one by one."""
        cfg, backend = self.cfg, self.backend
        compressed, lse = ops.compressed_attention(
            x.q, x.k_cmp, x.v_cmp, cfg, x.mem_k, x.mem_v, backend=backend
        )
        if not self.compressed_output:
            compressed = torch.zeros_like(x.q)
        block_indices = ops.select_blocks(
            x.q, x.k_cmp, lse, cfg, self.shared_selection, backend=backend
        )
        selected = torch.zeros_like(x.q)
        if cfg.num_selected_blocks:
            block_gates = self._block_gates(x.q, x.k_cmp, lse, block_indices)
            selected = ops.selected_attention(
                x.q_rot, x.k_slc, x.v_slc, block_indices, cfg, block_gates, backend=backend
            )
        sliding = ops.sliding_window_attention(x.q_rot, x.k_win, x.v_win, cfg, backend=backend)
        return Branches(compressed, selected, sliding, x.gates, block_indices)

    def _block_gates(
        self,
        q: Float[Tensor, "B T H D"],
        k_cmp: Float[Tensor, "B C G D"],
        lse: Float[Tensor, "B T H"],
        block_indices: Int[Tensor, "B T J N"],
    ) -> Float[Tensor, "B T J N"] | None:
        """Ones whose gradient is that of the selected blocks' importances, for `use_diff_topk`."""
        if not self.use_diff_topk:
            return None
        chosen = ops.selected_importance(
            q, k_cmp, lse, block_indices, self.cfg, backend=self.backend
        )
        return 1.0 + (chosen - chosen.detach())


class Attention(nn.Module):
    """Dense attention (eq. 1-2), rotary, through PyTorch's scaled_dot_product_attention.

    `output_gate` multiplies each head's output by a sigmoid of the normed input, as NSA's gates
    do: zero weight and bias at the start (arXiv 2505.06708, headwise).
    """

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = True,
        norm: bool = True,
        *,
        output_gate: bool = False,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.heads, self.dim_head, self.causal = heads, dim_head, causal
        self.kv_heads = _check_heads(heads, kv_heads, dim_head)
        self.rope_base = rope_base
        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * self.kv_heads * dim_head, bias=False)
        self.to_gate = _zero_linear(dim, heads) if output_gate else None
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
    ) -> Any:
        """See `SparseAttention.forward`."""
        tokens = self.norm(tokens)
        if cache is None and not return_cache:
            q, k, v = rotated_qkv(self, tokens, "reference")
            return self._gated(tokens, decoding.scaled_dot_product(q, k, v, causal=self.causal))
        cache = self.empty_cache(*tokens.shape[:2]) if cache is None else cache
        project = partial(rotated_qkv, self, tokens, "reference")
        decoding.make_room(cache, tokens.shape[1], causal=self.causal)
        out = self._gated(tokens, decoding.dense_attention(project, cache, counts))
        return (out, cache) if return_cache else out

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """See `SparseAttention.empty_cache`."""
        return dense_cache(_like_keys(self, batch), capacity)

    def _gated(
        self, tokens: Float[Tensor, "B T M"], out: Float[Tensor, "B T H D"]
    ) -> Float[Tensor, "B T M"]:
        if self.to_gate is not None:
            out = out * self.to_gate(tokens).sigmoid()[..., None]
        return self.to_out(rearrange(out, "B T H D -> B T (H D)"))


class WindowAttention(nn.Module):
    """Sliding-window attention alone: exactly `sliding_window_size` keys, rotary."""

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        sliding_window_size: int,
        kv_heads: int | None = None,
        causal: bool = True,
        norm: bool = True,
        backend: str = "auto",
        *,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.cfg = NSAConfig(sliding_window_size=sliding_window_size, causal=causal)
        self.heads, self.dim_head = heads, dim_head
        self.kv_heads = _check_heads(heads, kv_heads, dim_head)
        self.rope_base = rope_base
        self.backend = ops.resolve_backend(backend)
        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * self.kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
    ) -> Any:
        """See `SparseAttention.forward`."""
        tokens = self.norm(tokens)
        if cache is None and not return_cache:
            q, k, v = rotated_qkv(self, tokens, self.backend)
            out = ops.sliding_window_attention(q, k, v, self.cfg, backend=self.backend)
            return self.to_out(out.flatten(-2))
        cache = self.empty_cache(*tokens.shape[:2]) if cache is None else cache
        project = partial(rotated_qkv, self, tokens, self.backend)
        decoding.make_room(cache, tokens.shape[1], causal=self.cfg.causal)
        out = decoding.window_attention(project, cache, self.cfg, counts, backend=self.backend)
        out = self.to_out(out.flatten(-2))
        return (out, cache) if return_cache else out

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """See `SparseAttention.empty_cache`."""
        return window_cache(self.cfg.sliding_window_size, _like_keys(self, batch), capacity)


def _like_keys(
    attn: SparseAttention | Attention | WindowAttention, batch: int
) -> Float[Tensor, "B 0 G D"]:
    """No keys, in the dtype and on the device of those that a layer makes."""
    weight = attn.to_kv.weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    return weight.new_empty(batch, 0, attn.kv_heads, attn.dim_head, dtype=dtype)


def rotated_qkv(
    attn: Attention | WindowAttention,
    tokens: Float[Tensor, "B T M"],
    backend: str,
    positions: Callable[[int], Int[Tensor, "B T"]] | None = None,
) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B T G D"], Float[Tensor, "B T G D"]]:
    """Queries, keys and values of normed tokens that stand at `positions`, or at 0 … T - 1."""
    q = rearrange(attn.to_q(tokens), "B T (H D) -> B T H D", H=attn.heads)
    k, v = rearrange(attn.to_kv(tokens), "B T (P G D) -> P B T G D", P=2, G=attn.kv_heads)
    if positions is not None:
        angles = angles_at(positions(tokens.shape[1]), attn.dim_head, base=attn.rope_base)
        return rotate(q, angles), rotate(k, angles), v
    angles = rotary_angles(
        tokens.shape[1], attn.dim_head, base=attn.rope_base, device=tokens.device
    )
    return ops.rotate(q, angles, backend=backend), ops.rotate(k, angles, backend=backend), v


def _kv_layout(kv_per_branch: bool, compressed_output: bool, selects: bool) -> tuple[int, ...]:
    """Which part of `to_kv` each of k_cmp, v_cmp, k_slc, v_slc, k_win, v_win is.

    What nothing reads has no part of its own (it stands for another): a parameter that no loss
    reaches would stop distributed training.
    """
    if not kv_per_branch:
        return (0, 1) * 3
    compressed = (0, 1) if compressed_output else (0, 0)
    first = max(compressed) + 1
    selected = (first, first + 1)
    sliding = (first + 2, first + 3) if selects else selected
    return (*compressed, *selected, *sliding)


def _split_gates(logits: Float[Tensor, "B T L"], heads: int) -> Float[Tensor, "B T H 3"]:
    if logits.shape[-1] != 3 * heads:
        raise ValueError(
            f"strategy_combine_mlp gives {logits.shape[-1]} numbers a token: it must give "
            f"3 * heads = {3 * heads}, the branches of a head side by side"
        )
    return rearrange(logits, "B T (H three) -> B T H three", three=3)


def _gate_network(
    dim: int, heads: int, gate_bias: float | Sequence[float], network: nn.Module | None
) -> nn.Module:
    """From tokens to gate logits; None: linear, its weight 0, so that gates start at the bias."""
    bias = [gate_bias] * 3 if isinstance(gate_bias, int | float) else list(gate_bias)
    if len(bias) != 3 or not all(isinstance(number, int | float) for number in bias):
        raise ValueError(
            f"gate_bias={bias} must be one number, or three: compressed, selected, sliding"
        )
    if network is not None:
        if any(bias):
            raise ValueError(
                f"gate_bias={bias} is for the built-in gates: a strategy_combine_mlp brings its own"
            )
        return network
    gates = _zero_linear(dim, 3 * heads)
    with torch.no_grad():
        gates.bias.copy_(torch.tensor(bias).repeat(heads))
    return gates


def _zero_linear(dim_in: int, dim_out: int) -> nn.Linear:
    linear = nn.Linear(dim_in, dim_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _check_heads(heads: int, kv_heads: int | None, dim_head: int) -> int:
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
    if dim_head % 2:
        raise ValueError(f"dim_head={dim_head} must be even: rotary embedding turns pairs")
    return kv_heads


def _check_scores_can_learn(
    attn: SparseAttention, phi: nn.Module, kv_per_branch: bool, num_memories: int
) -> None:
    """Without the compressed output something else must train the scores that select blocks."""
    if not attn.cfg.num_selected_blocks:
        raise ValueError(
            "compressed_output=False with num_selected_blocks=0 leaves only the window: "
            "use WindowAttention"
        )
    if num_memories:
        raise ValueError(
            f"num_compressed_mem_kv={num_memories} needs compressed_output=True: memory keys and "
            f"values are read by the compressed branch alone"
        )
    has_parameters = next(phi.parameters(), None) is not None
    if not attn.use_diff_topk and (kv_per_branch or has_parameters):
        raise ValueError(
            "compressed_output=False leaves nothing to train the scores that select blocks: "
            "use use_diff_topk=True, or kv_per_branch=False with a compress_mlp without "
            "parameters (MeanPool)"
        )
