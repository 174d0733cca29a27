"""Data parallelism with a copy of the model on every rank."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy


class ReplicaStrategy(DDPStrategy):
    """Lightning's DDP, unless the module replays its steps as CUDA graphs.

    A graph cannot hold the hooks with which DDP sums gradients while the backward pass runs.
    Such a module sums its gradients itself, once a step (`GradientBuffer`), and needs no wrapper:
    here the weights alone become those of rank zero, as DDP's do.
    """

    def configure_ddp(self) -> None:
        module: Any = self.lightning_module
        if not module.replays_graphs:
            super().configure_ddp()
            return
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
