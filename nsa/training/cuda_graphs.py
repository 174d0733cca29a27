"""What a training step owes to blocks that are replayed as CUDA graphs: marks and buffers.

A graph writes its results, gradients included, where it wrote them the last time: what is to be
kept beyond the next forward pass has to lie elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

MODE = "reduce-overhead"  # of torch.compile: the one that records CUDA graphs


def check_device(device: torch.device, *, distributed: bool) -> None:
    """Raises ValueError for devices that graphs have never been run on."""
    if device.type != "cuda":
        raise ValueError(
            f"compile={MODE} records CUDA graphs and needs a GPU, not device {device.type}: "
            "set compile=true or compile=false"
        )
    if distributed:
        raise ValueError(
            f"compile={MODE} trains on one GPU, without a strategy for several: set compile=true, "
            "or trainer=gpu trainer.devices=1"
        )


@contextmanager
def forward_pass() -> Iterator[None]:
    """The forward pass of a micro-batch: from here on, results of the last one may be overwritten.

    Never in inference mode, in which Lightning tests: PyTorch would record all graphs anew there,
    and training could not update the random state of one that came first.
    """
    learning = torch.is_grad_enabled()
    torch.compiler.cudagraph_mark_step_begin()
    with torch.inference_mode(False), torch.set_grad_enabled(learning):
        yield


def zero_gradients(optimizer: Optimizer) -> None:
    """In place, and made where there are none: so that autograd adds to them, outside the graphs.

    It would keep a graph's result as the gradient of a parameter that has none, and the next graph
    would write over it. Lightning drops gradients before every validation.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.zero_grad(set_to_none=False)
