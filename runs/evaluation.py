"""What evaluate.py does: load a model and its corpus, score it part by part, write what was found.

Losses are means over scored labels, in the metric of the data: bits per byte, or accuracy.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate

from data.base import TokenDataModule
from data.tasks.datamodule import RecallDataModule
from data.tokenizer import ByteTokenizer
from nsa.transformer import sparse_layers
from runs import command_line, evaluation_plot, export, record, trained
from runs.evaluation_parts import PARTS
from runs.folder import replacing, write_json
from runs.scorer import Scorer
from runs.trained import Trained

Options = Any  # evaluate.Options: the door is above this room


def evaluate(options: Options) -> str:
    """Score all parts and write evaluate.json and pictures; the results in words.

    Raises:
        ValueError, FileNotFoundError: if the model, the corpus or a part cannot be had; before
            anything is scored.
    """
    found = load(options.ckpt, options.backend)
    corpus = corpus_of(found, options)
    window = options.window or found.model.seq_len
    options.check_stride(window)
    parts = parts_of(options, found, corpus)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    scorer = Scorer(found.model.to(device), corpus, options, window)
    if options.stride and not scorer.slides:
        raise ValueError(
            f"stride={options.stride}: windows slide over a single text, not over packed documents "
            "or a mixture: leave it out, or add data.pack=stream, or name one corpus"
        )
    folder = options.out or default_folder(found)
    results: dict[str, Any] = {"checkpoint": str(found.checkpoint), "model": found.sizes["name"]}
    results |= scorer.protocol(device)
    for part in parts:
        results[part] = PARTS[part](scorer)
        write_json(folder / "evaluate.json", results)
        if part in evaluation_plot.PICTURES:
            figure = evaluation_plot.PICTURES[part](results)
            with replacing(folder / f"{part}.png") as draft:
                figure.savefig(draft, dpi=130)
    return f"{summary(results)}\n{folder / 'evaluate.json'}"


def load(named: str, backend: str) -> Trained:
    """The model of a checkpoint or of an exported folder."""
    if named != "last" and (Path(named) / export.WEIGHTS).is_file():
        return export.load(Path(named), backend=backend)
    return trained.load(trained.find(named), backend=backend)


def default_folder(found: Trained) -> Path:
    """In the run's folder; beside a checkpoint that lies elsewhere."""
    if found.run is not None:
        return found.run / "evaluation"
    return found.checkpoint.with_name(f"{found.checkpoint.stem}_evaluation")


def corpus_of(found: Trained, options: Options) -> TokenDataModule:
    """The corpus of the run, or the one that was typed; ready to be read.

    Raises:
        ValueError: if none is known, or if it has another tokenizer than the model.
    """
    before: list[str] = []
    flags = {}
    if found.run is not None:
        flags = record.flags_before(found.checkpoint.resolve())
        before = record.overrides_of(found.run)
    elif not any(word.startswith("data=") for word in options.data):
        raise ValueError(
            f"ckpt={options.ckpt} lies outside its run folder, which names its corpus: add data=, "
            "as in data=enwik8"
        )
    try:
        config, unfit = command_line.compose(flags, [*before, *options.data])
    except HydraException as error:
        raise ValueError(f"{' '.join(options.data)}: {error}") from error
    if wrong := [word for word in unfit if word in options.data]:
        raise ValueError(f"{wrong[0]}: the corpus has no such option")
    sizes = {"seq_len": options.window or found.model.seq_len, "num_workers": 0}
    sizes |= {"micro_batch_size": options.batch, "vocab_size": found.sizes["vocab_size"]}
    corpus = instantiate(config.data, **sizes)
    corpus.document_alignment = found.model.document_alignment or 1
    corpus.prepare_data()
    corpus.setup()
    if corpus.tokenizer.state() != found.tokenizer.state():
        raise ValueError(
            f"data={corpus.name} is split into other tokens than the model was trained on: choose "
            "the corpus of its run, or give data.tokenizer the run's"
        )
    return corpus


class Needs(NamedTuple):
    """Whether a part can be had, and what it takes."""

    holds: bool
    what: str


def parts_of(options: Options, found: Trained, corpus: TokenDataModule) -> list[str]:
    """The parts to score. Raises ValueError for one that was asked for and cannot be had."""
    is_task = isinstance(corpus, RecallDataModule)
    sparse = sparse_layers(found.model).values()
    reads_bytes = isinstance(found.tokenizer, ByteTokenizer) and found.sizes["vocab_size"] == 256
    text = Needs(not is_task, "needs text: a task scores no other labels than those it asks for")
    needs = {
        "bpb": text,
        "positions": text,
        "knockouts": Needs(bool(sparse), "needs a model with NSA layers"),
        "selection": Needs(
            any(each.cfg.num_selected_blocks for each in sparse),
            "needs a model with NSA layers that select blocks",
        ),
        "passkey": Needs(reads_bytes, "needs a model of bytes (vocab_size=256)"),
        "recall": Needs(is_task, "needs a task: add data=recall"),
    }
    if is_task and options.split == "train":
        raise ValueError("split=train of a task is endless: choose val or test")
    for part in options.parts():
        if not needs[part].holds:
            raise ValueError(f"what={part} {needs[part].what}")
    return options.parts() or [part for part in PARTS if needs[part].holds]


def summary(results: dict[str, Any]) -> str:
    """The main figure of each part, a line each."""
    lines = []
    metric = results["metric"]
    if bpb := results.get("bpb"):
        for name, row in bpb.items():
            lines.append(
                f"{metric} {row[metric]:.4f} {name.replace('_', ' ')}: {row['labels']:,} labels, "
                f"window {row['window']}, stride {row['stride']}"
            )
            for corpus, part in row.get("corpora", {}).items():
                lines.append(f"{metric} {part[metric]:.4f} {corpus}: {part['labels']:,} labels")
    if knockouts := results.get("knockouts"):
        lines += [
            f"without {row['branch']}: {metric} {row[metric]:.4f} ({row['change']:+.4f})"
            for row in knockouts["rows"]
            if row["layer"] is None
        ]
    if selection := results.get("selection"):
        lines += [
            f"n {row['n']:>4} {row['selection']:<8} {metric} {row[metric]:.4f}"
            for row in selection["rows"]
        ]
    for part in ("passkey", "recall"):
        if part in results:
            lines.append(f"{part}: accuracy {results[part]['accuracy']:.4f}")
    for row in results.get("recall", {}).get("offsets", ()):
        lines.append(f"key at {row['offset']:>2} of its block: accuracy {row['accuracy']:.4f}")
    return "\n".join(lines)
