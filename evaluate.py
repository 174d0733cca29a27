"""Take a trained model apart: what it loses where, what each branch does, what it can look up.

    python evaluate.py ckpt=last
    python evaluate.py ckpt=outputs/…/last.ckpt what=bpb,positions split=val stride=1024
    python evaluate.py ckpt=exports/mine data=text 'data.paths=[book.txt]' out=evaluations/mine

The corpus is that of the run; data=… and data.<option>=… name another one, as for train.py.
Writes evaluate.json and pictures; progress goes to stderr. --key value works too.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import tyro  # torch comes later, once what was typed is known to make sense

PARTS = {
    "bpb": "the metric of the whole split, in windows side by side and in sliding ones",
    "positions": "the metric by position in the window, in powers of two",
    "knockouts": "the metric with the gate of one branch at zero: in all layers, and in each",
    "selection": "the metric against n, with learned, oracle and random selection",
    "passkey": "accuracy by length of the text and depth of the number hidden in it",
    "recall": "accuracy on the labels that a task asks for (data=recall)",
}


@dataclass(kw_only=True)
class Options:
    """Take a trained model apart."""

    ckpt: str
    """A checkpoint, a run's folder, last (the newest run under outputs/), or an exported folder."""
    what: str = "auto"
    """Parts, separated by commas; auto: all that the corpus and the model allow."""
    out: Path | None = None
    """Folder of evaluate.json and pictures; by default evaluation/ in the run's folder."""
    split: Literal["train", "val", "test"] = "test"
    """What is scored."""
    window: int | None = None
    """Tokens that the model reads at once; by default those of its training."""
    stride: int | None = None
    """Of sliding windows: each scores its last so many labels; by default half a window."""
    max_tokens: int | None = None
    """Score only the first so many tokens of the split."""
    sample_windows: int = 32
    """Windows, evenly spread over the split, for knockouts and selection."""
    n: list[int] = field(default_factory=list)
    """Numbers of selected blocks to try; by default around the one of training."""
    passkeys: int = 10
    """Texts for each length and depth."""
    batch: int = 4
    """Windows that are computed at once."""
    backend: str = "auto"
    """Of the attention: auto, or an entry of nsa.backends.BACKENDS."""
    precision: Literal["float32", "bf16-mixed"] = "float32"
    """bf16-mixed computes products in bfloat16, as training on a GPU does."""
    data: tyro.conf.Suppress[list[str]] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError, FileNotFoundError for a value that cannot be meant."""
        for name in ("window", "stride", "max_tokens", "sample_windows", "passkeys", "batch"):
            value = getattr(self, name)
            if value is not None and value < (least := 2 if name == "max_tokens" else 1):
                raise ValueError(f"{name}={value} must be at least {least}")
        if any(n < 1 for n in self.n):
            raise ValueError(
                f"n={min(self.n)} must be at least 1; what=knockouts turns branches off"
            )
        self.check_stride(self.window)
        if unknown := {*self.parts()} - PARTS.keys():
            raise ValueError(
                f"what={min(unknown)} is unknown: choose of {', '.join(PARTS)}, or auto"
            )
        if self.ckpt != "last" and not Path(self.ckpt).expanduser().exists():
            raise FileNotFoundError(f"ckpt={self.ckpt}: there is no such checkpoint or folder")

    def parts(self) -> list[str]:
        """The parts that were typed; none: auto."""
        return [] if self.what == "auto" else self.what.replace(" ", "").split(",")

    def check_stride(self, window: int | None) -> None:
        """Raises ValueError for a stride that would leave labels out."""
        if window is not None and self.stride is not None and self.stride > window:
            raise ValueError(
                f"stride={self.stride} is longer than the window of {window} tokens, and would "
                f"leave labels out: it must be at most {window}"
            )


def parse(arguments: list[str]) -> Options:
    """Options from --key value, or from key=value; data=… and data.<option>=… are kept as typed.

    Raises:
        ValueError, FileNotFoundError: for a value that cannot be meant.
    """
    names = {each.name for each in fields(Options)} - {"data"}
    spelled: list[str] = []
    data: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and (name == "data" or name.startswith("data.")):
            data.append(argument)
        elif equals and name == "n":
            spelled += ["--n", *value.split(",")]
        elif equals and name in names:
            spelled.append(f"--{name.replace('_', '-')}={value}")
        else:
            spelled.append(argument)
    about = [f"{name}: {meaning}" for name, meaning in PARTS.items()]
    description = "\n\n".join([(__doc__ or "").splitlines()[0], "Parts:", *about])
    options = tyro.cli(Options, args=spelled, description=description)
    options.data = data
    options.check()
    return options


if __name__ == "__main__":
    try:
        options = parse(sys.argv[1:])
        from runs import evaluation

        print(evaluation.evaluate(options))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
