"""Options of a trainer that training could not honour, each refused by name."""

from collections.abc import Set
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from nsa.training import cuda_graphs, parallel
from nsa.training.optimizers import MuonAdamW, build_optimizer


def check_trainer(trainer: L.Trainer, module: Any) -> None:
    """Refuse a trainer whose options a `NSALightningModule` could not honour.

    Raises:
        ValueError: naming the option.
    """
    optimizer = build_optimizer(module.optimizer_options, module.model)
    check_clipping(trainer, optimizer)
    check_length(trainer)
    check_sharding(trainer, optimizer)
    check_teaching(trainer, module.losses.importance_loss)
    device = trainer.strategy.root_device
    if module.compile_option == parallel.REPLAYED:
        cuda_graphs.check_device(device)
    check_backends({getattr(b.attention, "backend", "") for b in module.model.blocks}, device)


def check_clipping(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
    if (trainer.gradient_clip_val or 0) < 0:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} must be at least 0; "
            "0 does not clip"
        )
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ValueError(
            f"trainer.gradient_clip_algorithm={trainer.gradient_clip_algorithm}: gradients are "
            "clipped by their norm; leave it out"
        )
    unscales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    if trainer.precision == "16-mixed" and unscales_itself:
        raise ValueError(
            "optimizer.fused=true with trainer.precision=16-mixed would clip gradients before "
            "they are unscaled: set optimizer.fused=false"
        )


def check_length(trainer: L.Trainer) -> None:
    if trainer.max_steps < 1:
        raise ValueError(
            f"trainer.max_steps={trainer.max_steps}: the schedule needs to know how long the "
            "run is; set it, and also trainer.max_time if a time limit is to end the run"
        )


def check_sharding(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(trainer.strategy, ModelParallelStrategy) and isinstance(optimizer, MuonAdamW):
        raise ValueError(
            "optimizer=muon needs whole matrices, and FSDP2 gives each device a shard of them: "
            "use trainer=ddp, or optimizer=adamw"
        )


def check_teaching(trainer: L.Trainer, importance_loss: Any) -> None:
    if isinstance(trainer.strategy, ModelParallelStrategy) and importance_loss.weight:
        raise ValueError(
            "importance_loss reads the weights of a layer outside its forward pass, and FSDP2 "
            "gathers them there alone: use trainer=ddp, or set importance_loss.weight=0"
        )


def check_backends(backends: Set[str], device: torch.device) -> None:
    """`backends` are those of the model's layers."""
    if device.type == "cpu" and "flex" in backends:
        raise ValueError(
            "attention.backend=flex cannot train on a CPU (FlexAttention has no backward pass "
            "there): use attention.backend=torch"
        )
