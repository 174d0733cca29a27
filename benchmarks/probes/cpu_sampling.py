"""Sampling on a CPU with a cache and without: seconds, and whether they grow with the tokens alone.

    OMP_NUM_THREADS=1 python -m benchmarks.probes.cpu_sampling

`nsa_tiny` as it ships, at its own context of 256 tokens, its weights as drawn. Both ways sample the
same number of tokens in turns of 50, so that both meet the same other work of the machine; seconds
are CPU seconds of the process, and seconds by the clock. Then the cache alone, in a context that
holds all tokens.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch

from benchmarks.train_step import model_options
from nsa.transformer import Transformer

TURN = 50  # tokens


class Seconds(NamedTuple):
    cpu: float = 0.0
    clock: float = 0.0


def build(seq_len: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**model_options("tiny", "nsa", "auto", seq_len)["model"]).eval()


def tokens(model: Transformer, number: int, *, use_cache_kv: bool) -> Iterator[torch.Tensor]:
    """So many new tokens after a prompt of one, drawn as `generate.py` does."""
    prompt = torch.zeros(1, 1, dtype=torch.long)
    return model.stream(prompt, 1 + number, use_cache_kv=use_cache_kv, seed=0)


def timed(stream: Iterator[torch.Tensor], number: int) -> Seconds:
    cpu, clock = time.process_time(), time.perf_counter()
    for _ in islice(stream, number):
        pass
    return Seconds(time.process_time() - cpu, time.perf_counter() - clock)


def both_ways(number: int) -> dict[str, Seconds]:
    """Seconds of `number` tokens with a cache and without, in turns."""
    model = build(256)
    streams = {
        how: tokens(model, number, use_cache_kv=how == "cached") for how in ("cached", "uncached")
    }
    spent = dict.fromkeys(streams, Seconds())
    for start in range(0, number, TURN):
        for how, stream in streams.items():
            more = timed(stream, min(TURN, number - start))
            spent[how] = Seconds(*(a + b for a, b in zip(spent[how], more, strict=True)))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000, help="that both ways sample")
    parser.add_argument("--lengths", type=int, nargs="*", default=[500, 1000, 2000, 4000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    timed(tokens(build(256), 300, use_cache_kv=True), 300)  # warm up
    for _ in range(options.repeats):
        spent = both_ways(options.tokens)
        ratio = spent["uncached"].cpu / spent["cached"].cpu
        shown = ", ".join(f"{how} {s.cpu:.1f} ({s.clock:.1f})" for how, s in spent.items())
        print(f"{options.tokens} tokens, CPU s (by the clock): {shown}: {ratio:.1f} x", flush=True)
    for _ in range(options.repeats):
        for number in options.lengths:
            s = timed(tokens(build(1 + number), number, use_cache_kv=True), number)
            print(
                f"{number} tokens in one context: {s.cpu:.2f} ({s.clock:.2f}), "
                f"{1e3 * s.cpu / number:.2f} ms a token", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
