"""The chunked cross-entropy against the plain one: values, gradients, memory."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kernel_inputs import DEVICE
from test_train import Counting, make_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.kernels import cross_entropy
from nsa.training import linear_cross_entropy as chunked
from nsa.training.label_sums import label_sums, resolve_cross_entropy

N, M, V = 37, 16, 301  # rows that no chunk divides


@pytest.fixture(params=[7, 1 << 20], ids=["chunks of 7", "one chunk"])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", request.param * V * 8)
    yield request.param


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights, and labels of which some are not scored."""
    hidden = torch.randn(N, M, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, M, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.3, -1)
    labels[:7] = -1  # a whole chunk
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")


def with_gradients(nats: Tensor, *of: Tensor) -> list[Tensor]:
    return [nats.detach(), *torch.autograd.grad(nats * 0.37, of)]


@pytest.mark.usefixtures("rows_at_once")
def test_equals_the_plain_loss_in_float64() -> None:
    hidden, weight, labels = inputs(torch.float64)
    nats, _, correct = chunked.linear_cross_entropy(hidden, weight, labels, counts_correct=True)
    assert correct == ((hidden @ weight.T).argmax(-1) == labels).sum()
    got = with_gradients(nats, hidden, weight)
    want = with_gradients(plain(hidden, weight, labels), hidden, weight)
    for name, mine, theirs in zip(("nats", "hidden", "weight"), got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.usefixtures("rows_at_once")
def test_errs_no_more_than_plain_autocast_does() -> None:
    """bfloat16 products of float32 weights, as in training; the sum of the loss is float32."""
    hidden, weight, labels = inputs(torch.float32)
    exact = with_gradients(plain(hidden.double(), weight.double(), labels), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        mine = chunked.linear_cross_entropy(hidden, weight, labels)[0]
        logits = F.linear(hidden, weight).float()
        theirs = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    assert mine.dtype == torch.float32
    found = zip(
        with_gradients(mine, hidden, weight), with_gradients(theirs, hidden, weight), exact,
        strict=True,
    )  # fmt: skip
    for got, usual, want in found:
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 1.2 * (usual - want).abs().max() + 1e-6


def test_gradients_are_made_where_they_are_asked_for() -> None:
    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        nats, *_ = chunked.linear_cross_entropy(hidden, weight, labels)
    assert not nats.requires_grad
    torch.testing.assert_close(nats, plain(hidden, weight, labels).detach())


class Largest(TorchDispatchMode):
    """The most numbers that one result holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 7 * V * 4)
    hidden, weight, labels = inputs(torch.float32)
    with Largest() as largest:
        nats, *_ = chunked.linear_cross_entropy(hidden, weight, labels)
        nats.backward()
    assert largest.numbers == max(7 * V, V * M)


def test_a_large_head_stays_within_its_bound() -> None:
    """65,536 tokens, V 50,000, M 1024, bf16: what the loss holds besides its inputs, by count."""
    tokens, vocab, width = 65_536, 50_000, 1024
    parts = chunked.chunks(tokens, vocab * 2)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[0].start == 0 and parts[-1].stop >= tokens
    logits = max(part.stop - part.start for part in parts) * vocab * 2
    head = vocab * width * (2 + 4)  # its weights in bf16, their gradient in float32
    hidden = tokens * width * (2 + 2)  # in bf16, and their gradient
    assert logits + head + hidden < 1.5 * 2**30


@pytest.mark.parametrize("vocab", [1, 300, 5000])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_kernel(vocab: int, gradient: bool) -> None:
    logits = torch.randn(9, vocab, device=DEVICE) * 5
    labels = torch.randint(vocab, (9,), device=DEVICE)
    labels[3] = -1
    want = logits.cpu().clone()
    nats = chunked.cross_entropy_(want, labels.cpu(), gradient=gradient)
    got = cross_entropy.cross_entropy_(logits, labels, gradient=gradient)
    torch.testing.assert_close(got.cpu(), nats, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.cpu(), want, rtol=1e-5, atol=1e-6)


def test_a_model_learns_the_same_either_way() -> None:
    tokens = Counting.sequences(0, 2)
    tokens[1, 5:] = -1
    runs = []
    for name in ("plain", "chunked"):
        torch.manual_seed(0)
        model = make_module().model.double()
        sums = label_sums(model, tokens, counts_correct=True, cross_entropy=name)
        sums.nats.backward()
        runs.append([*sums, *(parameter.grad for parameter in model.parameters())])
    for plainly, in_chunks in zip(*runs, strict=True):
        torch.testing.assert_close(in_chunks, plainly, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_large_vocabularies_are_chunked_by_themselves() -> None:
    assert resolve_cross_entropy("auto", 256) == "plain"
    assert resolve_cross_entropy("auto", 32_768) == "chunked"
    assert resolve_cross_entropy("plain", 32_768) == "plain"
    with pytest.raises(ValueError, match="cross_entropy=half must be one of auto, plain, chunked"):
        make_module(cross_entropy="half")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_a_gpu_computes_it_in_little_memory() -> None:
    """Also replayed as a CUDA graph; gradients of hidden states in bfloat16 count as the loss's."""
    from benchmarks.probes import loss

    assert loss.worst(loss.inputs(4096, 50_000, 256)) < loss.LIMIT
    given = loss.inputs(65_536, 50_000, 1024)
    assert loss.peak_gib(loss.chunked, given) < 1.5
