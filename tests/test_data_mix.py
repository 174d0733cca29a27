"""Mixtures: shares, exact for any number of samples, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_modules import SIZES, attach, cache, ready, windows_by_step  # noqa: F401 (a fixture)
from torch import Tensor

from data.mix import MixDataModule
from data.mixture import PERIOD, Schedule, quotas
from nsa.training.label_sums import LabelSums
from nsa.training.scores import corpus_scores, totals


def corpus(path: str, **options: Any) -> dict[str, Any]:
    """As a config of conf/data has it."""
    config = {"_target_": "data.datamodule.TextDataModule", "name": "text", "paths": path}
    return config | SIZES | {"pack": "stream", "tokenizer": "bytes"} | options


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A corpus of small letters, and one of capitals that is a third as long."""
    (tmp_path / "small.txt").write_bytes(bytes(range(97, 123)) * 90)
    (tmp_path / "large.txt").write_bytes(bytes(range(65, 91)) * 30)
    return {"small": corpus("small.txt"), "large": corpus("large.txt")}


def mixture(corpora: dict[str, Any], **options: Any) -> Any:
    return MixDataModule(**{"name": "mix", "corpora": corpora} | SIZES | options)


def test_a_period_has_each_corpus_as_often_as_its_share() -> None:
    schedule = Schedule([7000, 2999, 1], seed=3)
    for period in (0, 5):
        places = [schedule.place(period * PERIOD + i) for i in range(PERIOD)]
        assert Counter(corpus for corpus, _ in places) == {0: 7000, 1: 2999, 2: 1}
        for number, quota in enumerate((7000, 2999, 1)):
            own = sorted(sample for corpus, sample in places if corpus == number)
            assert own == list(range(period * quota, (period + 1) * quota))
    early = Counter(schedule.place(i)[0] for i in range(500))
    assert 300 < early[0] < 400 and early[1] > 100  # mixed, not one after the other
    assert schedule.place(17) != Schedule([7000, 2999, 1], seed=4).place(17)


def test_what_each_corpus_has_of_the_first_samples_is_counted() -> None:
    schedule = Schedule([7000, 2999, 1], seed=3)
    for samples in (0, 1, 700, 10_000, 12_345):
        places = Counter(schedule.place(sample)[0] for sample in range(samples))
        assert schedule.drawn(samples) == [places[corpus] for corpus in range(3)]


def test_shares_are_rounded_to_whole_samples() -> None:
    assert quotas({"a": 1, "b": 1, "c": 1}) == {"a": 3334, "b": 3333, "c": 3333}
    assert quotas({"a": 0.3, "b": 0.9}) == {"a": 2500, "b": 7500}
    with pytest.raises(ValueError, match=r"data\.weights: b=1 is less than one sample in 10,000"):
        quotas({"a": 1_000_000, "b": 1})
    with pytest.raises(ValueError, match=r"data\.weights: b=-1 must be above 0"):
        quotas({"a": 1, "b": -1})


@pytest.mark.parametrize("layout", [(4, 2, 1), (2, 2, 2)])
def test_a_step_is_the_same_on_any_layout(corpora: Any, layout: tuple[int, int, int]) -> None:
    def make(micro: int) -> Any:
        return ready(mixture(corpora, micro_batch_size=micro))

    def check(batch: dict[str, Tensor]) -> None:
        is_large = (batch["tokens"] < 97).all(dim=1)
        assert (batch["corpus"] == is_large.long()).all()

    whole = windows_by_step(make, (8, 1, 1), check)
    assert windows_by_step(make, layout, check) == whole


def test_weights_are_by_tokens_where_none_are_given(corpora: Any) -> None:
    assert ready(mixture(corpora)).quotas == {"small": 7500, "large": 2500}
    assert ready(mixture(corpora, weights={"small": 1, "large": 4})).quotas["large"] == 8000


def test_validation_goes_through_each_corpus_once(corpora: Any) -> None:
    module = ready(mixture(corpora, micro_batch_size=3))
    attach(module)
    seen: dict[int, int] = Counter()
    for batch in module.val_dataloader():
        for corpus, tokens in zip(batch["corpus"].tolist(), batch["tokens"], strict=True):
            seen[corpus] += int((tokens[1:] >= 0).sum())
    sizes = [len(each.splits["val"]) for each in module.corpora.values()]
    assert seen == {0: sizes[0] - 1, 1: sizes[1] - 1}


def test_epochs_of_each_are_counted(corpora: Any) -> None:
    module = ready(mixture(corpora, weights={"small": 1, "large": 1}))
    windows = [len(each.splits["train"]) // 16 for each in module.corpora.values()]
    epochs = module.epochs(1000)
    assert epochs == {"small": 500 / windows[0], "large": 500 / windows[1]}
    told = module.summary(1000)["corpus large"]
    assert told == f"50.00% of the samples, {500 / windows[1]:.3g} epochs"
    order = module.sample_order(1)
    assert order["quotas"] == module.quotas and order["corpus"]["small"]["tokenizer"] == "bytes"


def test_what_does_not_mix_is_refused(corpora: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.corpora is empty: name corpora"):
        mixture({})
    with pytest.raises(ValueError, match=r"data\.weights names small, data\.corpora small, large"):
        mixture(corpora, weights={"small": 1})
    with pytest.raises(ValueError, match=r"data\.corpora\.val: call it something else"):
        mixture({"val": corpora["small"]})
    learned = corpora["small"] | {"tokenizer": "train", "vocab_size": 300}
    sizes = {"vocab_size": 300, "corpora": {"bytes": corpora["small"], "learned": learned}}
    with pytest.raises(ValueError, match=r"data\.corpora\.bytes: data\.vocab_size=300 must be"):
        MixDataModule(**{"name": "mix"} | SIZES | sizes)
    with pytest.raises(
        ValueError, match=r"data\.tokenizer=train learns from each .* give data\.wei"
    ):
        mixture(corpora, tokenizer="train", vocab_size=280)


def test_a_corpus_that_is_refused_is_named(corpora: Any, tmp_path: Path) -> None:
    (tmp_path / "little.txt").write_text("a few words")
    little = corpus("little.txt")
    with pytest.raises(ValueError, match=r"^data\.corpora\.little: data=\w+: the \w+ split has"):
        ready(mixture({"large": corpora["large"], "little": little}))


def test_corpora_must_share_a_tokenizer(corpora: Any, cache: Path) -> None:  # noqa: F811
    learned = {name: config | {"tokenizer": "train"} for name, config in corpora.items()}
    with pytest.raises(ValueError, match="large and small are split into different tokens: give"):
        ready(mixture(learned, vocab_size=280, seq_len=4))
    first, *_ = sorted(cache.glob("text-*/tokenizer.json"))
    module = ready(mixture(learned, vocab_size=280, seq_len=4, tokenizer=str(first)))
    assert module.decode(module.encode("abc")) == "abc"


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_a_tokenizer_is_trained_on_all_corpora_by_their_weights(
    tmp_path: Path, monkeypatch: Any, pack: str
) -> None:
    """Words of either corpus are tokens; of few characters, the heavier one gives more."""
    monkeypatch.setattr("data.shared_tokenizer.TRAINING_CHARACTERS", 2000)
    for number in range(20):
        (tmp_path / f"small{number}.txt").write_text("attention selects " * 20)
        (tmp_path / f"large{number}.txt").write_text("ATTENTION SELECTS " * 20)
    corpora = {name: corpus(f"{name}*.txt", pack=pack) for name in ("small", "large")}
    sizes = {"vocab_size": 264, "tokenizer": "train", "pack": pack, "seq_len": 8}
    found = {}
    for name, weights in (
        ("small", {"small": 99, "large": 1}),
        ("large", {"small": 1, "large": 99}),
    ):
        module = ready(mixture(corpora, weights=weights, **sizes))
        assert all(c.tokenizer.state() == module.tokenizer.state() for c in module.corpora.values())
        found[name] = [len(module.encode(text)) for text in ("attention", "ATTENTION")]
        assert module.decode(module.encode("attention ATTENTION")) == "attention ATTENTION"
    assert found["small"][0] < found["small"][1] and found["large"][0] > found["large"][1]
    again = ready(mixture(corpora, weights={"small": 1, "large": 99}, **sizes))
    assert again.tokenizer.state() == module.tokenizer.state()
    assert len([*(tmp_path / "cache").glob("tokenizer-*/tokenizer.json")]) == 2


class Corpus:
    def bytes_per_token(self, split: str) -> float:
        return {"train": 1.0, "val": 2.0}[split]


def test_losses_are_of_the_rows_of_each_corpus() -> None:
    rows = torch.tensor([[6.0, 2.0], [3.0, 3.0], [0.0, 0.0], [4.0, 2.0]])
    sums = LabelSums(rows[:, 0].sum(), rows[:, 1].sum(), None, rows)
    found = totals(sums, torch.tensor([2, 0, 1, 2]), 3)
    assert found.tolist() == [13.0, 7.0, 3.0, 3.0, 0.0, 0.0, 10.0, 4.0]
    data: Any = MixDataModule
    data = type("Data", (), {"corpora": dict.fromkeys("abc", Corpus()), "metric": data.metric})
    scores = corpus_scores("val", found[2:], data)
    assert scores["val/a/loss"] == 1.0 and scores["val/c/loss"] == 2.5
    assert scores["val/c/bpb"] == pytest.approx(2.5 / 0.693147 / 2)
    assert not any("/b/" in name for name in scores)  # nothing of it was scored
