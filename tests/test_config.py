"""Impossible sizes are refused at construction, in words that name the size and the way out."""

import dataclasses

import jaxtyping
import pytest

from nsa.config import NSAConfig


def test_defaults_are_the_papers() -> None:
    assert dataclasses.asdict(NSAConfig()) == {
        "sliding_window_size": 512,
        "compress_block_size": 32,
        "compress_block_sliding_stride": 16,
        "selection_block_size": 64,
        "num_selected_blocks": 16,
        "num_initial_blocks": 1,
        "num_local_blocks": 2,
        "causal": True,
        "importance": "probability_sum",
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sliding_window_size": 0}, "sliding_window_size=0 must be at least 1"),
        ({"compress_block_size": 0}, "compress_block_size=0 must be at least 1"),
        ({"compress_block_sliding_stride": 0}, "compress_block_sliding_stride=0 must be at least"),
        ({"selection_block_size": -64}, "selection_block_size=-64 must be at least 1"),
        ({"num_selected_blocks": -1}, "num_selected_blocks=-1 must be at least 0"),
        ({"num_initial_blocks": -1}, "num_initial_blocks=-1 must be at least 0"),
        ({"num_local_blocks": 0}, "num_local_blocks=0 must be at least 1"),
        ({"compress_block_sliding_stride": 64}, "at most compress_block_size=32"),
        ({"compress_block_size": 128}, "at most selection_block_size=64"),
        ({"compress_block_sliding_stride": 24}, "must be a multiple of compress_block_sliding_str"),
        ({"importance": "max"}, "choose one of probability_sum, logit_mean"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSAConfig(**sizes)


def test_sizes_are_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would complain first
    with pytest.raises(ValueError, match=r"sliding_window_size=8.5 must be a whole number"):
        NSAConfig(sliding_window_size=8.5)  # type: ignore[arg-type]


def test_a_block_need_not_be_a_multiple_of_the_stride() -> None:
    NSAConfig(compress_block_size=24, compress_block_sliding_stride=16)


def test_fewer_blocks_than_forced_ones_are_legal() -> None:
    NSAConfig(num_selected_blocks=2, num_initial_blocks=2, num_local_blocks=2)
    NSAConfig(num_selected_blocks=0)


def test_a_config_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSAConfig().causal = False  # type: ignore[misc]
