"""Tokens per second, model FLOPs utilisation and peak memory."""

import resource
import sys
import time
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from callbacks.every_n_steps import EveryNSteps, log_metrics, synchronize

# Dense bfloat16 tensor-core peak in TFLOP/s with float32 accumulation, from NVIDIA's datasheets of
# each part (where a datasheet gives the figure with sparsity, half of it). A row fits a device
# whose name holds all of its words; the first that fits counts, so variants precede the plain name.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
OTHER_PARTS = {"MIG", "LAPTOP", "D"}  # not the part of that name: a slice of it, or another chip


def peak_flops_of(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None if the table does not know it."""
    words = set(device_name.replace("-", " ").upper().split())
    if words & OTHER_PARTS:
        return None
    for part, tflops in PEAK_TFLOPS:
        if set(part.upper().split()) <= words:
            return tflops * 1e12
    return None


class Mark(NamedTuple):
    """Tokens and floating-point operations so far, and the reading of the training clock."""

    tokens: int
    flops: float
    seconds: float

    def since(self, other: "Mark") -> "Mark":
        tokens, flops = self.tokens - other.tokens, self.flops - other.flops
        return Mark(tokens, flops, self.seconds - other.seconds)


class Throughput(EveryNSteps):
    """Logs perf/tokens_per_second, perf/mfu and perf/memory_gib over the steps since the last log.

    All ranks' tokens count. The clock stands still in validation and in the periodic work of other
    callbacks; waiting for data and saving checkpoints count. Utilisation is `model.flops_per_token`
    for documents of the data's lengths and at the sizes of each step (`sparsity_schedule`), times
    tokens per second over the devices' dense bfloat16 peak, whatever the precision; it is not
    logged where the peak is unknown. Memory is rank zero's: the most PyTorch has held on the GPU,
    or the process's largest resident size on a CPU, since its start.

    Args:
        skip_steps: steps at the start (of a resumed run too) that `tokens_per_second` leaves out:
            compilation, warm-up of caches and of the allocator.
        peak_flops: FLOP/s of one device; None looks its name up.
        every_n_steps: None follows the trainer's `log_every_n_steps`.
    """

    def __init__(
        self,
        skip_steps: int = 5,
        peak_flops: float | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        self.check_at_least(0, skip_steps=skip_steps)
        self.skip_steps = skip_steps
        self.peak_flops = peak_flops
        self._tokens, self._flops = 0, 0.0  # all ranks, since training started
        self._paused = 0.0
        self._paused_since: float | None = None
        self._flops_per_token: dict[int | None, float] = {}  # by the stage of `sparsity_schedule`
        self._window = self._latest = Mark(0, 0.0, 0.0)
        self._steady: Mark | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean of this process's run without its first `skip_steps`; None if it had no more.

        After training, `trainer.callback_metrics["perf/tokens_per_second"]` is this mean.
        """
        if self._steady is None or self._latest.tokens == self._steady.tokens:
            return None
        since = self._latest.since(self._steady)
        return since.tokens / since.seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.peak_flops is None:
            device = pl_module.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            self.peak_flops = peak_flops_of(name)
            if self.peak_flops is None and device.type == "cuda":
                rank_zero_info(
                    f"perf/mfu is not logged: the peak FLOP/s of {name!r} is not known; "
                    "set callbacks.throughput.peak_flops to log it"
                )
        self._paused_since = None
        self._steady_from = trainer.global_step + self.skip_steps
        self._window = self._latest = self._mark(trainer, pl_module)
        self._steady = self._latest if self.skip_steps == 0 else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._paused_since is not None:
            self._paused += time.perf_counter() - self._paused_since
            self._paused_since = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rows, length = batch["tokens"].shape
        tokens = rows * (length - 1) * trainer.world_size
        stage = getattr(getattr(pl_module, "sparsity", None), "now", None)
        if stage not in self._flops_per_token:
            self._flops_per_token[stage] = flops_per_token(trainer, pl_module, length - 1)
        self._tokens += tokens
        self._flops += tokens * self._flops_per_token[stage]
        if self._steady is None and trainer.global_step == self._steady_from:
            self._steady = self._latest = self._mark(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_nth_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._latest = self._mark(trainer, pl_module)
        since, self._window = self._latest.since(self._window), self._latest
        metrics = {
            "perf/tokens_per_second": since.tokens / since.seconds,
            "perf/memory_gib": peak_memory(pl_module.device) / 2**30,
        }
        if self.peak_flops is not None:
            possible = self.peak_flops * trainer.world_size * since.seconds
            metrics["perf/mfu"] = since.flops / possible
        log_metrics(trainer, metrics)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._latest = self._mark(trainer, pl_module)
            self._paused_since = time.perf_counter()  # until the next training batch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._paused_since is None:
            self._latest = self._mark(trainer, pl_module)
        if (mean := self.tokens_per_second) is not None:
            trainer.callback_metrics["perf/tokens_per_second"] = torch.tensor(mean)

    def _mark(self, trainer: Any, pl_module: LightningModule) -> Mark:
        synchronize(pl_module.device)
        periodic = [other for other in trainer.callbacks if isinstance(other, EveryNSteps)]
        others = sum(other.seconds for other in periodic)
        clock = time.perf_counter() - self._paused - others
        return Mark(self._tokens, self._flops, clock)


def flops_per_token(trainer: Any, pl_module: Any, num_tokens: int) -> float:
    """Of a token of training's windows: a document attends to itself, and padding is no work."""
    data = trainer.datamodule
    every = data.document_lengths() if hasattr(data, "document_lengths") else [(num_tokens, 1.0)]
    return sum(share * float(pl_module.model.flops_per_token(length)) for length, share in every)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most PyTorch held on a GPU, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
