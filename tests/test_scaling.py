"""benchmarks.scaling: which runs it makes, what it compares, and what it draws."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import presets, scaling


def row(gpus: int, tokens_per_second: float | None, kind: str = "weak") -> dict:
    backend = "one" if gpus == 1 else f"ddp x {gpus}"
    found = {"op": "nsa_medium", "tokens": 8192, "sizes": kind, "backend": backend, "status": "ok"}
    return found | ({"tokens_per_second": tokens_per_second} if tokens_per_second else {})


def test_weak_scaling_grows_the_step_and_strong_scaling_shares_it() -> None:
    points = scaling.points(4, scaling.parse(["--presets", "nsa_medium"]))
    assert [point.gpus for point in points[:5]] == [1, 2, 2, 4, 4]
    assert max(point.gpus for point in points) == 4, "no more than there are"
    weak = {p.gpus: p.job.sequences for p in points if p.kind == "weak" and p.job.tokens == 8192}
    strong = {p.job.sequences for p in points if p.kind == "strong" and p.job.tokens == 8192}
    assert weak == {1: 8, 2: 16, 4: 32} and strong == {16}
    few = scaling.parse(["--presets", "nsa_medium", "--tokens", "8192", "--scaling", "strong"])
    assert {(p.job.tokens, p.kind) for p in scaling.points(4, few)} == {(8192, "strong")}


@pytest.mark.parametrize("point", scaling.points(8, scaling.parse(["--presets", "nsa_large"]))[:9])
def test_every_command_composes_and_shares_a_step_evenly(
    point: scaling.Point, tmp_path: Path
) -> None:
    words = presets.command_of(point.job, point.strategy, tmp_path, [])
    overrides = words[words.index(next(w for w in words if w.endswith("train.py"))) + 1 :]
    with initialize_config_dir(str(presets.ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides)
    assert cfg.batch.sequences_per_step % point.gpus == 0
    if point.gpus > 1:
        assert cfg.trainer.devices == point.gpus


def test_speeds_are_compared_with_those_of_so_many_single_gpus(tmp_path: Path) -> None:
    rows = [row(1, 100.0), row(2, 190.0), row(4, 372.0), row(8, None), row(2, 150.0, "strong")]
    assert scaling.efficiencies(rows) == [1.0, 0.95, 0.93, None, None]
    lines = scaling.table(rows, [{"communication_ms": 3.0}] * len(rows)).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "as many cells in every line"
    assert "0.930 (bar 0.93)" in lines[4] and "3.0, 0.0" in lines[4]
    scaling.draw(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
