"""Continue a prompt with a trained model; the checkpoint is all that it needs.

python generate.py ckpt=last prompt="def main("
python generate.py ckpt=outputs/…/last.ckpt prompt="Anarchism" seq_len=1024 temperature=0.8
"""

import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import restored_tokenizer
from nsa.training.lightning_module import NSALightningModule
from runs import checkpoints, resume


@dataclass(kw_only=True)
class Options:
    ckpt: str  # a checkpoint, or last: the newest under outputs/
    prompt: str = "\n"
    seq_len: int = 512  # tokens in all, the prompt's included
    temperature: float = 1.0  # 0 takes the likeliest token
    filter_thres: float = 0.9  # the share of the vocabulary that is never drawn
    seed: int = 0
    backend: str = "auto"


def parse(arguments: list[str]) -> Options:
    """Options from key=value; a value is taken as typed, whatever signs it holds.

    Raises:
        ValueError: for a key that is unknown, missing or not followed by a value of its type.
    """
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Options)}
    required = [field.name for field in fields(Options) if field.default is MISSING]
    pairs = [argument.partition("=") for argument in arguments]
    typed = {name: value for name, _, value in pairs}
    if unknown := [key for key in typed if key not in kinds]:
        raise ValueError(f"{unknown[0]!r} is unknown: choose of {', '.join(kinds)}, as key=value")
    if missing := [key for key in required if not typed.get(key)]:
        raise ValueError(f"{missing[0]}= is missing")
    try:
        return Options(**{key: kinds[key](value) for key, value in typed.items()})
    except ValueError as error:
        raise ValueError(f"{' '.join(arguments)}: {error}") from error


def generate(options: Options) -> str:
    """The prompt and what the model makes of it."""
    path = Path(options.ckpt)
    if options.ckpt == "last":
        path = resume.newest_whole(resume.find_last(Path("outputs"), {}))
    if not path.exists():
        raise FileNotFoundError(f"ckpt={path}: there is no such checkpoint")
    checkpoint = checkpoints.check(path)
    settings = checkpoint["hyper_parameters"]
    settings["model"]["attention"]["backend"] = options.backend
    module = NSALightningModule(**settings | {"compile": False})
    module.load_state_dict(checkpoint["state_dict"])

    tokenizer = restored_tokenizer(checkpoints.corpus_of(checkpoint)["tokenizer"])
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(options.seed)
    prompt = torch.tensor([tokenizer.encode(options.prompt)], device=device)
    ids = module.model.to(device).sample(
        prompt, options.seq_len, options.temperature, options.filter_thres
    )
    return options.prompt + tokenizer.decode(ids[0].tolist())


if __name__ == "__main__":
    try:
        print(generate(parse(sys.argv[1:])))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"generate.py: {error}")
