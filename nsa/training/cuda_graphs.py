"""Micro-batches without the host: forward pass, loss and backward pass as one CUDA graph.

The host launches a graph in the time of one kernel, however many kernels it holds. A graph reads
and writes where it did when it was recorded. So tokens are copied into an array of their own, and
gradients add up in arrays that stay (`GradientBuffer`).
"""

from collections.abc import Callable, Iterable

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from nsa.training.parallel import REPLAYED
from nsa.training.replicas import ReplicaStrategy
from nsa.transformer_block import Block

Learn = Callable[[dict[str, Tensor]], Tensor]  # from a micro-batch: gradients, and figures of it
WARM_UP = 3  # passes before recording: they compile, choose algorithms and fill caches
ALIGNMENT = 64  # numbers: every gradient begins on a boundary of 128 bytes or more


class GradientBuffer:
    """One array a dtype that all gradients are views of: zeroed, or summed over ranks, at once."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self.arrays = [self._lay_out(alike) for alike in by_dtype.values()]

    def _lay_out(self, parameters: list[nn.Parameter]) -> Tensor:
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        array = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, part in zip(parameters, array.split(sizes), strict=True):
            view = part[: parameter.numel()].view(parameter.shape)
            self.views.append((parameter, view))
        return array

    def zero(self) -> None:
        """Begin a step: gradients that were dropped, as Lightning drops them, come back too."""
        for parameter, view in self.views:
            parameter.grad = view
        for array in self.arrays:
            array.zero_()

    def sum_over_ranks(self) -> None:
        for array in self.arrays:
            dist.all_reduce(array)


class MicroBatchGraph:
    """A function of a micro-batch that adds to gradients, replayed as a CUDA graph.

    Recording leaves random generators as they were and gradients undefined. Dropout draws from
    PyTorch's generator as it stands at each replay. A batch of other shapes than the recorded one
    is given to the function itself.

    Args:
        learn: must launch the same kernels on the same arrays each time, and ask for no value.
        batch: an example, on the GPU.

    Raises:
        RuntimeError: if PyTorch or a kernel cannot be recorded.
    """

    def __init__(self, learn: Learn, batch: dict[str, Tensor]) -> None:
        self._learn = learn
        self._batch = {name: array.clone() for name, array in batch.items()}
        self._graph = torch.cuda.CUDAGraph()
        with torch.random.fork_rng([batch["tokens"].device]):
            self._record()

    def _record(self) -> None:
        stream = torch.cuda.Stream()  # of recording too: autograd notes where a gradient belongs
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._learn(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has a pool of its own
        # Only this thread must not allocate: loaders pin memory in others.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._figures = self._learn(self._batch)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        if shapes(batch) != shapes(self._batch):
            return self._learn(batch)
        for name, array in batch.items():
            self._batch[name].copy_(array)
        self._graph.replay()
        return self._figures.clone()


def shapes(batch: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: array.shape for name, array in batch.items()}


def record(learn: Learn, batch: dict[str, Tensor]) -> Learn:
    """A graph of `learn`; where recording fails, which is said, `learn` itself."""
    rank_zero_info("compiling a micro-batch, and recording it as a CUDA graph")
    try:
        return MicroBatchGraph(learn, batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        say_not_replayed(f"recording one failed: {error}")
        return learn


def say_not_replayed(why: str) -> None:
    rank_zero_warn(f"steps are not replayed as CUDA graphs: {why}", category=UserWarning)


def check_device(device: torch.device) -> None:
    """Raises ValueError for devices that have no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(
            f"compile={REPLAYED} records CUDA graphs and needs a GPU, not device {device.type}: "
            "set compile=true or compile=false"
        )


def draws(block: Block) -> bool:
    """Whether a block draws random numbers as it trains."""
    return block.dropout.p > 0 or getattr(block.attention, "selection", None) == "random"


def obstacle(trainer: L.Trainer, *, recomputes: bool, draws: bool) -> str | None:
    """Why a trainer's steps cannot be replayed as graphs; None where they can."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | ReplicaStrategy):
        return f"the hooks of {type(strategy).__name__} run on the host, in every layer"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return f"precision={trainer.precision} scales the loss by a number that the host changes"
    if torch.is_anomaly_enabled():
        return "trainer.detect_anomaly=true looks at every operation"
    if recomputes and draws:
        return (
            "activation_checkpointing with dropout or with attention.selection=random asks the "
            "host for the random state"
        )
    return None
