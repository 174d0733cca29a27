"""How much faster more GPUs are: presets through train.py on 1, 2, 4 and 8 GPUs of this machine.

    python -m benchmarks.scaling --minutes 30

Weak scaling: every GPU has the sequences that one has alone. Strong: they share those of one step.
Rows go to results.csv (suite `scaling`). A table and docs/bench_scaling.png show tokens/s over
those of so many single GPUs, and how long a step communicates, of that with nothing else at work.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks import measure, presets
from benchmarks.presets import Job

COUNTS = (1, 2, 4, 8)
SIZES = {  # preset, tokens of a sequence: sequences a GPU, and a step that GPUs share
    ("nsa_medium", 8192): (8, 16),
    ("nsa_medium", 65_536): (1, 8),
    ("nsa_large", 8192): (4, 16),
    ("nsa_large", 65_536): (1, 8),
}
WAYS = ("weak", "strong")
STEPS = 24
BARS = {(4, "ddp"): 0.93, (8, "ddp"): 0.88, (4, "fsdp"): 0.85, (8, "fsdp"): 0.85}  # weak
PICTURE = Path(__file__).parents[1] / "docs" / "bench_scaling.png"


class Point(NamedTuple):
    """One run: which job, weak or strong, how many GPUs, and how they work together."""

    job: Job
    kind: str
    strategy: str
    gpus: int


def points(available: int, options: argparse.Namespace) -> list[Point]:
    """The runs, a single GPU first, so that an early stop leaves what can be compared."""
    found = []
    ways: Sequence[str] = options.scaling
    for (name, tokens), kind in product(SIZES, ways):
        if name not in options.presets or tokens not in options.tokens:
            continue
        each, shared = SIZES[name, tokens]
        for gpus in (count for count in COUNTS if count <= available):
            sequences = each * gpus if kind == "weak" else shared
            words = (f"model={name}", f"model.seq_len={tokens}")
            words += (f"batch.sequences_per_step={sequences}",)
            words += (f"trainer.devices={gpus}",) if gpus > 1 else ()
            job = Job(name, tokens, sequences, STEPS, words)
            how = ("one",) if gpus == 1 else options.strategies
            found += [Point(job, kind, strategy, gpus) for strategy in how]
    return found


def efficiencies(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Of each row: its tokens/s over those of so many single GPUs; None where either failed."""
    alone = {key(row): speed(row) for row in rows if gpus_of(row) == 1}
    found = []
    for row in rows:
        one, together = alone.get(key(row)), speed(row)
        found.append(together / one / gpus_of(row) if one and together else None)
    return found


def key(row: Mapping[str, Any]) -> tuple[str, int, str]:
    """What rows must share to be compared: preset, tokens, weak or strong."""
    return row["op"], int(row["tokens"]), row["sizes"]


def speed(row: Mapping[str, Any]) -> float | None:
    return float(row["tokens_per_second"]) if row.get("tokens_per_second") else None


def gpus_of(row: Mapping[str, Any]) -> int:
    """`ddp x 4` has four."""
    return int(row["backend"].rpartition(" x ")[2]) if " x " in row["backend"] else 1


def table(rows: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]]) -> str:
    """A line a run, in Markdown."""
    lines = [
        "| preset, tokens | | GPUs | tokens/s | of linear | MFU | GiB | communicates, alone, ms |"
    ]
    lines.append("|" + "---|" * 8)
    for row, figure, share in zip(rows, figures, efficiencies(rows), strict=True):
        where = f"| {row['op']}, {int(row['tokens']):,} | {row['sizes']} | {row['backend']} "
        tokens_per_second = speed(row)
        if tokens_per_second is None:
            lines.append(f"{where}| {row['status']} | | | | |")
            continue
        strategy, _, _ = row["backend"].partition(" x ")
        bar = BARS.get((gpus_of(row), strategy)) if row["sizes"] == "weak" else None
        linear = "" if share is None else f"{share:.3f}" + (f" (bar {bar})" if bar else "")
        lines.append(
            f"{where}| {tokens_per_second:,.0f} | {linear} | {row.get('mfu') or 0:.3f} "
            f"| {row.get('peak_mib', 0) / 1024:.1f} | {figure.get('communication_ms', 0):.1f}, "
            f"{figure.get('communication_alone_ms', 0):.1f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens/s over those of so many single GPUs, against the number of GPUs."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row, share in zip(rows, efficiencies(rows), strict=True):
        if share is None or gpus_of(row) == 1:
            continue
        name = f"{row['op']}, {int(row['tokens']):,} tokens, {row['sizes']}"
        strategy = row["backend"].partition(" x ")[0]
        lines.setdefault((name, strategy), [(1, 1.0)]).append((gpus_of(row), share))
    names = list(dict.fromkeys(name for name, _ in lines))
    if not names:
        return
    columns, lines_of = min(4, len(names)), -(-len(names) // 4)
    size = (4 * columns, 3.2 * lines_of)
    figure, axes = plt.subplots(lines_of, columns, figsize=size, squeeze=False, sharey=True)
    for name, ax in zip(names, axes.flat, strict=False):
        for (of, strategy), series in lines.items():
            if of == name:
                ax.plot(*zip(*sorted(series), strict=True), marker="o", label=strategy)
        ax.set(title=name, xlabel="GPUs", xscale="log", ylim=(0, 1.1))
        ax.set_xticks(COUNTS, COUNTS)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    axes[0, 0].set_ylabel("speed over linear")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(dict.fromkeys(name for name, _ in SIZES))
    lengths = list(dict.fromkeys(tokens for _, tokens in SIZES))
    parser.add_argument("--presets", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", type=int, nargs="+", choices=lengths, default=lengths)
    parser.add_argument("--scaling", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--strategies", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"])
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it")
    parser.add_argument("--job-seconds", type=float, default=150.0, help="for one run")
    parser.add_argument("--override", nargs="*", default=[], help="more words for train.py")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    gpus = torch.cuda.device_count()
    if gpus < 2:
        sys.exit(f"scaling needs at least two GPUs, and this machine has {gpus}")
    stop = time.time() + 60 * options.minutes
    words = " ".join(["python -m benchmarks.scaling", *sys.argv[1:]])
    context = measure.environment(
        torch.device("cuda"), date=measure.now(), command=words, commit=options.commit
    )
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    presets.write_text(folder)
    rows, figures = [], []
    for point in points(gpus, options):
        left = stop - time.time()
        if left < 20:
            print(f"no time left for {point}", flush=True)
            continue
        figures.append(presets.take(point.job, point.strategy, folder, options, left))
        row = presets.row_of(point.job, point.strategy, figures[-1], point.gpus)
        rows.append(row | {"suite": "scaling", "sizes": point.kind})
        measure.append(options.out, rows[-1] | context)
        print(table(rows[-1:], figures[-1:]).splitlines()[-1], flush=True)
    print(f"\n{context['device']}, torch {context['torch']}, commit {context['commit']}\n")
    print(table(rows, figures))
    draw(rows, options.picture)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
