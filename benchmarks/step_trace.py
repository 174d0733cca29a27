"""A callback for `benchmarks.presets`: what a run's steps cost, measured inside train.py."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from callbacks.every_n_steps import synchronize

STARTED = "NSA_STARTED"  # environment: when the command was typed, in seconds since 1970


class StepTrace(Callback):
    """Writes step_trace.json into the run folder, on rank zero.

    `start_up_s` lasts from the command to the end of the first step. Then come `warm_up` steps;
    steps whose mean time is `step_ms`; and `traced` steps at the end under PyTorch's profiler, for
    which `gpu_busy` is the time in which a kernel or a copy runs, over `step_ms`. `kernels` and
    `graphs` are launches a step, on the GPU and by the host.
    """

    def __init__(self, folder: str, warm_up: int = 8, traced: int = 3) -> None:
        super().__init__()
        self.folder, self.warm_up, self.traced = folder, warm_up, traced
        self.figures: dict[str, Any] = {}
        self._begun = self._from = (0, 0.0)
        self._seen = 0  # the latest step that ended
        self._trace: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = (trainer.global_step, 0.0)
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        done, last = step - self._begun[0], trainer.max_steps - self.traced
        if step == self._seen:
            return  # a micro-batch that ends no step
        self._seen = step
        if done == 1 and "start_up_s" not in self.figures:
            synchronize(pl_module.device)
            started = float(os.environ.get(STARTED, time.time()))
            self.figures["start_up_s"] = time.time() - started
        if done == self.warm_up:
            synchronize(pl_module.device)
            self._from = (step, time.perf_counter())
        if step == last and self._from[1]:
            self._measure(step, pl_module.device)

    def _measure(self, step: int, device: torch.device) -> None:
        synchronize(device)
        seconds = time.perf_counter() - self._from[1]
        self.figures["step_ms"] = 1e3 * seconds / (step - self._from[0])
        if device.type == "cuda":
            self.figures["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
            self._trace = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._trace.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trace is not None:
            synchronize(pl_module.device)
            self._trace.stop()
            self._count(self._trace.events() or [])
        model: Any = pl_module.model
        self.figures["flops_per_token"] = model.flops_per_token(model.seq_len)
        if trainer.is_global_zero:
            Path(self.folder, "step_trace.json").write_text(json.dumps(self.figures))

    def _count(self, events: Any) -> None:
        on_gpu = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
        ranges = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
        busy_ms = measure.covered(ranges) / 1e3 / self.traced
        self.figures["gpu_busy"] = busy_ms / self.figures["step_ms"]
        self.figures["kernels"] = len(on_gpu) / self.traced
        launched = sum(e.name == "cudaGraphLaunch" for e in events)
        self.figures["graphs"] = launched / self.traced
        sends = [e for e in on_gpu if "nccl" in e.name.lower()]
        self.figures["communication_ms"] = sum(e.device_time for e in sends) / 1e3 / self.traced
        others = sorted((e.time_range.start, e.time_range.end) for e in on_gpu if e not in sends)
        hidden = busy_ms - measure.covered(others) / 1e3 / self.traced
        self.figures["communication_alone_ms"] = hidden
