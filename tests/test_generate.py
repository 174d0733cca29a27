"""generate.py needs a checkpoint and nothing else."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import ADAMW, ATTENTION, COSINE, MODEL
from tokenizers import Tokenizer, models, pre_tokenizers

import generate
from data.tokenizer import ByteTokenizer, SubwordTokenizer
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
        ckpt=str(tmp_path / "a.ckpt"), prompt=[prompt], seq_len=16, temperature=0.0
    )
    ids = list(prompt.encode())
    new = module.model.sample(torch.tensor([ids]), 16, 0.0)[0].tolist()
    assert len(new) == 16 - len(ids)
    assert generate.generate(options) == prompt + bytes(new).decode(errors="replace")


def test_the_tokenizer_comes_from_the_checkpoint(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save_checkpoint(tmp_path / "a.ckpt", 3, SubwordTokenizer(words, eot=2).state())
    text = generate.generate(
        generate.Options(ckpt=str(tmp_path / "a.ckpt"), prompt=["b"], seq_len=6)
    )
    assert set(text.removeprefix("b")) <= set("abc ")
    assert len(text.removeprefix("b").split()) == 5


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", 256, None)
    options = [
        generate.Options(ckpt=str(tmp_path / "a.ckpt"), seq_len=40, seed=seed) for seed in (0, 0, 1)
    ]
    texts = [generate.generate(option) for option in options]
    assert texts[0] == texts[1] != texts[2]


def test_values_are_taken_as_typed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.touch()
    options = generate.parse([f"ckpt={path}", "prompt=def f(x): return {x: 'a=b'}", "seq_len=7"])
    assert options.prompt == ["def f(x): return {x: 'a=b'}"]
    assert options.seq_len == 7
    flags = generate.parse(
        ["--ckpt", str(path), "--prompt", "a", "--prompt", "b=c", "--top-k", "3"]
    )
    assert (flags.prompt, flags.top_k) == (["a", "b=c"], 3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["ckpt=last", "top_p=2"], "top_p=2.0 must lie between 0 and 1"),
        (["ckpt=last", "temperature=-1"], "temperature=-1.0 must lie"),
        (["ckpt=last", "seq_len=1"], "seq_len=1 must lie"),
        (["ckpt=nowhere.ckpt"], r"ckpt=nowhere\.ckpt: there is no such"),
        (["ckpt=last", "file=nowhere.txt"], r"file=nowhere\.txt: there is no such file"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        generate.parse(arguments)


@pytest.mark.parametrize("arguments", [["promt=x"], ["prompt=x"], ["ckpt=a", "seq_len=many"]])
def test_what_is_no_option_ends_the_program(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        generate.parse(arguments)


def test_arguments_are_checked_before_torch_is_imported() -> None:
    code = "import generate, sys; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(generate.__file__).parent)


def test_prompts_from_files_and_stdin_in_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", 256, None)
    (tmp_path / "p.txt").write_text("from a file")
    monkeypatch.setattr("sys.stdin", io.StringIO("stdin"))
    options = generate.parse(
        [f"ckpt={tmp_path / 'a.ckpt'}", "prompt=a", f"file={tmp_path / 'p.txt'}", "file=-",
         "seq_len=16", "temperature=0", "--no-stop"]
    )  # fmt: skip
    text = generate.generate(options)
    printed = capsys.readouterr()
    assert printed.out == text + "\n"
    assert "from a file" in text and "stdin" in text and text.startswith("a")
    assert "tokens/s; cache 0." in printed.err and "3 x 12 tokens" in printed.err
    alone = generate.generate(
        generate.Options(ckpt=options.ckpt, prompt=["a"], seq_len=6, temperature=0.0, stop=False)
    )
    assert text.startswith(alone.rstrip("\ufffd"))


def test_characters_come_whole() -> None:
    """é is two bytes: the first alone shows nothing."""
    decode = ByteTokenizer().decode
    ids = list("né€".encode())
    shown = [generate.whole_characters(decode(ids[:n])) for n in range(len(ids) + 1)]
    assert shown == ["", "n", "n", "né", "né", "né", "né€"]


def test_ctrl_c_ends_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def two_tokens(*_, **__):
        yield torch.tensor([104])
        yield torch.tensor([105])
        raise KeyboardInterrupt

    save_checkpoint(tmp_path / "a.ckpt", 256, None)
    monkeypatch.setattr("nsa.transformer.Transformer.stream", two_tokens)
    generate.generate(generate.Options(ckpt=str(tmp_path / "a.ckpt"), prompt=["oh "]))
    printed = capsys.readouterr()
    assert printed.out == "oh hi\n" and "interrupted" in printed.err


@pytest.mark.parametrize(
    ("prompt", "seq_len", "complaint"),
    [("x" * 200, 300, "has 200 tokens and the model reads"), ("abc", 3, "counts the prompt's 3")],
)
def test_a_prompt_that_is_too_long_is_refused(
    tmp_path: Path, prompt: str, seq_len: int, complaint: str
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", 256, None)
    options = generate.Options(ckpt=str(tmp_path / "a.ckpt"), prompt=[prompt], seq_len=seq_len)
    with pytest.raises(ValueError, match=complaint):
        generate.generate(options)


def test_a_cache_beyond_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", 256, None)
    monkeypatch.setattr("os.sysconf", lambda name: 64)
    with pytest.raises(ValueError, match="lower seq_len"):
        generate.generate(generate.Options(ckpt=str(tmp_path / "a.ckpt"), prompt=["a"]))


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be used"):
        generate.generate(generate.Options(ckpt=str(tmp_path / "a.ckpt"), prompt=["a"]))
