"""A window of documents as the loader gives it: the loss of one, whatever its neighbours hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_modules import cache, ready  # noqa: F401 (a fixture)
from test_data_packing import of_rows
from test_packed_runs import write_rows
from test_train import ATTENTION, MODEL, make_module
from torch import Tensor

from nsa.training.label_sums import label_sums

LAYERS = {"nsa": ["nsa"], "dense": ["dense"], "window": ["window"]}
LAYERS["all"] = ["nsa", "dense", "window"]
CASES = [
    *[(name, "torch", "plain") for name in LAYERS],
    *[("all", "torch", "chunked"), ("nsa", "reference", "plain"), ("window", "reference", "plain")],
    *[("nsa", "triton", "plain"), ("window", "triton", "plain")],
]


@pytest.fixture
def batch(tmp_path: Path) -> dict[str, Tensor]:
    """The window of the most documents."""
    write_rows(tmp_path / "rows.jsonl", "squared")
    windows = ready(of_rows(seq_len=64))._eval_windows("train")
    found = [windows[i] for i in range(len(windows))]
    window = max(found, key=lambda each: len(each["document_starts"].unique()))
    return {name: x[None] for name, x in window.items()}


def model_of(layers: str, backend: str) -> Any:
    options = {"layer_pattern": LAYERS[layers], "depth": len(LAYERS[layers]), "vocab_size": 256}
    options |= {"seq_len": 64, "dim_head": 16, "heads": 1}
    options["attention"] = ATTENTION | {"selection_block_size": 8, "backend": backend}
    model = make_module(model=MODEL | options).model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.float() if backend == "triton" else model.double()


@pytest.mark.parametrize(("layers", "backend", "cross_entropy"), CASES)
def test_no_document_sees_its_neighbours(
    batch: dict[str, Tensor], layers: str, backend: str, cross_entropy: str
) -> None:
    """Neither its loss nor a gradient of that changes with other tokens around it."""
    if backend == "triton":
        pytest.importorskip("triton")
    model, starts = model_of(layers, backend), batch["document_starts"]
    second = starts.unique()[1]
    places = starts == second
    others = torch.where(places, batch["tokens"][:, :-1], torch.randint_like(starts, 1, 256))
    perturbed = torch.cat([others, batch["tokens"][:, -1:]], dim=1)

    def learned(tokens: Tensor, document_starts: Tensor | None) -> list[Tensor]:
        nats = label_sums(
            model, tokens, places & batch["scored"],
            document_starts=document_starts, cross_entropy=cross_entropy,
        ).nats  # fmt: skip
        leaves = [each for each in model.parameters() if each.requires_grad]
        return [nats, *torch.autograd.grad(nats, leaves, allow_unused=True)]

    labels = batch["tokens"][:, 1:][places & batch["scored"]]
    assert torch.equal(labels, perturbed[:, 1:][places & batch["scored"]])
    before, after = (learned(tokens, starts) for tokens in (batch["tokens"], perturbed))
    for got, want in zip(after, before, strict=True):
        if want is not None:
            exact = 1e-5 if backend == "triton" else 1e-9
            torch.testing.assert_close(got, want, atol=exact, rtol=exact)
    if backend != "triton":
        mixed = [learned(tokens, None)[0] for tokens in (batch["tokens"], perturbed)]
        assert abs(mixed[0] - mixed[1]) > 0.1, "without borders they do"
