"""A trained model from a checkpoint: the model, its tokenizer, and the run it came from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data.tokenizer import AnyTokenizer, restored_tokenizer
from nsa.training.lightning_module import NSALightningModule
from nsa.transformer import Transformer
from runs import checkpoints, resume


class Trained(NamedTuple):
    """What a checkpoint holds besides the state of training."""

    model: Transformer
    tokenizer: AnyTokenizer
    sizes: Mapping[str, Any]  # the config `model` of its run
    checkpoint: Path
    run: Path | None  # the run's folder; None where the checkpoint was moved out of it


def find(named: str, outputs: Path = Path("outputs")) -> Path:
    """The checkpoint meant by `last`, a run folder, its checkpoints/, or a checkpoint's own path.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if no checkpoint of the run is whole.
    """
    if named == "last":
        return resume.newest_whole(resume.find_last(outputs, {}))
    if not Path(named).expanduser().exists():
        raise FileNotFoundError(f"ckpt={named}: there is no such checkpoint or run folder")
    return resume.named_checkpoint(named)


def load(path: Path, *, backend: str = "auto") -> Trained:
    """The model of a checkpoint, on the CPU and ready to be sampled from.

    Args:
        path: a checkpoint; every byte of it is checked first.
        backend: of its attention; it may differ from the one that trained it.

    Raises:
        ValueError: if it is damaged, or is not a checkpoint of this project.
    """
    content = checkpoints.check(path)
    settings = content["hyper_parameters"]
    settings["model"]["attention"]["backend"] = backend
    module = NSALightningModule(**settings | {"compile": False})
    module.load_state_dict(content["state_dict"])
    corpora = [part for part in content.values() if isinstance(part, Mapping)]
    states = [corpus["tokenizer"] for corpus in corpora if "tokenizer" in corpus]
    if not states:
        raise ValueError(f"checkpoint {path} names no tokenizer: train.py did not write it")
    run = resume.run_folder(path.resolve())
    model = module.model.eval()
    return Trained(model, restored_tokenizer(states[0]), settings["model"], path, run)
