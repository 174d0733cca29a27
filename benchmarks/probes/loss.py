"""Time and memory of the head and its cross-entropy, plain and chunked, forward and backward.

    python -m benchmarks.probes.loss --tokens 65536 --vocab 50000 --width 1024

Hidden states and weights are float32 and multiplied in bfloat16, as in training. Memory is the peak
above hidden states, weights and the gradients that come of them. First the chunked loss is checked
against the plain one, on fewer tokens, also replayed as a CUDA graph; exits with 1 where it errs.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from nsa.training.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LIMIT = 1.3  # times the error of the plain loss
CHECKED = 4096  # tokens


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels)[0]


LOSSES: dict[str, Loss] = {"plain": plain, "chunked": chunked}


def inputs(tokens: int, vocab: int, width: int) -> list[Tensor]:
    hidden = torch.randn(tokens, width, device="cuda").requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda") * 0.05).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    return [hidden, weight, labels.masked_fill(torch.rand(tokens, device="cuda") < 0.1, -1)]


def learn(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The mean loss and its gradients, in bf16-mixed."""
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        nats = loss(hidden, weight, labels) / (labels >= 0).sum()
    return nats.detach(), *torch.autograd.grad(nats, (hidden, weight))


def replayed(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What a CUDA graph of the chunked loss computes."""
    # New leaves: PyTorch runs a leaf's gradient on the stream that first used it.
    hidden, weight = (each.detach().requires_grad_() for each in (hidden, weight))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        learn(chunked, hidden, weight, labels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = learn(chunked, hidden, weight, labels)
    graph.replay()
    return found


def worst(given: list[Tensor]) -> float:
    """The largest error of the chunked loss and its gradients, in errors of the plain one."""
    hidden, weight, labels = given
    exact = plain(hidden.double(), weight.double(), labels) / (labels >= 0).sum()
    right = [exact.detach(), *torch.autograd.grad(exact, (hidden, weight))]
    usual = [(a - b).abs().max() for a, b in zip(learn(plain, *given), right, strict=True)]
    ratios = []
    for found in (learn(chunked, *given), replayed(*given)):
        errors = [(a - b).abs().max() for a, b in zip(found, right, strict=True)]
        ratios += [float(e / (u + 1e-6 * r.abs().max())) for e, u, r in zip(
            errors, usual, right, strict=True)]  # fmt: skip
    return max(ratios)


def peak_gib(loss: Loss, given: list[Tensor]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learn(loss, *given)
    after = sum(each.nbytes for each in given[:2])  # the gradients
    return (torch.cuda.max_memory_allocated() - before - after) / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option, default in (("--tokens", 65_536), ("--vocab", 50_000), ("--width", 1024)):
        parser.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    ratio = worst(inputs(min(CHECKED, args.tokens), args.vocab, args.width))
    print(f"largest error over that of the plain loss: {ratio:.2f}, at most {LIMIT}")
    given = inputs(args.tokens, args.vocab, args.width)
    for name, loss in LOSSES.items():
        try:
            time = measure.milliseconds(lambda loss=loss: learn(loss, *given), given[0].device)
            print(f"{name:8} {time:7.2f} ms  {peak_gib(loss, given):6.2f} GiB", flush=True)
        except torch.OutOfMemoryError:
            print(f"{name:8} out of memory", flush=True)
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
