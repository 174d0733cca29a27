"""Is what goes on from a checkpoint still the run that wrote it, and what has changed about it?"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from nsa.attention import SparseAttention
from nsa.training.importance_loss import ImportanceLoss
from nsa.transformer import Transformer
from runs.checkpoints import corpus_of

FREE = {"model.name", "model.dropout", "model.attention.backend"}  # may change at any time
KEPT = ("model", "optimizer", "importance_loss", "sparsity_schedule")
UNPACKED = {"pack": "stream", "document_alignment": 1}  # of checkpoints that do not say
CORPUS = ("corpus", "train_tokens", "tokenizer")  # of the order of samples: what it is made of


def check_same_run(
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
    sample_order: Mapping[str, Any],
    *,
    allow_other_corpus: bool = False,
) -> None:
    """A resumed run keeps its model, its losses, its optimizer and its order of samples, or is
    refused.

    With another order it would see some samples twice and others never; on another corpus, or
    with another tokenizer, it would be another run, which `allow_other_corpus` says is meant.

    Raises:
        ValueError: naming every value that differs.
    """
    stored = checkpoint["hyper_parameters"]
    before = dict(flatten({part: stored[part] for part in KEPT if part in stored}, ""))
    now = dict(flatten({part: settings[part] for part in KEPT if part in settings}, ""))
    # An option that did not exist yet was as it is by default.
    before = {k: defaults().get(k) for k in now if k not in before} | before
    changed = [k for k in before | now if k not in FREE and before.get(k) != now.get(k)]
    order = corpus_of(checkpoint).get("sample_order", {})
    order = UNPACKED | order if order else order
    free = CORPUS if allow_other_corpus else ()
    other = [name for name in order if name not in free and order[name] != sample_order.get(name)]
    if not changed and not other:
        return
    lines = [f"  {k}={now.get(k)}, the checkpoint has {before.get(k)}" for k in changed]
    lines += [f"  {k}={sample_order.get(k)}, the checkpoint has {order[k]}" for k in other]
    head = "a resumed run keeps its model, optimizer, corpus and order of samples:"
    if set(other) & set(CORPUS):
        lines.append("to go on with these samples all the same: allow_other_corpus=true")
    raise ValueError("\n".join([head, *lines]))


@cache
def defaults() -> dict[str, Any]:
    """What options are where nothing is said, by dotted path."""
    places = (
        ("model", Transformer),
        ("model.attention", SparseAttention),
        ("importance_loss", ImportanceLoss),
    )
    return {
        f"{prefix}.{name}": parameter.default
        for prefix, kind in places
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is not parameter.empty
    }


def flatten(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """The leaves of nested dicts, each with its dotted path."""
    leaves = []
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        leaves += flatten(value, path) if isinstance(value, Mapping) else [(path, value)]
    return leaves
