"""Shuffled documents: each once, in an order of the seed, whatever fits into memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.documents import text_strings
from data.shuffle import shuffled, shuffled_stream

DOCUMENTS = [f"{i} " + "x" * (i % 50) for i in range(2000)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NSA_DATA_DIR", str(tmp_path))
    return tmp_path


def batches() -> Iterator[pa.StringArray]:
    yield from (pa.array(DOCUMENTS[start : start + 300]) for start in range(0, 2000, 300))


@pytest.mark.parametrize("window", [1 << 24, 9000])  # of 60,000 bytes
@pytest.mark.parametrize("shuffle", [shuffled, shuffled_stream])
def test_each_document_comes_once_in_an_order_of_the_seed(shuffle, window, monkeypatch) -> None:
    monkeypatch.setattr("data.shuffle.WINDOW", window)
    monkeypatch.setattr("data.shuffle.BUCKETS", 3)
    monkeypatch.setattr("data.shuffle.BATCH", 500)
    first, again, other = (
        [text for batch in shuffle(batches(), seed) for text in text_strings(batch)]
        for seed in (0, 0, 1)
    )
    assert sorted(first) == sorted(DOCUMENTS)
    assert first == again != other


def test_any_document_may_come_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shuffle.WINDOW", 9000)
    monkeypatch.setattr("data.shuffle.BUCKETS", 3)  # so that they are divided again
    order = [t for batch in shuffled(batches(), 3) for t in text_strings(batch)]
    places = np.argsort([int(text.split()[0]) for text in order])
    assert abs(np.corrcoef(places, np.arange(2000))[0, 1]) < 0.1
    assert abs(places[:100].mean() - 1000) < 200  # 3.5 deviations of the mean of 100 draws


def test_an_order_that_is_not_read_to_its_end_leaves_nothing(cache: Path) -> None:
    order = shuffled(batches(), 0)
    next(order)
    order.close()
    assert not any(cache.iterdir())
