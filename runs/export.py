"""A trained model as a folder that transformers loads, and weights back from such a folder."""

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from data.tokenizer import TOKENIZER_FILE, AnyTokenizer, ByteTokenizer, SubwordTokenizer
from nsa.transformer import Transformer
from runs import record
from runs.folder import write_text
from runs.hub import modeling_nsa
from runs.hub.modeling_nsa import NSAForCausalLM, NSATransformerConfig
from runs.trained import Trained

CODE = Path(modeling_nsa.__file__)  # travels with the weights
WEIGHTS = "model.safetensors"
NOT_SIZES = ("name", "weights")  # in a model's config, but not arguments of Transformer


def export(trained: Trained, folder: Path) -> None:
    """Write config.json, weights, tokenizer, generation_config.json, a model card and the code.

    Args:
        trained: what a checkpoint holds.
        folder: appears once everything in it is written.

    Raises:
        ValueError: if there is such a folder already.
    """
    if folder.exists():
        raise ValueError(f"out={folder} exists already: name another folder, or delete this one")
    sizes, tokenizer = portable(trained.sizes), trained.tokenizer
    classes = {"AutoConfig": NSATransformerConfig, "AutoModelForCausalLM": NSAForCausalLM}
    config = NSATransformerConfig(
        transformer=sizes,
        auto_map={auto: f"{CODE.stem}.{each.__name__}" for auto, each in classes.items()},
        architectures=[NSAForCausalLM.__name__],
        eos_token_id=tokenizer.eot,
        pad_token_id=tokenizer.eot,
        dtype="float32",
    )
    model = NSAForCausalLM(config)
    model.model.load_state_dict(trained.model.state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot
    )
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    fast_tokenizer(tokenizer).save_pretrained(draft)
    shutil.copyfile(CODE, draft / CODE.name)
    write_text(draft / "README.md", model_card(trained))
    draft.rename(folder)


def portable(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The same sizes for any machine: the backend is chosen where the model is loaded."""
    kept = {name: value for name, value in sizes.items() if name not in NOT_SIZES}
    return kept | {"attention": {**kept["attention"], "backend": "auto"}}


def fast_tokenizer(tokenizer: AnyTokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it, with the same ids."""
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    inner = byte_tokenizer() if is_bytes else tokenizer.tokenizer
    end = None if tokenizer.eot is None else inner.id_to_token(tokenizer.eot)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=end)


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as a tokenizer of the `tokenizers` library: the id of a byte is its value."""
    # ByteLevel spells bytes as printable letters: Latin-1's own, and for the others those from 256.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [native-sparse-attention]
---

# {name}

A language model with Native Sparse Attention (arXiv 2502.11089), trained with nsa-pretrain.
Loading it needs that package: `pip install nsa-pretrain`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("The history of", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
```

- {depth} layers of width {dim}, {heads} query and {kv_heads} key/value heads of {dim_head}
- trained on sequences of {seq_len:,} tokens
{provenance}
"""


def model_card(trained: Trained) -> str:
    """What the model is, how to load it, and the command and results of the run behind it."""
    return CARD.format(provenance="\n".join(provenance(trained.run)), **trained.sizes)


def provenance(run: Path | None) -> list[str]:
    """The command and the results of a run, from its folder."""
    if run is None:
        return ["- the checkpoint lay outside its run folder: its command and results are unknown"]
    command = shlex.join(["python", "train.py", *record.overrides_of(run)])
    lines = [f"- trained by `{command}`"]
    file = run / "result.json"
    if not file.is_file():
        return [*lines, "- the run had not ended: no result is known"]
    result = json.loads(file.read_text(encoding="utf-8"))
    known = {name: value for name, value in result.items() if name.startswith(("val_", "test_"))}
    figures = [f"{name} {value:.4f}" for name, value in known.items() if value is not None]
    return [*lines, "- " + ", ".join([f"{result['steps']:,} steps", *figures])]


def load(folder: Path, *, backend: str = "auto") -> Trained:
    """The model of an exported folder, on the CPU; its run is unknown.

    Raises:
        ValueError: if a file is missing or broken.
    """
    try:
        config = NSATransformerConfig.from_pretrained(folder)
        read = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # of either library
        raise ValueError(f"ckpt={folder}: it cannot be read ({error})") from error
    sizes: dict[str, Any] = config.transformer
    sizes = sizes | {"attention": {**sizes["attention"], "backend": backend}}
    is_bytes = read.get_vocab() == byte_tokenizer().get_vocab()
    tokenizer = ByteTokenizer() if is_bytes else SubwordTokenizer(read, config.eos_token_id)
    model = Transformer(**sizes).eval()
    load_weights(model, folder, tokenizer)
    return Trained(model, tokenizer, {"name": folder.name} | sizes, folder, None)


def load_weights(model: nn.Module, folder: Path, tokenizer: AnyTokenizer) -> None:
    """Start a model from the weights of an exported folder.

    Raises:
        ValueError: if the folder holds no export, or one of other sizes or another tokenizer.
    """
    try:
        stored = load_file(folder / WEIGHTS)
        read = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # of either library: a missing file, a broken one
        raise ValueError(
            f"model.weights={folder}: it cannot be read ({error}); name a folder that export.py "
            "wrote"
        ) from error
    if read.get_vocab() != fast_tokenizer(tokenizer).get_vocab():
        raise ValueError(
            f"model.weights={folder} was trained with another tokenizer than the data's: use "
            f"data.tokenizer={folder / TOKENIZER_FILE}, or for bytes data.tokenizer=bytes"
        )
    prefix = f"{NSAForCausalLM.base_model_prefix}."
    found = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    own = model.state_dict()
    if own["head.weight"].data_ptr() == own["embedding.weight"].data_ptr():  # tied: stored once
        found.setdefault("head.weight", found["embedding.weight"])
    wrong = [
        f"  {name}: {shape_of(found.get(name))}, the model has {shape_of(own.get(name))}"
        for name in sorted(own.keys() | found.keys())
        if shape_of(found.get(name)) != shape_of(own.get(name))
    ]
    if wrong:
        more = [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError("\n".join([f"model.weights={folder}: another model:", *wrong[:10], *more]))
    model.load_state_dict(found)


def shape_of(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
