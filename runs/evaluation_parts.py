"""The parts of an evaluation, each a function of a `Scorer` that gives what evaluate.json keeps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from data.metrics import ACCURACY
from data.tasks.datamodule import RecallDataModule
from nsa import blocks
from nsa.attention import SparseAttention
from runs.scorer import Scorer, SlidingWindows, Window, windows_of

BRANCHES = ("compressed", "selected", "sliding")
SELECTIONS = ("learned", "oracle", "random")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORTEST = 64  # tokens of a text with a passkey


# The parts


def bits_per_byte(scorer: Scorer) -> dict[str, Any]:
    """The whole split: windows side by side, and, over a single text, sliding by a stride.

    Sliding, each label but those of the first window sees at least window - stride tokens before
    it. Every token but the first is a label exactly once, both ways; of packed documents, every
    token but the first of each.
    """
    found = {"side_by_side": {"window": scorer.window, "stride": scorer.window} | beside(scorer)}
    if scorer.slides:
        stride = scorer.options.stride or max(1, scorer.window // 2)
        found["sliding"] = {"window": scorer.window, "stride": stride} | sliding(scorer, stride)
    return found


def beside(scorer: Scorer) -> dict[str, Any]:
    """All windows side by side; of a mixture, each corpus too."""
    name = scorer.metric.name
    totals = {
        each: scorer.totals(scorer.windows(corpus), each) for each, corpus in scorer.corpora.items()
    }
    nats, labels, correct = (sum(column) for column in zip(*totals.values(), strict=True))
    found = {"labels": int(labels), name: scorer.value(nats, labels, correct)}
    if len(totals) == 1:
        return found
    rows = {
        each: {"labels": int(of[1]), name: scorer.value(*of, scorer.corpora[each])}
        for each, of in totals.items()
        if of[1]
    }
    return found | {"corpora": rows}


def sliding(scorer: Scorer, stride: int) -> dict[str, Any]:
    windows: Any = SlidingWindows(scorer, stride)
    value = scorer.score(windows, "sliding")
    return {"labels": windows.num_tokens - 1, scorer.metric.name: value}


def by_position(scorer: Scorer) -> dict[str, Any]:
    """Windows side by side; labels that see 1, 2, 3 to 4, 5 to 8, … tokens of their document."""
    nats = torch.zeros(scorer.window, dtype=torch.float64)
    labels = torch.zeros(scorer.window, dtype=torch.float64)
    for each in scorer.batches(scorer.split(), "positions"):
        sums = scorer.sums(each)
        assert sums.of_each is not None and sums.scored is not None
        losses, scored = sums.of_each.cpu(), sums.scored.cpu()
        place = torch.arange(scorer.window).expand(losses.shape)
        if (starts := each.get("document_starts")) is not None:
            place = place - starts.cpu()
        nats.index_add_(0, place.flatten(), losses.double().flatten())
        labels.index_add_(0, place.flatten(), scored.double().flatten())
    rows = []
    ends = [0, 1]
    while ends[-1] < scorer.window:
        ends.append(min(2 * ends[-1], scorer.window))
    for begin, end in pairwise(ends):
        if count := int(labels[begin:end].sum()):
            value = scorer.value(float(nats[begin:end].sum()), count, 0)
            row = {"first": begin + 1, "last": end, "labels": count}
            rows.append(row | {scorer.metric.name: value})
    return {"rows": rows}


def knockouts(scorer: Scorer) -> dict[str, Any]:
    """Each branch without its say, in all layers (layer None) and in one layer at a time."""
    windows, name = scorer.sample(), scorer.metric.name
    whole = scorer.score(windows, "knockouts")
    rows = []
    for layer in (None, *scorer.layers):
        for branch in BRANCHES:
            chosen = [scorer.layers[layer]] if layer is not None else [*scorer.layers.values()]
            with gate_at_zero(chosen, BRANCHES.index(branch)):
                value = scorer.score(windows, f"without {branch}")
            row = {"layer": layer, "branch": branch, name: value, "change": value - whole}
            rows.append(row)
    return {"windows": len(windows), name: whole, "rows": rows}


@contextmanager
def gate_at_zero(layers: list[SparseAttention], branch: int) -> Iterator[None]:
    """Layers whose gates of one branch are exactly 0."""

    def silence(module: torch.nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        silent = logits.clone()
        silent[..., branch :: len(BRANCHES)] = float("-inf")
        return silent

    handles = [layer.to_gates.register_forward_hook(silence) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def selection(scorer: Scorer) -> dict[str, Any]:
    """All NSA layers with another n, their blocks chosen by scores, by an oracle, by chance.

    The oracle keeps the blocks that hold most of dense attention's mass; it scores every query
    against every key, one sequence at a time.
    """
    windows, name = scorer.sample(), scorer.metric.name
    rows = []
    for n in scorer.options.n or numbers_to_try(scorer):
        for control in SELECTIONS:
            with selecting(scorer.layers.values(), n, control):
                batch = 1 if control == "oracle" else None
                value = scorer.score(windows, f"n={n} {control}", batch)
            rows.append({"n": n, "selection": control, name: value})
    trained = sorted({layer.cfg.num_selected_blocks for layer in scorer.layers.values()})
    return {"windows": len(windows), "trained_n": trained, "rows": rows}


def numbers_to_try(scorer: Scorer) -> list[int]:
    """The forced blocks alone, half of training's n, n, and its doubles up to all blocks."""
    cfg = max((layer.cfg for layer in scorer.layers.values()), key=lambda c: c.num_selected_blocks)
    every = blocks.num_selection_blocks(scorer.window, cfg)
    n = cfg.num_selected_blocks
    tried = {cfg.num_initial_blocks + cfg.num_local_blocks, n // 2, n, every}
    while n < every:
        tried.add(n)
        n *= 2
    return sorted(count for count in tried if 0 < count <= every)


@contextmanager
def selecting(layers: Any, n: int, control: str) -> Iterator[None]:
    """Layers that select with another n, and by a control of `nsa.selection`."""
    before = [(layer, layer.cfg, layer.selection) for layer in layers]
    try:
        for layer, cfg, _ in before:
            if cfg.num_selected_blocks:
                layer.cfg, layer.selection = replace(cfg, num_selected_blocks=n), control
        yield
    finally:
        for layer, cfg, was in before:
            layer.cfg, layer.selection = cfg, was


def passkey(scorer: Scorer) -> dict[str, Any]:
    """A number hidden in text at some depth: the share of its digits that the model finds likeliest
    when asked at the end, and of numbers that are right in every digit.
    """
    lengths = [scorer.window]
    while lengths[0] // 2 >= SHORTEST and len(lengths) < 5:
        lengths.insert(0, lengths[0] // 2)
    rows = []
    for length in lengths:
        for depth in DEPTHS:
            accuracy, whole = found(scorer, passkey_windows(length, depth, scorer.options.passkeys))
            rows.append({"length": length, "depth": depth, "accuracy": accuracy, "whole": whole})
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    return {"texts": scorer.options.passkeys, "accuracy": mean, "rows": rows}


def passkey_windows(length: int, depth: float, count: int) -> list[Window]:
    """Texts of the test split, each with its number."""
    task = RecallDataModule(
        name="passkey", task="passkey", seq_len=length, needle_depth=depth, micro_batch_size=1,
        vocab_size=256, num_facts=1, num_questions=1, facts_per_cluster=1, min_distance=0,
        block_size=16, offset=None, grow_samples=0, grow_from=1, val_sequences=1,
        test_sequences=count,
    )  # fmt: skip
    task.prepare_data()
    task.setup()
    windows = windows_of(task, "test")
    return [windows[number] for number in range(count)]


@torch.no_grad()
def found(scorer: Scorer, windows: Sequence[Window]) -> tuple[float, float]:
    """The share of asked labels that the model finds likeliest, and of windows without a miss."""
    right: list[Tensor] = []
    for each in scorer.batches(windows, f"{len(windows[0]['tokens']) - 1} tokens"):
        with scorer.autocast():
            logits = scorer.model(each["tokens"][:, :-1].clamp(min=0))
        hit = logits.argmax(-1) == each["tokens"][:, 1:]
        right += [row[asked].cpu() for row, asked in zip(hit, each["scored"], strict=True)]
    whole = [float(row.all()) for row in right]
    return torch.cat(right).float().mean().item(), sum(whole) / len(whole)


def recall(scorer: Scorer) -> dict[str, Any]:
    """Accuracy on the labels that the corpus asks for; of the task straddle, at each offset too."""
    task: Any = scorer.corpus
    windows, name = scorer.split(), ACCURACY.name
    accuracy, whole = found(scorer, windows)
    result = {"windows": len(windows), name: accuracy, "whole": whole}
    if task.task == "straddle":
        split = scorer.options.split
        result["offsets"] = [
            {"offset": at, name: found(scorer, windows_of(task.at_offset(at), split))[0]}
            for at in range(task.sizes.block_size)
        ]
    return result


PARTS: dict[str, Callable[[Scorer], dict[str, Any]]] = {
    "bpb": bits_per_byte,
    "positions": by_position,
    "knockouts": knockouts,
    "selection": selection,
    "passkey": passkey,
    "recall": recall,
}
