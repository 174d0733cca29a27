"""Speed and memory of a training step: `python -m benchmarks.train_step --help`.

The twins nsa, dense and window of conf/model, by length at a constant number of tokens a step, on
each backend: as it is, `compiled` (block by block, as train.py does with compile=true), or compiled
and replayed as CUDA `graphs` (compile=reduce-overhead). `example` is the model that
native-sparse-attention-pytorch trains in its own example: 8192 tokens a step. `--vocab` gives a
model another vocabulary than bytes; large ones have the chunked loss, as in train.py.

A step is forward, backward, clipping and a fused AdamW, in bf16 autocast on a GPU. `gpu_busy` is
the share of it in which the GPU works; the rest waits for the host. Rows go to results.csv.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from benchmarks import measure, workers
from benchmarks.workers import Assignment, Job, Row, Unavailable, attempt
from callbacks.throughput import peak_flops_of
from nsa.attention import SparseAttention, WindowAttention
from nsa.backends import BACKENDS, resolve_backend
from nsa.training import cuda_graphs, parallel
from nsa.training.label_sums import AUTO, label_sums, resolve_cross_entropy
from nsa.training.optimizers import build_optimizer
from nsa.transformer import Transformer

MODULE = "benchmarks.train_step"
CONF = Path(__file__).parents[1] / "conf"
KINDS = ("nsa", "dense", "window")
EXAMPLE_TOKENS = 8192  # a step
EXAMPLE_LENGTHS = (8192, 512)
EXAMPLE = (  # what differs from nsa_small
    "model.depth=6",
    "model.kv_heads=4",
    "attention.sliding_window_size=64",
    "attention.compress_block_size=16",
    "attention.compress_block_sliding_stride=8",
    "attention.selection_block_size=16",
    "attention.num_selected_blocks=4",
)
COMPILE = {
    "compiled": True,
    "graphs": parallel.REPLAYED,
}  # how a job's name ends: train.py's option
BACKENDS_AT_MOST = {"reference": 4096, "torch": 4096}  # tokens: its memory grows with T x T


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = ("example", "large", "medium", "small", "tiny")
    powers = [2**n * 1024 for n in range(7)]
    best = resolve_backend("auto")
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=["example", "medium", "small"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=[best])
    parser.add_argument("--tokens", type=int, nargs="+", default=powers, help="of one sequence")
    parser.add_argument(
        "--compiled-tokens", type=int, nargs="*", default=[1024, 16384, 32768, 65536],
        help="of these also the compiled model, and CUDA graphs of it",
    )  # fmt: skip
    parser.add_argument("--vocab", type=int, default=256, help="tokens of vocabulary")
    parser.add_argument(
        "--tokens-per-step", type=int, default=65536,
        help="of all sizes but example; a longer sequence is a step alone",
    )  # fmt: skip
    parser.add_argument("--activation-checkpointing", choices=parallel.KEPT, default="none")
    parser.add_argument("--seconds", type=float, default=1.5, help="of repeating a step")
    parser.add_argument("--warm-seconds", type=float, default=150.0, help="compiling ahead; 0: not")
    workers.common_options(parser, minutes=8.5)
    return parser.parse_args(argv)


def jobs_of(size: str, options: argparse.Namespace) -> list[Job]:
    """The longest first: there the twins differ most."""
    lengths = EXAMPLE_LENGTHS if size == "example" else sorted(options.tokens, reverse=True)
    jobs = []
    for tokens in lengths:
        for kind in options.kinds:
            for backend in ["sdpa"] if kind == "dense" else options.backends:
                if tokens > BACKENDS_AT_MOST.get(backend, tokens):
                    continue
                jobs.append((f"{kind} {backend}", tokens))
                if size == "example" or tokens in options.compiled_tokens:
                    jobs += [(f"{kind} {backend} {how}", tokens) for how in ways(options)]
    return jobs


def ways(options: argparse.Namespace) -> list[str]:
    """Of `COMPILE`, those that the device has."""
    on_gpu = options.device.type == "cuda"
    return [how for how in COMPILE if on_gpu or COMPILE[how] != parallel.REPLAYED]


def model_options(
    size: str, kind: str, backend: str, tokens: int, vocab: int = 256
) -> dict[str, Any]:
    """The arguments of `Transformer`, as conf/ has them."""
    overrides = [f"model={kind}_{'small' if size == 'example' else size}"]
    overrides += EXAMPLE if size == "example" else ()
    overrides += [f"model.seq_len={tokens}", f"model.vocab_size={vocab}", "run_dir=."]
    if kind != "dense":
        overrides.append(f"attention.backend={backend}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    optimizer: Any = OmegaConf.to_container(cfg.optimizer, resolve=True)
    del model["name"], model["weights"]
    return {"model": model, "optimizer": optimizer}


def batch_size(size: str, tokens: int, options: argparse.Namespace) -> int:
    per_step = EXAMPLE_TOKENS if size == "example" else max(options.tokens_per_step, tokens)
    if per_step % tokens:
        raise Unavailable(f"{per_step} tokens a step are not whole sequences of {tokens}")
    return per_step // tokens


def columns(size: str, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """What is known of a row before it is measured."""
    kind, backend = job[0].split(maxsplit=1)
    name = f"{kind}_{size}" + (f" V{options.vocab}" if options.vocab != 256 else "")
    kept = options.activation_checkpointing
    return {
        "suite": "train_step",
        "op": name + (f" checkpointing {kept}" if kept != "none" else ""),
        "backend": backend,
        "tokens": job[1],
        "batch": batch_size(size, job[1], options),
        "dtype": "bf16 autocast" if options.device.type == "cuda" else "float32",
    }


class Step:
    """One step of training on random tokens, as `NSALightningModule` and its Trainer take it."""

    def __init__(
        self,
        model: Transformer,
        optimizer: dict[str, Any],
        batch: int,
        device: torch.device,
        replays_graphs: bool = False,
    ) -> None:
        self.model, self.device = model.to(device), device
        self.cross_entropy = resolve_cross_entropy(AUTO, model.head.out_features)
        self.optimizer = build_optimizer(optimizer, self.model)
        shape = (batch, model.seq_len + 1)
        self.tokens = torch.randint(model.embedding.num_embeddings, shape, device=device)
        self.gradients = cuda_graphs.GradientBuffer(self.model.parameters())
        self.gradients.zero()
        self.learn: cuda_graphs.Learn = self._learn
        if replays_graphs:
            self.learn = cuda_graphs.MicroBatchGraph(self._learn, {"tokens": self.tokens})

    def __call__(self) -> torch.Tensor:
        self.gradients.zero()
        loss = self.learn({"tokens": self.tokens})
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def _learn(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            sums = label_sums(self.model, batch["tokens"], cross_entropy=self.cross_entropy)
            loss = sums.nats / sums.labels
        loss.backward()
        return loss.detach()


def build(size: str, job: Job, options: argparse.Namespace, depth: int | None = None) -> Step:
    kind, backend, *how = job[0].split()
    torch.manual_seed(0)
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # here: a graph takes its memory when it is recorded
    built = model_options(size, kind, backend, job[1], options.vocab)
    with options.device:  # where its weights are drawn, too
        model = Transformer(**built["model"] | ({"depth": depth} if depth else {}))
    compile = COMPILE[how[0]] if how else False
    torch._dynamo.reset()  # each model and length is a program of its own; frees the last graphs
    parallel.checkpoint_activations(model, options.activation_checkpointing)
    parallel.compile_blocks(model, compile)
    graphs = compile == parallel.REPLAYED
    batch = batch_size(size, job[1], options)
    return Step(model, built["optimizer"], batch, options.device, graphs)


def measure_step(step: Step, seconds: float) -> Row:
    """Time, speed and memory of a step that is ready to be taken."""
    device, model = step.device, step.model
    batch, tokens = step.tokens.shape[0], step.tokens.shape[1] - 1
    step()  # allocates the optimizer's state
    step_ms = measure.milliseconds(step, device, seconds=seconds, most=50)
    per_second = 1e3 * batch * tokens / step_ms
    row = architecture(model) | {"step_ms": step_ms, "tokens_per_second": per_second}
    if device.type == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        row["gpu_busy"] = measure.busy_milliseconds(step) / step_ms
        peak = peak_flops_of(torch.cuda.get_device_name(device))
        if peak is not None:
            row["mfu"] = per_second * model.flops_per_token(tokens) / peak
    return row


def architecture(model: Transformer) -> dict[str, Any]:
    attention = model.blocks[0].attention
    row: dict[str, Any] = {
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "dim_head": attention.dim_head,
    }
    if isinstance(attention, SparseAttention):
        row["sizes"] = measure.sizes_of(attention.cfg)
    if isinstance(attention, WindowAttention):
        row["sizes"] = f"w{attention.cfg.sliding_window_size}"
    return row


def work(options: argparse.Namespace, told: Assignment) -> None:
    context = measure.environment(
        options.device, date=told.date, command=told.command, commit=options.commit
    )

    def run(job: Job) -> Row:
        known = columns(told.group, job, options)
        return known | attempt(
            lambda: measure_step(build(told.group, job, options), options.seconds)
        )

    def warm(job: Job) -> Row:
        """All layers share one program: one layer compiles it."""
        if job[0].split()[-1] not in COMPILE:
            raise Unavailable("is not compiled")
        return attempt(lambda: {"loss": build(told.group, job, options, depth=1)()})

    workers.work(
        told, jobs_of(told.group, options), warm if told.warm else run, context, options.out
    )


def main() -> None:
    options = parse()
    if options.worker:
        return work(options, options.worker)
    stop = time.time() + 60 * options.minutes
    jobs = {size: jobs_of(size, options) for size in options.sizes}
    names = [job[0].split()[-1] for size in jobs for job in jobs[size]]
    if options.warm_seconds and any(name in COMPILE for name in names):
        workers.warm_up(MODULE, [*jobs], min(options.warm_seconds, 0.35 * 60 * options.minutes))
    weights = {size: len(jobs[size]) * (3.0 if size == "medium" else 1.0) for size in jobs}
    workers.run_groups(
        MODULE, options, jobs, weights, lambda size, job: columns(size, job, options), stop
    )


if __name__ == "__main__":
    main()
