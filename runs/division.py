"""How an optimizer step is divided: over processes, and over micro-batches of each.

The step is the same however it is divided, and so are the samples it sees.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from nsa.training import micro_batch
from runs.strategies import FSDP2Strategy, gathered

AUTO = "auto"


class Room(NamedTuple):
    """What the choice of a micro-batch rests on, in bytes of one GPU."""

    expected: int
    free: int


def check_batch(sequences_per_step: int, micro_batch_size: int | str) -> None:
    """Raises ValueError for sizes that are impossible on any number of processes."""
    if sequences_per_step < 1:
        raise ValueError(f"batch.sequences_per_step={sequences_per_step} must be at least 1")
    is_number = isinstance(micro_batch_size, int) and not isinstance(micro_batch_size, bool)
    if micro_batch_size != AUTO and not (is_number and int(micro_batch_size) >= 1):
        raise ValueError(
            f"batch.micro_batch_size={micro_batch_size} must be at least 1, or {AUTO}: as many "
            "sequences as fit"
        )


def share_of(sequences_per_step: int, world_size: int) -> int:
    """Sequences of a step for each process.

    Raises:
        ValueError: if the processes cannot have equal shares.
    """
    share, rest = divmod(sequences_per_step, world_size)
    if rest or not share:
        raise ValueError(
            f"batch.sequences_per_step={sequences_per_step} must be a multiple of the {world_size} "
            "processes that share a step: change it, or trainer.devices"
        )
    return share


class StepDivision(L.Callback):
    """Divides the step once the ranks have started, before anything depends on it; then says so.

    Args:
        sequences_per_step: of all processes together.
        micro_batch_size: the most sequences that a process takes at once; "auto" tries, on the
            device, what fits: the same on all ranks.
        val_every_n_steps: restated for the trainer, which counts micro-batches.
        announce: called on every rank with what the choice rests on, if it was one.
    """

    def __init__(
        self,
        sequences_per_step: int,
        micro_batch_size: int | str,
        val_every_n_steps: int,
        announce: Callable[[Room | None], None],
    ) -> None:
        self.sequences_per_step, self.micro_batch_size = sequences_per_step, micro_batch_size
        self.val_every_n_steps = val_every_n_steps
        self.announce = announce

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        share = share_of(self.sequences_per_step, trainer.world_size)
        room = None
        if self.micro_batch_size == AUTO:
            at_once, room = choose(trainer, pl_module, share)
        else:
            most = int(self.micro_batch_size)
            at_once = micro_batch.largest_share(share, lambda n: n <= most)
        divide(trainer, share, at_once, self.val_every_n_steps)
        self.announce(room)


def divide(trainer: Any, share: int, at_once: int, val_every_n_steps: int) -> None:
    """Tell the trainer and its datamodule of micro-batches of `at_once` sequences."""
    trainer.accumulate_grad_batches = share // at_once
    trainer.val_check_interval = val_every_n_steps * trainer.accumulate_grad_batches
    trainer.datamodule.micro_batch_size = at_once


def choose(trainer: Any, module: Any, share: int) -> tuple[int, Room | None]:
    """The most sequences of a share that fit every rank's device, and what that rests on."""
    if trainer.strategy.root_device.type != "cuda":
        return micro_batch.on_cpu(share, module.model.seq_len), None
    return choose_by_trial(trainer, module, share)


def choose_by_trial(trainer: Any, module: Any, share: int) -> tuple[int, Room | None]:
    """`choose` on GPUs."""
    device = trainer.strategy.root_device
    rank_zero_info("trying how many sequences fit the GPU: batch.micro_batch_size=auto")
    room = micro_batch.room_of(device, trainer.world_size)
    with module.sparsity.at(module.sparsity.densest()):
        memory = micro_batch.memory_of(
            module.model,
            device,
            trainer.precision_plugin.forward_context,
            activation_checkpointing=module.activation_checkpointing,
            cross_entropy=module.cross_entropy,
            importance_loss=module.hparams.importance_loss,
            documents=getattr(trainer.datamodule, "pack", "stream") == "documents",
            shards=trainer.world_size if isinstance(trainer.strategy, FSDP2Strategy) else 1,
        )
    at_once = least(micro_batch.on_gpu(share, memory, room))
    return at_once, None if memory is None else Room(memory.of(at_once), room)


def least(number: int) -> int:
    """The smallest of all ranks' numbers."""
    several = dist.is_available() and dist.is_initialized()
    return min(gathered(number)) if several else number
