"""Packed documents and mixtures through train.py: no leak, and the same run on any layout."""

import json
import re
import signal
from pathlib import Path

import pytest
from forked_runs import Signal, finished, rows_of, run
from test_data_modules import cache, ready  # noqa: F401 (a fixture)
from test_train import ATTENTION, make_module

import evaluate
from runs import evaluation
from runs.document_alignment import document_alignment
from runs.same_run import check_same_run

STEPS = 6
TRAIN = (
    *("trainer=cpu", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"),
    *("val_every_n_steps=3", "trainer.num_sanity_val_steps=0"),
    *("model.dim=16", "model.depth=3", "model.layer_pattern=[nsa,dense,window]", "model.heads=2"),
    *("model.dim_head=8", "model.seq_len=64", "batch.sequences_per_step=4"),
    *("scheduler.warmup_steps=2", "logger=csv", "callbacks.samples.new_tokens=2"),
    *("data.num_workers=0", "batch.micro_batch_size=2", "test=false", "callbacks.loss_plot=null"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_rows(folder / "rows.jsonl", "squared")
    write_rows(folder / "cubes.jsonl", "cubed")
    (folder / "files").mkdir()
    for number in range(6):
        (folder / "files" / f"{number}.py").write_text(f"print({number} ** {number})\n" * 3)
    return folder


def write_rows(path: Path, verb: str) -> None:
    rows = [{"text": f"{i} {verb} is {i * i} " * (1 + i % 7)} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def output(folder: Path) -> str:
    return (folder / "run.log").read_text()


def assert_alike(rows: list[dict[str, str]], others: list[dict[str, str]]) -> None:
    assert len(rows) == len(others) and {*rows[0]} == {*others[0]}
    for row, other in zip(rows, others, strict=True):
        for name in row:
            assert bool(row[name]) == bool(other[name]), (name, row["step"])
            if row[name] and "loss" in name:
                assert float(row[name]) == pytest.approx(float(other[name]), abs=2e-6), name


def on(ranks: int) -> list[str]:
    return ["trainer.devices=2", "trainer.strategy=ddp"] if ranks == 2 else []


def comes_and_goes(folder: Path, options: tuple[str, ...], name: str) -> None:
    """From end to end on one process; then stopped twice, and on one process, two and one."""
    whole, parts = folder / name, folder / f"{name}_in_parts"
    finished(run(folder, [*options, f"run_dir={whole}"]), folder)
    for ranks, until in ((1, 1), (2, 3)):
        told = Signal(signal.SIGTERM, rank=ranks - 1, step=until)
        command = [*options, *on(ranks), f"run_dir={parts}"]
        assert run(folder, command, ranks=ranks, launcher="srun", sent=told) == [143] * ranks
    finished(run(folder, [*options, f"run_dir={parts}", "batch.micro_batch_size=4"]), folder)
    assert_alike(rows_of(parts), rows_of(whole))


MIXTURE = (
    *(*TRAIN, "data=mix", "data.pack=documents", "data.weights={squares:3,cubes:1,code:1}"),
    *("+data@data.corpora.squares=hf", "data.corpora.squares.name=json"),
    *("data.corpora.squares.data_files=rows.jsonl", "+data@data.corpora.cubes=hf"),
    *("data.corpora.cubes.name=json", "data.corpora.cubes.data_files=cubes.jsonl"),
    *("+data@data.corpora.code=text", "data.corpora.code.paths=[files/*]", "data.val_tokens=600"),
    *("data.corpora.code.val_fraction=.2", "data.corpora.code.test_fraction=.2"),
    *("data.tokenizer=train", "data.vocab_size=280"),
)


def test_packed_mixtures_go_on_on_any_number_of_processes(folder: Path) -> None:
    comes_and_goes(folder, MIXTURE, "mixture")
    told = dict(re.findall(r"corpus (\w+)  (.*)", output(folder)))
    share = r"60.00% of the samples, .* epochs, \d+ windows, \d+.\d% filled, the last one \d+.\d%"
    assert re.fullmatch(share, told["squares"]), told
    assert told["cubes"].startswith("20.00%") and told["code"].startswith("20.00%")
    prepared = re.findall(r"- (\w+): train [\d,]+, val [\d,]+, test [\d,]+ tokens", output(folder))
    assert {*prepared} == {"squares", "cubes", "code"}  # of which two are json to data=hf
    assert re.search("corpus code: epoch 2 begins by step [1-6]", output(folder))
    rows = rows_of(folder / "mixture")
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])
    for name in ("squares", "cubes", "code"):
        assert rows[-1][f"val/{name}/loss"] and rows[-1][f"val/{name}/bpb"]
        assert rows[-1][f"data/{name}/epochs"]
        assert any(row.get(f"train/{name}/loss") for row in rows)


def test_a_step_learns_the_same_however_its_labels_are_divided(folder: Path) -> None:
    """Packed rows have different numbers of labels, and so have micro-batches."""
    one_by_one = folder / "one_by_one"
    command = [*MIXTURE, "batch.micro_batch_size=1", f"run_dir={one_by_one}"]
    finished(run(folder, command), folder)
    assert_alike(rows_of(one_by_one), rows_of(folder / "mixture"))


def test_the_loss_of_all_is_that_of_the_corpora_together(folder: Path) -> None:
    (last,) = [row for row in rows_of(folder / "mixture") if row["step"] == str(STEPS)]
    parts = [float(last[f"val/{name}/loss"]) for name in ("squares", "cubes", "code")]
    assert min(parts) < float(last["val/loss"]) < max(parts)


def test_a_packed_mixture_is_evaluated_as_it_was_validated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NSA_DATA_DIR", str(folder / "data"))
    words = ["ckpt=mixture", "split=val", "max_tokens=600", "sample_windows=2", "n=1"]
    said = evaluation.evaluate(evaluate.parse([*words, "what=bpb,positions,selection"]))
    found = json.loads((folder / "mixture" / "evaluation" / "evaluate.json").read_text())
    (last,) = [row for row in rows_of(folder / "mixture") if row["step"] == str(STEPS)]
    (plain,) = found["bpb"].values()  # windows do not slide over documents
    assert plain["bpb"] == pytest.approx(float(last["val/bpb"]), abs=1e-4)
    for name, part in plain["corpora"].items():
        assert part["bpb"] == pytest.approx(float(last[f"val/{name}/bpb"]), abs=1e-4)
        assert f"{part['bpb']:.4f} {name}: {part['labels']:,} labels" in said
    assert sum(part["labels"] for part in plain["corpora"].values()) == plain["labels"]
    assert sum(row["labels"] for row in found["positions"]["rows"]) == plain["labels"]
    with pytest.raises(ValueError, match="stride=8: windows slide over a single text"):
        evaluation.evaluate(evaluate.parse([*words, "stride=8"]))


def test_a_run_does_not_go_on_with_other_weights(folder: Path) -> None:
    others = "data.weights={squares:1,cubes:1,code:2}"
    assert run(folder, [*MIXTURE, others, f"run_dir={folder / 'mixture'}"]) == [1]
    told = "quotas={'squares': 2500, 'cubes': 2500, 'code': 5000}, the checkpoint has {'squares': 6"
    assert told in output(folder)


@pytest.mark.parametrize("saved", [{"pack": "stream", "document_alignment": 1}, {}])
def test_a_run_does_not_go_on_packed_otherwise(saved: dict[str, object]) -> None:
    """Nor from a checkpoint of a time when there were streams alone."""
    settings: dict[str, dict] = {"model": {}, "optimizer": {}}
    data = {"Data": {"sample_order": {"seed": 0} | saved}}
    checkpoint = {"hyper_parameters": settings} | data
    order = {"seed": 0, "pack": "stream", "document_alignment": 1}
    check_same_run(checkpoint, settings, order)
    with pytest.raises(ValueError, match="pack=documents, the checkpoint has stream"):
        check_same_run(checkpoint, settings, order | {"pack": "documents"})


def test_the_recipe_of_documents_trains_in_small(folder: Path) -> None:
    """experiment=bpe_documents with other sizes: a tokenizer learned, documents packed, chunked."""
    small = ("model=nsa_tiny", "recipe=tiny", *TRAIN, "data=text", "data.paths=[files/*]")
    small += ("data.val_fraction=.2", "data.test_fraction=.2", "cross_entropy=chunked")
    options = ["experiment=bpe_documents", *small, "data.vocab_size=300", "val_every_n_steps=9"]
    options += ["callbacks=attention_probe", "callbacks.attention_probe.num_sequences=1"]
    run_dir = folder / "recipe"
    finished(run(folder, [*options, "trainer.max_steps=2", f"run_dir={run_dir}"]), folder)
    told = output(folder)[output(folder).rindex("tokens per step") :]
    assert "packed documents" in told and re.search("cross-entropy  chunked", told), told
    assert len(rows_of(run_dir)) == 2
    heads = (run_dir / "attention_probe" / "heads.csv").read_text()
    assert heads.startswith("step,layer,head,gate_compressed")


def test_triton_trains_on_packed_documents_as_torch_does(folder: Path) -> None:
    """A step of every kind of layer, in Triton's interpreter."""
    pytest.importorskip("triton")
    small = ("data=hf", "data.name=json", "data.data_files=rows.jsonl", "data.pack=documents")
    small += ("model.dim_head=16", "model.seq_len=32", "batch.sequences_per_step=1")
    small += ("attention.selection_block_size=8", "attention.compress_block_size=4")
    small += ("attention.compress_block_sliding_stride=2", "attention.sliding_window_size=8")
    small += ("callbacks.attention_statistics=null", "batch.micro_batch_size=1")
    small += ("model.heads=1", "trainer.max_steps=1", "val_every_n_steps=9")
    small += ("trainer.limit_val_batches=0", "callbacks.samples=null")
    rows = []
    for backend in ("torch", "triton"):
        run_dir = folder / f"by_{backend}"
        options = [*TRAIN, *small, f"attention.backend={backend}", f"run_dir={run_dir}"]
        finished(run(folder, options), folder)
        rows += rows_of(run_dir)
    assert f"backend  sdpa, {backend}" in output(folder)
    for name in ("train/loss", "optim/grad_norm"):
        by_torch, by_triton = (float(row[name]) for row in rows)
        assert by_triton == pytest.approx(by_torch, rel=1e-5) and by_torch > 1


def test_layers_that_mix_documents_are_refused() -> None:
    module = make_module()
    assert document_alignment(module, "documents") == ATTENTION["selection_block_size"]
    module.model.blocks[1].attention.document_alignment = None
    assert document_alignment(module, "stream") == 1
    with pytest.raises(ValueError, match=r"data\.pack=documents: Attention in model"):
        document_alignment(module, "documents")
