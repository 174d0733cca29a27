"""export.py: what transformers makes of an exported folder, and training from its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_runs import run as train
from transformers import AutoTokenizer

import export
from data.tokenizer import ByteTokenizer, SubwordTokenizer, train_tokenizer
from runs import trained
from runs.export import fast_tokenizer

ROOT = Path(__file__).parents[1]
TINY = [
    "trainer=cpu", "model.dim=32", "model.depth=2", "model.heads=2", "model.dim_head=16",
    "model.seq_len=64", "batch.sequences_per_step=2", "trainer.max_steps=2",
    "val_every_n_steps=2", "scheduler.warmup_steps=1", "callbacks.samples=null",
    "callbacks.loss_plot=null",
    "callbacks.attention_statistics=null", "data=text", "data.num_workers=0", "logger=csv",
    "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "attention.qk_norm=true",
    "attention.rope_scaling={type: yarn, factor: 4, original_seq_len: 16}",
]  # fmt: skip
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.load(sys.argv[2])
mask = torch.ones_like(ids)
mask[0, :9] = 0  # padding before the first text
options = dict(do_sample=False, max_new_tokens=12)
with torch.no_grad():
    torch.save({
        "logits": model(ids).logits,
        "greedy": model.generate(ids, **options),
        "without cache": model.generate(ids, use_cache=False, **options),
        "padded": model.generate(ids, attention_mask=mask, **options)[0, 9:],
        "alone": model.generate(ids[:1, 9:], **options)[0],
        "beams": model.generate(ids, num_beams=2, **options),
        "beams without cache": model.generate(ids, num_beams=2, use_cache=False, **options),
        "loss": model(ids, labels=ids).loss,
    }, sys.argv[2])
assert "lightning" not in sys.modules and "runs" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a trained run, and its export."""
    folder = tmp_path_factory.mktemp("export")
    text = "".join(f"{i} times {i} makes {i * i}.\n" for i in range(2000))
    (folder / "text.txt").write_text(text)
    assert train(folder, [*TINY, "data.paths=[text.txt]", "run_dir=run"]) == [0]
    export.main([f"ckpt={folder / 'run'}", f"out={folder / 'out'}"])
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, torch.Tensor]:
    """What a fresh process, which knows transformers and nsa alone, makes of the export."""
    torch.save(torch.randint(1, 256, (2, 30), generator=torch.manual_seed(0)), folder / "ids")
    names = {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FRESH, str(folder / "out"), str(folder / "ids")]
    subprocess.run(command, cwd=folder, env=os.environ | names, check=True)
    return torch.load(folder / "ids")


def test_transformers_computes_the_same_logits(folder: Path, answers: dict) -> None:
    model = trained.load(trained.find(str(folder / "run"))).model
    ids = torch.randint(1, 256, (2, 30), generator=torch.manual_seed(0))
    with torch.no_grad():
        logits = model(ids)
    torch.testing.assert_close(answers["logits"], logits, rtol=0, atol=1e-6)
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(answers["loss"], nats)
    greedy = model.sample(ids, seq_len=42, temperature=0.0)
    assert torch.equal(answers["greedy"], torch.cat([ids, greedy], dim=1))


@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_generate_with_the_cache_is_generate_without(answers: dict, kind: str) -> None:
    other = "without cache" if kind == "greedy" else "beams without cache"
    assert torch.equal(answers[kind], answers[other])


def test_padding_before_a_text_changes_nothing(answers: dict) -> None:
    assert torch.equal(answers["padded"], answers["alone"])


def test_the_tokenizer_comes_along(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder / "out", trust_remote_code=True)
    text = "Überall: 3 times\n\t3 makes 9.  \u2028"
    assert loaded(text).input_ids == ByteTokenizer().encode(text)
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token_id == ByteTokenizer.eot


def test_a_subword_tokenizer_keeps_its_ids() -> None:
    own = train_tokenizer(["some text to learn from, some more text"] * 9, 300)
    assert isinstance(own, SubwordTokenizer)
    loaded = fast_tokenizer(own)
    assert loaded("more text!").input_ids == own.encode("more text!")
    assert loaded.eos_token_id == own.eot


def test_the_card_tells_of_the_run(folder: Path) -> None:
    card = (folder / "out" / "README.md").read_text()
    result = json.loads((folder / "run" / "result.json").read_text())
    assert f"val_bpb {result['val_bpb']:.4f}" in card and "trainer.max_steps=2" in card


def test_training_starts_from_exported_weights(folder: Path) -> None:
    again = [*TINY, "data.paths=[text.txt]", f"model.weights={folder / 'out'}"]
    slow = ["optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    assert train(folder, [*again, *slow, "run_dir=again"]) == [0]
    results = [json.loads((folder / run / "result.json").read_text()) for run in ("run", "again")]
    before, after = (result["val_bpb"] for result in results)
    assert after == pytest.approx(before, abs=1e-6)
    assert train(folder, [*again, "model.depth=1", "run_dir=other"]) == [1]
    said = (folder / "run.log").read_text()
    assert "another model" in said and "layers.1" in said
    assert not (folder / "other" / "checkpoints").exists()
    assert trained.load(trained.find(str(folder / "again"))).sizes.get("weights") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "ckpt= is missing"),
        (["ckpt=nowhere", "out=x"], "ckpt=nowhere: there is no such checkpoint"),
        (["ckpt=a", "out=b", "to=c"], "'to' is unknown"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        export.main(arguments)


def test_an_export_is_not_written_over(folder: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        export.main([f"ckpt={folder / 'run'}", f"out={folder / 'out'}"])
