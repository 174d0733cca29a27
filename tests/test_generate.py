"""generate.py needs a checkpoint and nothing else."""

from pathlib import Path

import pytest
import torch
from test_train import ADAMW, ATTENTION, COSINE, MODEL
from tokenizers import Tokenizer, models, pre_tokenizers

import generate
from data.tokenizer import SubwordTokenizer
from nsa.training.lightning_module import NSALightningModule


def save_checkpoint(path: Path, vocab_size: int, tokenizer: dict | None) -> NSALightningModule:
    """What training leaves, as far as checkpoints are checked; the model was compiled."""
    model = MODEL | {"vocab_size": vocab_size, "attention": ATTENTION | {"backend": "flex"}}
    module = NSALightningModule(model, ADAMW, COSINE, compile=True)
    rest = {"optimizer_states": [], "loops": {}, "global_step": 3}
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)} | rest
    torch.save(content | {"AnyDataModule": {"tokenizer": tokenizer}}, path)
    return module.eval()


def test_bytes_are_the_default_and_the_likeliest_is_reproduced(tmp_path: Path) -> None:
    module = save_checkpoint(tmp_path / "a.ckpt", 256, None)
    prompt = "naïve: a=b"
    options = generate.Options(
        ckpt=str(tmp_path / "a.ckpt"), prompt=prompt, seq_len=16, temperature=0.0
    )
    ids = list(prompt.encode())
    new = module.model.sample(torch.tensor([ids]), 16, 0.0)[0].tolist()
    assert len(new) == 16 - len(ids)
    assert generate.generate(options) == prompt + bytes(new).decode(errors="replace")


def test_the_tokenizer_comes_from_the_checkpoint(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save_checkpoint(tmp_path / "a.ckpt", 3, SubwordTokenizer(words, eot=2).state())
    text = generate.generate(generate.Options(ckpt=str(tmp_path / "a.ckpt"), prompt="b", seq_len=6))
    assert set(text.removeprefix("b")) <= set("abc ")
    assert len(text.removeprefix("b").split()) == 5


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", 256, None)
    options = [
        generate.Options(ckpt=str(tmp_path / "a.ckpt"), seq_len=40, seed=seed) for seed in (0, 0, 1)
    ]
    texts = [generate.generate(option) for option in options]
    assert texts[0] == texts[1] != texts[2]


def test_values_are_taken_as_typed() -> None:
    options = generate.parse(["ckpt=a.ckpt", "prompt=def f(x): return {x: 'a=b'}", "seq_len=7"])
    assert options.prompt == "def f(x): return {x: 'a=b'}"
    assert options.seq_len == 7


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["promt=x"], "'promt' is unknown: choose of ckpt, prompt"),
        (["prompt=x"], "ckpt= is missing"),
        (["ckpt=a", "seq_len=many"], "seq_len=many: invalid literal"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        generate.parse(arguments)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        generate.generate(generate.Options(ckpt="nowhere.ckpt"))
