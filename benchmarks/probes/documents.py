"""What documents that share a row cost: `python -m benchmarks.probes.documents`.

    python -m benchmarks.probes.documents --heads 64/4 --tokens 65536 --mean 8192

The whole op, forward and backward, on the same tokens: as one document, without and with borders
told; as documents of equal lengths, in a batch and in one row; and as documents of random lengths
of that mean. `keys` is how many keys all queries read (eq. 6), `error` the largest difference from
the documents run in a batch, over the largest value.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.workloads import LAYOUTS, PAPER, Workload, nsa
from nsa.blocks import keys_per_query
from nsa.documents import document_starts


def equal_lengths(tokens: int, mean: int) -> list[int]:
    return [mean] * (tokens // mean)


def random_lengths(tokens: int, mean: int, seed: int = 0) -> list[int]:
    """As many documents as of equal lengths, cut at random multiples of l'."""
    block = PAPER.selection_block_size
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(tokens // block - 1, generator=generator)[: tokens // mean - 1] + 1
    cuts = torch.cat([torch.tensor([0]), cuts.sort().values * block, torch.tensor([tokens])])
    return cuts.diff().tolist()


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    borders = torch.tensor([0, *lengths], device=device).cumsum(0)
    return document_starts(borders[None], sum(lengths))


def keys_of(lengths: Sequence[int]) -> int:
    return sum(int(n.sum()) for length in lengths for n in keys_per_query(length, PAPER).values())


def measure_all(w: Workload, mean: int, seconds: float) -> None:
    tokens, device = w.tokens, w.device
    row = [w.gates, w.q, w.q_rot, *w.keys_and_values]
    batch = [x.view(-1, mean, *x.shape[2:]) for x in row]
    equal, random = equal_lengths(tokens, mean), random_lengths(tokens, mean)
    cases = {
        "one document": (row, None, [tokens]),
        "one document, told": (row, starts_of([tokens], device), [tokens]),
        "equal lengths, a batch": (batch, None, equal),
        "equal lengths, one row": (row, starts_of(equal, device), equal),
        "random lengths, one row": (row, starts_of(random, device), random),
    }
    print(f"random lengths: {random}")
    steps: dict[str, float] = {}
    for name, (inputs, starts, lengths) in cases.items():

        def op(*inputs: Tensor, starts: Tensor | None = starts) -> Tensor:
            return nsa(w, w.backend, inputs, document_starts=starts)

        times = measure.forward_and_backward(op, inputs, device, seconds)
        steps[name] = times["step_ms"]
        print(
            f"{name:24s} forward {times['forward_ms']:8.2f} ms  backward "
            f"{times['backward_ms']:8.2f} ms  step {times['step_ms']:8.2f} ms  "
            f"keys {keys_of(lengths):,}",
            flush=True,
        )
    alone, told, in_batch, in_row, at_random = steps.values()
    work = keys_of(random) / keys_of(equal)
    print(f"borders told of one document: {told / alone:.3f} x (at most 1.05)")
    print(f"equal lengths, row over batch: {in_row / in_batch:.3f} x (at most 1.10)")
    print(
        f"random lengths over the batch: {at_random / in_batch:.3f} x, for {work:.3f} x its keys: "
        f"{at_random / in_batch / work:.3f} x"
    )
    print(f"error: {difference(w, row, batch, starts_of(equal, device)):.1e}")


@torch.no_grad()
def difference(w: Workload, row: list[Tensor], batch: list[Tensor], starts: Tensor) -> float:
    """Of the outputs of one row and of a batch, over the largest value."""
    got = nsa(w, w.backend, row, document_starts=starts).double()
    want = nsa(w, w.backend, batch).double().view_as(got)
    return float((got - want).abs().max() / want.abs().max())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", nargs="+", choices=LAYOUTS, default=["64/4"])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--mean", type=int, default=8192, help="tokens of a document")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--seconds", type=float, default=0.5, help="of repeating, each direction")
    options = parser.parse_args(argv)
    block = PAPER.selection_block_size
    if options.mean % block or options.tokens % options.mean:
        parser.error(f"--mean must be a multiple of {block}, and --tokens one of --mean")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = measure.environment(device, date=measure.now(), command="")
    print(where["device"], where["torch"], where["triton"], where["commit"], where["date"])
    for name in options.heads:
        torch.manual_seed(0)
        print(f"{name}, {options.tokens} tokens, {measure.sizes_of(PAPER)}", flush=True)
        w = Workload(LAYOUTS[name], options.tokens, dtype, device, options.backend)
        measure_all(w, options.mean, options.seconds)


if __name__ == "__main__":
    main()
