"""Tasks: whoever reads the evidence solves them, and whoever does not can only guess."""

from pathlib import Path
from typing import Any

import forked_runs
import numpy as np
import pytest
import torch
from test_data_modules import windows_by_step

from data.tasks.datamodule import IN_TEXT, TASKS, RecallDataModule
from data.tasks.sample import VALUES

OPTIONS: dict[str, Any] = {
    "name": "task",
    "vocab_size": 256,
    "seq_len": 256,
    "micro_batch_size": 4,
    "num_facts": 8,
    "num_questions": 4,
    "facts_per_cluster": 4,
    "min_distance": 64,
    "block_size": 16,
    "offset": None,
    "needle_depth": None,
    "grow_samples": 0,
    "grow_from": 16,
    "val_sequences": 6,
    "test_sequences": 5,
}


SMALL = {"needles": {"num_facts": 4}}  # what fits into the window


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSA_DATA_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def made(task: str, **options: Any) -> RecallDataModule:
    module = RecallDataModule(**OPTIONS | {"task": task} | options)
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize("task", TASKS)
def test_the_evidence_answers_every_question_and_stands_far_away(task: str) -> None:
    module = made(task, **SMALL.get(task, {}))
    for number in range(50):
        tokens, evidence = module.sample("train", number)
        assert tokens.shape == (257,) and evidence.shape == (256,)
        asked = np.flatnonzero(evidence >= 0)
        assert len(asked) == {"recall": 4, "straddle": 4, "induction": 7, "selective_copy": 8}.get(
            task, 5
        )
        assert (tokens[evidence[asked]] == tokens[asked + 1]).all()
        assert (asked - evidence[asked] >= 64).all()


def solved(task: str, tokens: np.ndarray, label: int) -> int:
    """The answer that a reader without the evidence finds, from the tokens up to the label's."""
    seen = tokens[: label + 1]
    if task == "selective_copy":
        marker = np.flatnonzero(seen == 0)[-1]
        values = [t for t in seen[:marker] if t in VALUES]
        return values[label - marker]
    suffix = len(bytes_of_question(seen)) if task in IN_TEXT else 1
    wanted = seen[-suffix:]
    for end in range(suffix, len(seen)):
        if (seen[end - suffix : end] == wanted).all():
            return int(seen[end])
    return -1


def bytes_of_question(seen: np.ndarray) -> bytes:
    text = bytes(seen.tolist())
    return text[text.rindex(b"\nThe number of ") :]


@pytest.mark.parametrize("task", TASKS)
def test_a_solver_scores_one_and_chance_scores_chance(task: str) -> None:
    module = made(task, **SMALL.get(task, {}))
    right, guessed, total = 0, 0, 0
    rng = np.random.default_rng(0)
    answers = np.frombuffer(b"0123456789", np.uint8) if task in IN_TEXT else VALUES
    answers = np.arange(128) if task == "induction" else answers
    for number in range(120):
        tokens, evidence = module.sample("train", number)
        for label in np.flatnonzero(evidence >= 0):
            total += 1
            right += solved(task, tokens, label) == tokens[label + 1]
            guessed += rng.choice(answers) == tokens[label + 1]
    assert right == total
    chance = 1 / len(answers)
    assert abs(guessed / total - chance) < 4 * (chance / total) ** 0.5


def test_facts_stand_in_clusters_that_share_a_block() -> None:
    module = made("recall", num_facts=12, num_questions=12)
    evidence = module.sample("train", 0).evidence
    places = np.sort(evidence[evidence >= 0])
    assert (np.diff(places.reshape(3, 4)) == 2).all()


@pytest.mark.parametrize("offset", [None, 0, 7, 15])
def test_straddling_facts_stand_where_they_were_told(offset: int | None) -> None:
    module = made("straddle", offset=offset, min_distance=0)
    for number in range(20):
        evidence = module.sample("train", number).evidence
        keys = evidence[evidence >= 0] - 1
        assert set(keys % 16) == {15 if offset is None else offset}


def test_depth_places_the_needle() -> None:
    found = []
    for needle_depth in (0.0, 0.5, 1.0):
        evidence = made("passkey", needle_depth=needle_depth).sample("val", 0).evidence
        found.append(int(evidence[evidence >= 0][0]))
    assert found[0] < 32 < found[1] < found[2]


@pytest.mark.parametrize("task", TASKS)
def test_windows_grow_from_many_short_documents_to_one(task: str) -> None:
    sizes = {"num_questions": 8, "seq_len": 1024} | SMALL.get(task, {})
    module = made(task, grow_samples=100, grow_from=4, **sizes)
    windows: Any = module._train_windows()
    whole = int(module.sample("val", 0).scored.sum())
    for number, documents in ((0, 4), (49, 4), (50, 2), (99, 2), (100, 1), (1000, 1)):
        sample, starts = module.sample("train", number), windows[number]["document_starts"]
        length = 1024 // documents
        assert starts.tolist() == [i // length * length for i in range(1024)]
        asked = np.flatnonzero(sample.scored)
        assert (sample.evidence[asked] // length == asked // length).all()  # its own document's
        assert (sample.tokens[sample.evidence[asked]] == sample.tokens[asked + 1]).all()
        assert len(set(asked // length)) == documents
        if documents == 1:
            assert len(asked) == whole
    assert module.sample("val", 0).scored.sum() == whole
    assert "document_starts" not in next(iter(module.val_dataloader()))


def steps_of(micro: int, accumulate: int, world: int, start: int = 0, **options: Any) -> list:
    """`windows_by_step` of three steps."""

    def check(batch: dict[str, torch.Tensor]) -> None:
        assert batch["scored"].dtype == torch.bool and batch["scored"].shape == (micro, 256)

    def make(micro: int) -> Any:
        return made("recall", micro_batch_size=micro, **options)

    return windows_by_step(make, (micro, accumulate, world), check, start, steps=3)


def test_a_step_is_the_same_on_any_layout_and_after_any_start() -> None:
    whole = steps_of(8, 1, 1)
    assert steps_of(2, 2, 2) == steps_of(4, 1, 2) == whole
    assert steps_of(4, 2, 1, start=2) == whole[2:]
    assert steps_of(8, 1, 1, seed=1) != whole


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_change_nothing() -> None:
    assert steps_of(8, 1, 1, num_workers=2) == steps_of(8, 1, 1)


def test_validation_is_the_same_for_every_seed_and_unlike_training() -> None:
    first, second = (list(made("recall", seed=seed).val_dataloader()) for seed in (0, 1))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, second, strict=True))
    assert sum(int(batch["scored"].any(1).sum()) for batch in first) == 6
    train = made("recall").sample("train", 0).tokens.tolist()
    assert train not in first[0]["tokens"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sorting"}, r"data\.task='sorting' must be one of recall, straddle"),
        ({"num_facts": 65}, r"data\.num_facts=65 must be .* at most 64"),
        ({"num_questions": 9}, r"data\.num_questions=9 must be at most data\.num_facts=8"),
        ({"min_distance": 250}, r"raise model\.seq_len, or lower data\.num_facts"),
        ({"task": "straddle", "offset": 16}, r"data\.offset=16"),
        ({"task": "passkey", "needle_depth": 1.5}, r"data\.needle_depth=1\.5"),
        ({"task": "passkey", "min_distance": 240}, r"data\.task=passkey: .* raise model\.seq_len"),
        ({"grow_from": 3}, r"data\.grow_from=3 must be a power of two"),
        ({"vocab_size": 300}, r"data\.vocab_size=300 must be 256"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**{"task": "recall"} | options)


def test_a_run_is_judged_by_accuracy(tmp_path: Path) -> None:
    tiny = [
        *("trainer=cpu", "model.dim=32", "model.depth=1", "model.heads=2", "model.dim_head=16"),
        *("model.seq_len=128", "batch.micro_batch_size=4", "batch.sequences_per_step=4"),
        *("trainer.max_steps=2", "val_every_n_steps=2", "trainer.log_every_n_steps=1"),
        *("scheduler.warmup_steps=1", "callbacks.samples.new_tokens=8", "logger=csv"),
        *("data=recall", "data.val_sequences=4", "data.test_sequences=4", "run_dir=run"),
    ]
    codes = forked_runs.run(tmp_path, tiny)
    forked_runs.finished(codes, tmp_path)
    assert "val_accuracy" in (tmp_path / "run" / "result.json").read_text()
