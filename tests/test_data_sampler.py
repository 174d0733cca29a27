"""Every token is seen as often as it should be, whatever the ranks, batches and restarts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.permutation import mix, permuted
from data.sampler import (
    EvalBatches,
    EvalWindows,
    TrainBatches,
    TrainWindows,
    window_start,
)
from data.shards import ShardWriter, open_shards
from data.token_split import TokenSplit


def split_of(folder: Path, num_tokens: int) -> TokenSplit:
    """A split whose tokens are their own positions."""
    with ShardWriter(folder, vocab_size=1 << 20, source={}) as writer:
        writer.append("val", np.arange(num_tokens), num_tokens)
    return open_shards(folder)[1]["val"]


def samples(
    steps: range, micro: int = 1, accumulate: int = 1, world: int = 1
) -> list[tuple[int, ...]]:
    """The sample numbers of each step, over all ranks."""
    per_step: list[list[int]] = [[] for _ in steps]
    for rank in range(world):
        batches = TrainBatches(
            start_step=steps.start,
            num_steps=steps.stop,
            micro_batch_size=micro,
            accumulate=accumulate,
            rank=rank,
            world_size=world,
        )
        for i, batch in enumerate(batches):
            assert len(batch) == micro
            per_step[i // accumulate] += batch
    return [tuple(sorted(step)) for step in per_step]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_permuted_is_a_permutation(size: int) -> None:
    for key in range(4):
        assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_of_two_keys_have_little_in_common() -> None:
    first, second = ([permuted(i, 1000, key) for i in range(1000)] for key in (1, 2))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    neighbours = np.abs(np.diff(first))  # of a random order: 333 on average
    assert 300 < neighbours.mean() < 366


def test_mix_is_the_same_on_every_machine() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 from seed 0
    assert mix(1, 2) != mix(2, 1)
    draws = np.array([mix(i) / 2**64 for i in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(96, 8), (101, 8), (103, 8), (9, 8), (50, 1)])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_each_token_is_a_label_once_an_epoch(num_tokens: int, seq_len: int, epoch: int) -> None:
    num_windows = num_tokens // seq_len
    labels = np.zeros(num_tokens, int)
    for sample in range(epoch * num_windows, (epoch + 1) * num_windows):
        start = window_start(sample, num_tokens, seq_len, seed=3)
        labels[(start + 1 + np.arange(seq_len)) % num_tokens] += 1
    assert labels.max() == 1
    assert (labels == 0).sum() == num_tokens % seq_len


def test_what_an_epoch_leaves_out_is_elsewhere_each_time() -> None:
    seen = np.zeros(103, int)
    for sample in range(12 * 100):  # 100 epochs, each without 7 of the 103 tokens
        start = window_start(sample, 103, 8, seed=0)
        seen[(start + 1 + np.arange(8)) % 103] += 1
    assert seen.sum() == 100 * 96
    assert seen.min() > 80


def test_the_seed_moves_order_and_offset() -> None:
    starts = {seed: [window_start(k, 10_000, 16, seed) for k in range(50)] for seed in range(4)}
    assert len({tuple(s) for s in starts.values()}) == 4
    assert len({s[0] % 16 for s in starts.values()}) > 1
    assert starts[1] == [window_start(k, 10_000, 16, 1) for k in range(50)]
    assert starts[0] != sorted(starts[0])


def test_train_windows_are_runs_of_the_split_closed_to_a_ring(tmp_path: Path) -> None:
    windows = TrainWindows(split_of(tmp_path, 50), seq_len=8, seed=0)
    wrapped = 0
    for sample in range(60):
        tokens = windows[sample]["tokens"]
        assert tokens.shape == (9,) and tokens.dtype == torch.int64
        assert (tokens == (tokens[0] + torch.arange(9)) % 50).all()
        wrapped += int(tokens[-1] < tokens[0])
    assert wrapped


def test_steps_cover_the_samples_in_turn() -> None:
    assert samples(range(0, 3), micro=8) == [tuple(range(8 * s, 8 * s + 8)) for s in range(3)]


@pytest.mark.parametrize(
    ("micro", "accumulate", "world"),
    [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1)],
)
def test_a_step_sees_the_same_samples_on_any_layout(
    micro: int, accumulate: int, world: int
) -> None:
    assert samples(range(5), micro, accumulate, world) == samples(range(5), micro=8)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_start_step_skips_exactly_the_steps_before(accumulate: int, world: int) -> None:
    whole = samples(range(7), 2, accumulate, world)
    assert samples(range(3, 7), 2, accumulate, world) == whole[3:]


def test_the_length_counts_from_step_0() -> None:
    batches = TrainBatches(
        start_step=4, num_steps=10, micro_batch_size=2, accumulate=3, rank=0, world_size=2
    )
    assert len(batches) == 30
    assert len(list(batches)) == 18


def eval_batches(
    split: TokenSplit, world: int, limit: int | None = None, seq_len: int = 8, batch: int = 3
) -> list[list[torch.Tensor]]:
    """The batches of each rank."""
    windows = EvalWindows(split, seq_len, limit)
    return [
        [
            b["tokens"]
            for b in DataLoader(
                windows,
                batch_sampler=EvalBatches(
                    num_windows=len(windows), batch_size=batch, rank=rank, world_size=world
                ),
            )
        ]
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 100, 193, 500])
def test_each_token_but_the_first_is_scored_once(
    tmp_path: Path, num_tokens: int, world: int
) -> None:
    ranks = eval_batches(split_of(tmp_path, num_tokens), world)
    assert len({len(batches) for batches in ranks}) == 1
    labels = []
    for batches in ranks:
        for tokens in batches:
            assert tokens.shape == (3, 9) and tokens.dtype == torch.int64
            scored = tokens[:, 1:] >= 0
            assert (tokens[:, 1:] == tokens[:, :-1] + 1)[scored].all()
            labels += tokens[:, 1:][scored].tolist()
    assert sorted(labels) == list(range(1, num_tokens))


def test_windows_do_not_overlap_and_rest_on_the_whole_context(tmp_path: Path) -> None:
    (batches,) = eval_batches(split_of(tmp_path, 100), world=1)
    assert torch.cat(batches)[:, 0].tolist()[:13] == list(range(0, 100, 8))


@pytest.mark.parametrize(
    ("limit", "last"), [(2, 1), (9, 8), (10, 9), (99, 98), (100, 99), (999, 99)]
)
def test_the_limit_scores_the_first_tokens_only(tmp_path: Path, limit: int, last: int) -> None:
    ranks = eval_batches(split_of(tmp_path, 100), world=2, limit=limit)
    labels = torch.cat([tokens[:, 1:] for batches in ranks for tokens in batches])
    assert sorted(labels[labels >= 0].tolist()) == list(range(1, last + 1))
