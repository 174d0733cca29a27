"""Continue prompts with a trained model; the checkpoint is all that it needs.

    python generate.py --ckpt last --prompt "def main("
    python generate.py --ckpt outputs/…/last.ckpt --file prompt.txt --seq-len 1024 --top-p 0.95
    echo "Once upon a time" | python generate.py --ckpt outputs/my-run --file -

Text goes to stdout as it comes, speed and the cache's size to stderr. key=value works too.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro  # torch comes later, once what was typed is known to make sense

if TYPE_CHECKING:
    from runs.trained import Trained

RANGES = {  # least and most; how each works is told below
    "seq_len": (2, math.inf), "temperature": (0, math.inf), "filter_thres": (0, 1),
    "top_k": (1, math.inf), "top_p": (0, 1), "min_p": (0, 1),
    "repetition_penalty": (1e-6, math.inf),
}  # fmt: skip


@dataclass(kw_only=True)
class Options:
    """Continue prompts with a trained model."""

    ckpt: str
    """A checkpoint, a run's folder, or last: the newest run under outputs/."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Text to go on from; may be given several times."""
    file: Annotated[list[Path], tyro.conf.UseAppendAction] = field(default_factory=list)
    """A file whose text is a prompt, - for stdin; may be given several times."""
    seq_len: int = 512
    """Tokens of the longest sequence in the end, its prompt's included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    filter_thres: float = 0.9
    """The share of the vocabulary that is never drawn, the least likely first."""
    top_k: int | None = None
    """Draw only from the k likeliest tokens."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together reach this probability."""
    min_p: float | None = None
    """Draw only tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text has already become less likely."""
    seed: int = 0
    """Of the draws: the same seed gives the same text."""
    stop: bool = True
    """End a text at the token that ended documents in training, if there is one."""
    cache: bool = True
    """Keep keys and values of earlier tokens; without, every token is computed from all."""
    backend: str = "auto"
    """Of the attention: auto, or an entry of nsa.backends.BACKENDS."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""

    def check(self) -> None:
        """Raises ValueError, FileNotFoundError for a value that cannot be meant."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value} must lie between {least} and {most}")
        if self.ckpt != "last" and not Path(self.ckpt).expanduser().exists():
            raise FileNotFoundError(f"ckpt={self.ckpt}: there is no such checkpoint or run folder")
        for file in self.file:
            if str(file) != "-" and not file.is_file():
                raise FileNotFoundError(f"file={file}: there is no such file")


def parse(arguments: list[str]) -> Options:
    """Options from --key value, or from key=value, whose value is taken as typed.

    Raises:
        ValueError, FileNotFoundError: for a value that cannot be meant.
    """
    names = {each.name for each in fields(Options)}
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in names:
            spelled.append(f"--{name.replace('_', '-')}={value}")
        else:
            spelled.append(argument)
    options = tyro.cli(Options, args=spelled, description=(__doc__ or "").splitlines()[0])
    options.check()
    return options


def prompts_of(options: Options) -> list[str]:
    """Every prompt, in order; a line break if there is none."""
    texts = [*options.prompt]
    for file in options.file:
        texts.append(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"))
    return texts or ["\n"]


def generate(options: Options) -> str:
    """Print every prompt and its continuation as it comes; returns all that was printed.

    Raises:
        ValueError, FileNotFoundError: if there is no whole checkpoint, and for a prompt that the
            model or the memory is too small for.
    """
    texts = prompts_of(options)
    import torch

    from runs import trained

    found = trained.load(trained.find(options.ckpt), backend=options.backend)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = found.model.to(device, getattr(torch, options.dtype))
    prompts = [torch.tensor(found.tokenizer.encode(text)) for text in texts]
    check_prompts(texts, prompts, options, model.seq_len)
    report = check_memory(model, len(prompts), options.seq_len, device) if options.cache else ""
    stop = found.tokenizer.eot if options.stop else None
    tokens = model.stream(
        prompts, options.seq_len, options.temperature, options.filter_thres, options.cache,
        top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        repetition_penalty=options.repetition_penalty, seed=options.seed,
        stop_tokens=[] if stop is None else [stop],
    )  # fmt: skip
    return write(texts, tokens, found, stop, report)


def check_prompts(texts: list[str], prompts: list[Any], options: Options, seq_len: int) -> None:
    """Raises ValueError for a prompt that is empty or too long."""
    for text, ids in zip(texts, prompts, strict=True):
        shown = text if len(text) < 40 else f"{text[:40]}…"
        if not len(ids):
            raise ValueError(f"prompt={shown!r} encodes to no token: lengthen it")
        if len(ids) > seq_len:
            raise ValueError(
                f"prompt={shown!r} has {len(ids)} tokens and the model reads {seq_len}: shorten it"
            )
        if len(ids) >= options.seq_len:
            raise ValueError(
                f"seq_len={options.seq_len} counts the prompt's {len(ids)} tokens too: raise it"
            )


def check_memory(model: Any, batch: int, seq_len: int, device: Any) -> str:
    """The size of the cache, in words. Raises ValueError if there is no room for it."""
    import os

    import torch

    if not model.has_cache:
        return "no cache: a layer kind has none, so every token reads the whole context again"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tokens = min(seq_len, model.seq_len)
    needed = batch * sum(model.empty_cache(1, 64).bytes().values()) / 64 * tokens
    if needed < free:  # rings do not grow: the true size is smaller
        needed = batch * sum(model.empty_cache(1, tokens).bytes().values())
    if needed > free:
        raise ValueError(
            f"{batch} sequences of {tokens} tokens need a cache of {needed / 2**20:.0f} MiB and "
            f"{free / 2**20:.0f} MiB are free: lower seq_len, or give fewer prompts"
        )
    return f"cache {needed / 2**20:.2f} MiB for {batch} x {tokens} tokens"


def write(
    texts: list[str], tokens: Iterator[Any], found: "Trained", stop: int | None, report: str
) -> str:
    """Print the first text as it comes, then the others; Ctrl-C ends with what there is."""
    import time

    start, new = time.perf_counter(), [[] for _ in texts]
    shown = texts[0]
    print(shown, end="", flush=True)
    try:
        for step in tokens:
            for ids, token in zip(new, step.tolist(), strict=True):
                if token >= 0 and token != stop:
                    ids.append(token)
            text = texts[0] + whole_characters(found.tokenizer.decode(new[0]))
            print(text[len(shown) :], end="", flush=True)
            shown = max(shown, text, key=len)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    seconds = time.perf_counter() - start
    whole = [text + found.tokenizer.decode(ids) for text, ids in zip(texts, new, strict=True)]
    print("\n\n".join([whole[0][len(shown) :], *whole[1:]]), flush=True)
    count = sum(map(len, new))
    print(
        f"{count} tokens, {count / seconds:.1f} tokens/s; {report or 'no cache'}", file=sys.stderr
    )
    return "\n\n".join(whole)


def whole_characters(text: str) -> str:
    """The text up to its last character that is complete: bytes of one may still be to come."""
    return text.rstrip("\ufffd")


if __name__ == "__main__":
    try:
        generate(parse(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
