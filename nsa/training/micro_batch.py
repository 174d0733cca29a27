"""How many sequences a device takes at once: as many of its share of a step as fit its memory.

The memory of a micro-batch is linear in its sequences: weights, gradients and optimizer are there
once, activations once a sequence. A trial of one sequence and one of two give the line.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch

from nsa.training import parallel
from nsa.training.importance_loss import ImportanceLoss
from nsa.training.losses import Losses
from nsa.transformer import Transformer

SAFETY = 0.85  # of what is free: fragments, workspaces, and what other code allocates
FOR_COMMUNICATION = 2**30  # bytes, on each of several devices
NEVER = 1 << 60  # bytes, more than any device has
TOKENS_ON_CPU = 32_768  # at once: nobody knows what else a CPU's memory is needed for


class Memory(NamedTuple):
    """What training takes of a device, in bytes."""

    fixed: int
    per_sequence: int

    def of(self, sequences: int) -> int:
        return self.fixed + sequences * self.per_sequence


def largest_share(share: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `share` that fits; 1 if none does."""
    return max((n for n in range(1, share + 1) if share % n == 0 and fits(n)), default=1)


def on_cpu(share: int, seq_len: int) -> int:
    """As many sequences of `share` as have at most TOKENS_ON_CPU tokens."""
    return largest_share(share, lambda n: n * seq_len <= TOKENS_ON_CPU)


def on_gpu(share: int, memory: Memory | None, room: int) -> int:
    """As many sequences of `share` as fit into `room` bytes; `memory` None: not even one did."""
    if memory is None:
        return 1
    return largest_share(share, lambda n: memory.of(n) <= room)


def room_of(device: torch.device, world_size: int) -> int:
    """Bytes of a GPU that training may take."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(SAFETY * free) - (FOR_COMMUNICATION if world_size > 1 else 0)


def memory_of(
    model: Transformer,
    device: torch.device,
    forward_context: Callable[[], AbstractContextManager],
    *,
    activation_checkpointing: str = "none",
    cross_entropy: str = "plain",
    importance_loss: Mapping[str, Any] | None = None,
    documents: bool = False,
    shards: int = 1,
    peak_of: Callable[[Callable[[], None], torch.device], int] | None = None,
) -> Memory | None:
    """What a step of `model` takes of `device`, by steps of a copy; None if one does not fit.

    The copy changes neither the model's weights and gradients nor the random generators.

    Args:
        forward_context: of training, for its precision.
        activation_checkpointing: of `parallel.KEPT`.
        cross_entropy: of `label_sums.CROSS_ENTROPIES`.
        importance_loss: arguments of `ImportanceLoss`.
        documents: whether rows are of packed documents.
        shards: ranks that share weights, gradients and optimizer.
        peak_of: the most bytes that a function allocates; the default asks PyTorch's allocator.
    """
    step = partial(
        take_step, model, device, forward_context, activation_checkpointing, cross_entropy,
        documents, importance_loss=importance_loss,
    )  # fmt: skip
    peak = peak_of or peak_on_gpu
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        peaks = peaks_that_fit(step, lambda trial: peak(trial, device))
    if not peaks:
        return None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = 2 * weights  # two moments; the trial holds weights and gradients
    elsewhere = 4 * weights * (shards - 1) // shards
    # Two did not fit: a sequence takes more than what the first one left.
    per_sequence = peaks[1] - peaks[0] if len(peaks) == 2 else NEVER
    return Memory(peaks[0] - per_sequence + optimizer - elsewhere, per_sequence)


def peaks_that_fit(
    step: Callable[[int], None], peak_of: Callable[[Callable[[], None]], int]
) -> list[int]:
    """The peaks of a step of one sequence and of one of two, up to the first that does not fit."""
    peaks: list[int] = []
    for sequences in (1, 1, 2):  # libraries keep what they allocate in the first
        try:
            peaks.append(peak_of(partial(step, sequences)))
        except torch.OutOfMemoryError:
            break
    return peaks[1:]


def take_step(
    model: Transformer,
    device: torch.device,
    forward_context: Callable[[], AbstractContextManager],
    activation_checkpointing: str,
    cross_entropy: str,
    documents: bool,
    sequences: int,
    *,
    importance_loss: Mapping[str, Any] | None = None,
) -> None:
    """The forward and the backward pass of a copy of `model`, on tokens that are all 0."""
    copy = deepcopy(model).to(device)
    parallel.checkpoint_activations(copy, activation_checkpointing)
    tokens = torch.zeros((sequences, copy.seq_len + 1), dtype=torch.long, device=device)
    batch = {"tokens": tokens}
    if documents:
        batch["document_starts"] = torch.zeros_like(tokens[:, 1:], dtype=torch.int32)
    losses = Losses(copy, cross_entropy, ImportanceLoss(copy, **importance_loss or {}))
    for _ in range(2):  # the second one finds gradients to add to
        with forward_context():
            loss, _ = losses.learn(batch)
        loss.backward()


def peak_on_gpu(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes that PyTorch held while `run` ran, above those before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak
