"""evaluate.py on a tiny model that train.py trained, with the attention probe beside it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_runs import finished
from forked_runs import run as train
from test_export import TINY

import evaluate
import export
from callbacks.csv_logger import read_rows
from nsa.training import label_sums
from runs import evaluation, evaluation_parts, trained
from runs.evaluation_parts import passkey_windows
from runs.scorer import Scorer, SlidingWindows

ROOT = Path(__file__).parents[1]
SEQ_LEN = 64
OWN = [
    "callbacks=attention_probe", "attention=tiny", "attention.selection_block_size=8",
    "trainer.limit_test_batches=1.0",
]  # fmt: skip
HELP = """
import runpy, sys
sys.argv = ["evaluate.py", "--help"]
try:
    runpy.run_path("evaluate.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert not {"torch", "lightning", "matplotlib"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a trained run, and its export."""
    folder = tmp_path_factory.mktemp("evaluate")
    text = "".join(f"{i} times {i} makes {i * i}.\n" for i in range(800))
    (folder / "text.txt").write_text(text)
    data = f"data.paths=[{folder / 'text.txt'}]"
    finished(train(folder, [*TINY, *OWN, data, "run_dir=run"]), folder)
    export.main([f"ckpt={folder / 'run'}", f"out={folder / 'out'}"])
    return folder


@pytest.fixture(autouse=True)
def own_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_DATA_DIR", str(folder / "data"))


def evaluated(folder: Path, *words: str, ckpt: str = "run") -> dict[str, Any]:
    """evaluate.json of what is typed."""
    out = folder / "evaluated"
    options = evaluate.parse([f"ckpt={folder / ckpt}", f"out={out}", *words])
    evaluation.evaluate(options)
    return json.loads((out / "evaluate.json").read_text())


def scorer(folder: Path, **options: Any) -> Scorer:
    typed = evaluate.parse([f"ckpt={folder / 'run'}"])
    for name, value in options.items():
        setattr(typed, name, value)
    found = trained.load(trained.find(typed.ckpt))
    return Scorer(found.model, evaluation.corpus_of(found, typed), typed, SEQ_LEN)


def test_the_probe_ran_beside_training(folder: Path) -> None:
    run = folder / "run"
    assert {path.name for path in (run / "attention_probe").iterdir()} == {
        "heads.csv", "heads.png", "curves.png",
    }  # fmt: skip
    names = {name for row in read_rows(run / "metrics.csv") for name in row}
    assert {f"probe/layer_{i}/{name}" for i in (0, 1) for name in ("recall", "grad_layer")} <= names


def test_the_whole_split_gives_the_figure_of_the_run(folder: Path) -> None:
    result = json.loads((folder / "run" / "result.json").read_text())
    options = evaluate.parse([f"ckpt={folder / 'run'}", "what=bpb,positions", "stride=16"])
    words = evaluation.evaluate(options)
    found = json.loads((folder / "run" / "evaluation" / "evaluate.json").read_text())
    plain, slid = found["bpb"]["side_by_side"], found["bpb"]["sliding"]
    assert plain["bpb"] == pytest.approx(result["test_bpb"], abs=1e-5)
    assert slid["labels"] == plain["labels"] and slid["bpb"] != plain["bpb"]
    assert f"{slid['bpb']:.4f} sliding" in words and (found["window"], slid["stride"]) == (64, 16)
    rows = found["positions"]["rows"]
    spans = [(row["first"], row["last"]) for row in rows]
    assert spans == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)]
    assert sum(row["labels"] for row in rows) == plain["labels"]
    mean = sum(row["bpb"] * row["labels"] for row in rows) / plain["labels"]
    assert mean == pytest.approx(plain["bpb"], abs=1e-5)
    assert (folder / "run" / "evaluation" / "positions.png").stat().st_size > 5_000


def test_a_large_vocabulary_is_scored_without_its_logits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["what=positions", "max_tokens=400"]
    plain = evaluated(folder, *words)["positions"]["rows"]
    monkeypatch.setattr(label_sums, "CHUNKED_FROM", 256)
    monkeypatch.setitem(label_sums.CROSS_ENTROPIES, "plain", None)
    for row, other in zip(evaluated(folder, *words)["positions"]["rows"], plain, strict=True):
        assert row == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(("stride", "limit"), [(64, None), (16, None), (1, 90), (63, 200), (5, 30)])
def test_sliding_windows_score_every_label_once(folder: Path, stride, limit) -> None:
    windows = SlidingWindows(scorer(folder, max_tokens=limit), stride)
    labels = []
    for number in range(len(windows)):
        window = windows[number]
        scored = window["tokens"][1:][window["scored"]]
        labels += scored[scored >= 0].tolist()
        assert number == 0 or window["scored"].sum() == stride
    assert labels == windows.split.read(1, windows.num_tokens).tolist()


def test_knockouts_and_selection(folder: Path) -> None:
    found = evaluated(folder, "what=knockouts,selection", "sample_windows=3", "n=1,4,8")
    rows = found["knockouts"]["rows"]
    assert [(r["layer"], r["branch"]) for r in rows[::3]] == [
        (None, "compressed"), (0, "compressed"), (1, "compressed"),
    ]  # fmt: skip
    assert len({row["bpb"] for row in rows}) == 9
    # The same by hand: the gate of one layer's window closed by its weights.
    own = scorer(folder, sample_windows=3)
    with torch.no_grad():
        gates: Any = own.layers[1].to_gates
        gates.weight[2::3], gates.bias[2::3] = 0.0, -1e9
    assert own.score(own.sample(), "") == pytest.approx(rows[8]["bpb"], abs=1e-6)
    by = {(row["n"], row["selection"]): row["bpb"] for row in found["selection"]["rows"]}
    assert len(by) == 9 and found["selection"]["trained_n"] == [4]
    assert by[4, "learned"] == pytest.approx(found["knockouts"]["bpb"], abs=1e-6)
    assert by[8, "learned"] == pytest.approx(by[8, "oracle"], abs=1e-6)  # all there are
    assert len({by[4, control] for control in evaluation_parts.SELECTIONS}) == 3
    assert by[1, "learned"] != pytest.approx(by[4, "learned"], abs=1e-7)
    for picture in ("knockouts.png", "selection.png"):
        assert (folder / "evaluated" / picture).stat().st_size > 5_000


def test_layers_are_left_as_they_were(folder: Path) -> None:
    own = scorer(folder)
    layers = [*own.layers.values()]
    before = [(layer.cfg, layer.selection) for layer in layers]
    with evaluation_parts.selecting(layers, 2, "random"):
        assert {(layer.cfg.num_selected_blocks, layer.selection) for layer in layers} == {
            (2, "random")
        }
    with evaluation_parts.gate_at_zero(layers, 0):
        pass
    assert [(layer.cfg, layer.selection) for layer in layers] == before
    assert not any(layer.to_gates._forward_hooks for layer in layers)
    assert evaluation_parts.numbers_to_try(own) == [2, 3, 4, 8]


def test_passkey_and_recall(folder: Path) -> None:
    found = evaluated(folder, "what=passkey", "passkeys=2")
    cells = [(row["length"], row["depth"]) for row in found["passkey"]["rows"]]
    assert cells == [(64, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (folder / "evaluated" / "passkey.png").stat().st_size > 5_000
    task = ["data=recall", "data.num_facts=4", "data.num_questions=2", "data.test_sequences=8"]
    found = evaluated(folder, *task, "what=recall")
    assert found["metric"] == "accuracy" and found["recall"]["windows"] == 8
    assert 0 <= found["recall"]["accuracy"] < 0.5
    straddle = [*task, "data.task=straddle", "data.block_size=4", "data.offset=2"]
    found = evaluated(folder, *straddle, "what=recall")["recall"]
    assert [row["offset"] for row in found["offsets"]] == [0, 1, 2, 3]
    assert found["offsets"][2]["accuracy"] == found["accuracy"]


def test_who_knows_the_answers_has_them_all() -> None:
    windows = passkey_windows(128, 0.5, 3)
    answers = torch.stack([window["tokens"] for window in windows])[:, 1:]

    def batches(windows: Any, about: str) -> Any:
        yield {name: torch.stack([w[name] for w in windows]) for name in windows[0]}

    for shift, expected in ((0, (1.0, 1.0)), (1, (0.0, 0.0))):
        logits = torch.nn.functional.one_hot((answers + shift) % 256, 256).float()
        knowing: Any = SimpleNamespace(
            batches=batches, model=lambda ids, logits=logits: logits, autocast=torch.no_grad
        )
        assert evaluation_parts.found(knowing, windows) == expected


def test_an_exported_folder_scores_the_same(folder: Path) -> None:
    words = ["what=bpb", "max_tokens=400"]
    own = evaluated(folder, *words)
    paths = f"data.paths=[{folder / 'text.txt'}]"
    exported = evaluated(folder, *words, "data=text", paths, ckpt="out")
    for name, figures in own["bpb"].items():
        assert exported["bpb"][name] == pytest.approx(figures)


def test_mixed_precision_changes_little(folder: Path) -> None:
    exact, mixed = (
        evaluated(folder, "what=bpb", "max_tokens=200", f"precision={precision}")["bpb"]
        for precision in ("float32", "bf16-mixed")
    )
    assert mixed["side_by_side"]["bpb"] != exact["side_by_side"]["bpb"]
    assert mixed["side_by_side"]["bpb"] == pytest.approx(exact["side_by_side"]["bpb"], rel=0.02)


def test_what_cannot_be_had_is_refused_before_work(folder: Path, tmp_path: Path) -> None:
    run = f"ckpt={folder / 'run'}"
    for words, message in (
        (["what=bpd"], "what=bpd is unknown"),
        (["stride=65", "window=64"], "stride=65 is longer than the window of 64"),
        (["stride=0"], "stride=0 must be at least 1"),
        (["n=0"], "n=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.parse([run, *words])
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        evaluate.parse([f"ckpt={tmp_path / 'none'}"])
    with pytest.raises(SystemExit):
        evaluate.parse([run, "split=dev"])
    for words, message in (
        (["stride=65"], "longer than the window of 64"),
        (["what=recall"], "what=recall needs a task"),
        (["data=recall", "what=bpb"], "what=bpb needs text"),
        (["data=recall", "split=train"], "endless"),
        (["data.pathz=1"], "data.pathz=1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate(evaluate.parse([run, *words, f"out={tmp_path / 'out'}"]))
    moved = tmp_path / "moved.ckpt"
    newest = trained.find(str(folder / "run"))
    assert trained.find(str(folder / "run" / "checkpoints")) == newest
    shutil.copyfile(newest, moved)
    with pytest.raises(ValueError, match="lies outside its run folder"):
        evaluation.evaluate(evaluate.parse([f"ckpt={moved}"]))
    with moved.open("r+b") as file:
        file.seek(moved.stat().st_size // 2)
        file.write(b"broken" * 100)
    with pytest.raises(ValueError, match="cannot be used"):
        evaluation.evaluate(evaluate.parse([f"ckpt={moved}"]))
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch() -> None:
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in evaluate.PARTS)
