"""What is drawn, with a cache and without, for prompts of any lengths."""

import math

import pytest
import torch
from test_transformer import transformer

from nsa.sampling import ENDED, Draw

V = 61


def model(**options):
    built = transformer("nsa", "window", "dense", depth=3, **options).double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for x in built.parameters():
            x.add_(torch.randn_like(x) * 0.1)
    return built


@pytest.mark.parametrize("seq_len", [64, 16])
def test_the_cache_changes_nothing(seq_len: int) -> None:
    """Also where the context fills up, at 16 tokens, and prompts have their own lengths."""
    lm = model(seq_len=seq_len)
    prompts = [torch.randint(V, (n,)) for n in (1, 5, 14, 20)]
    options = dict(seq_len=50, seed=4, repetition_penalty=1.3)
    cached = lm.sample(prompts, **options)
    assert torch.equal(cached, lm.sample(prompts, use_cache_kv=False, **options))
    alone = lm.sample(prompts[1][None], seq_len=35, temperature=0.0)
    among = lm.sample(prompts, seq_len=50, temperature=0.0)
    assert torch.equal(alone[0], among[1])


def test_the_seed_decides_and_leaves_torchs_numbers_alone() -> None:
    lm, prompt = model(), torch.zeros(1, 1, dtype=torch.long)
    state = torch.get_rng_state()
    draws = [lm.sample(prompt, 20, filter_thres=0.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.get_rng_state())


def test_stop_tokens_end_a_sequence_and_then_the_stream() -> None:
    lm, prompts = model(), torch.arange(2)[:, None]
    free = lm.sample(prompts, 30, temperature=0.0)
    stop = int(free[0, 4])
    got = lm.sample(prompts, 30, temperature=0.0, stop_tokens=[stop])
    for row, whole in zip(got, free, strict=True):
        end = whole.tolist().index(stop) + 1 if stop in whole else len(whole)
        assert torch.equal(row[:end], whole[: min(end, len(row))])
        assert (row[end:] == ENDED).all()


def test_tokens_come_one_by_one() -> None:
    lm = model()
    lm.train()
    stream = lm.stream(torch.zeros(2, 3, dtype=torch.long), 8, temperature=0.0)
    assert next(stream).shape == (2,)
    assert len(list(stream)) == 4
    assert lm.training


LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        (dict(), {0, 1, 2, 3}),
        (dict(top_k=2), {0, 1}),
        (dict(top_p=0.6), {0, 1}),
        (dict(top_p=0.0), {0}),
        (dict(min_p=0.25), {0, 1, 2}),
        (dict(filter_thres=0.5), {0, 1}),
        (dict(temperature=1e-3), {0}),
        (dict(temperature=0.0), {0}),
        (dict(top_k=3, min_p=0.5), {0, 1}),
    ],
)
def test_each_filter_bounds_what_is_drawn(options: dict, drawn: set) -> None:
    draw = Draw(**({"filter_thres": 0.0} | options))
    assert set(draw(LOGITS).flatten().tolist()) == drawn


def test_frequencies_are_the_probabilities() -> None:
    drawn = Draw(filter_thres=0.0)(LOGITS.repeat(50, 1)).flatten()
    share = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(
        share, LOGITS[0].exp(), atol=4 * math.sqrt(0.25 / len(drawn)), rtol=0
    )


def test_the_penalty_lowers_what_was_seen() -> None:
    seen = torch.tensor([[True, False, False, False]])
    logits = torch.tensor([[2.0, 1.5, -1.0, -2.0]])
    assert Draw(temperature=0.0, repetition_penalty=1.5)(logits, seen).item() == 1
    assert Draw(temperature=0.0)(logits, seen).item() == 0
    negative = torch.tensor([[-1.0, -1.5, -3.0, -4.0]])
    assert Draw(temperature=0.0, repetition_penalty=2.0)(negative, seen).item() == 1


@pytest.mark.parametrize(
    "option",
    [dict(top_k=0), dict(top_p=1.5), dict(min_p=-0.1), dict(repetition_penalty=0.0)],
)
def test_values_out_of_range_are_refused(option: dict) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Draw(**option)
