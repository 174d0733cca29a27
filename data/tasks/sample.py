"""What a task makes: tokens, which labels are asked, and where their answers stand."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KEYS = np.arange(0, 64)  # ids of keys, of values, and of what lies between facts
VALUES = np.arange(64, 128)
FILLER = np.arange(128, 256)
NO_EVIDENCE = -1
NO_TOKEN = -1


class Sample(NamedTuple):
    """Windows of a task, or one without the first dimension.

    Args:
        tokens: [N, T + 1].
        evidence: [N, T], for each label that is asked the position of the token which answers it,
            for the others `NO_EVIDENCE`.
    """

    tokens: NDArray[np.int64]
    evidence: NDArray[np.int64]

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Which labels are asked: [N, T]."""
        return self.evidence != NO_EVIDENCE


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a task is.

    Args:
        seq_len: T, the labels in a window.
        num_facts: facts, tokens or needles to remember.
        num_questions: of them that are asked for at the end.
        facts_per_cluster: that stand one right after the other: several in a compressed block, so
            that one compressed key cannot hold them all.
        min_distance: tokens between an answer and its question, at least: more than the window
            times the number of layers, or a window-only model hands the answer on through depth.
        block_size: of the task straddle: its facts stand where the grid of blocks cuts them.
        offset: of the task straddle: the place of a key in its block; None: the last one, so that
            its value is the first token of the next block.
        needle_depth: of the tasks in text: where in it the needle stands, from 0 to 1; None:
            anywhere.
    """

    seq_len: int
    num_facts: int
    num_questions: int
    facts_per_cluster: int = 1
    min_distance: int = 0
    block_size: int = 16
    offset: int | None = None
    needle_depth: float | None = None

    def with_facts(self, num_facts: int) -> "Sizes":
        """The same with another number of facts, and no more questions than these."""
        questions = min(self.num_questions, num_facts)
        return Sizes(**{**vars(self), "num_facts": num_facts, "num_questions": questions})

    def of_document(self, documents: int) -> "Sizes":
        """Of each of so many documents that share a window: of everything a part.

        A document has as many tokens as labels: the token behind its last one is another's.
        """
        if documents == 1:
            return self
        parts = {
            "seq_len": self.seq_len // documents - 1,
            "num_facts": max(self.num_facts // documents, min(self.num_facts, 2)),
            "num_questions": max(self.num_questions // documents, 1),
            "min_distance": self.min_distance // documents,
        }
        return Sizes(**{**vars(self), **parts})


def blank(rng: np.random.Generator, sizes: Sizes, count: int) -> Sample:
    """Windows of filler in which nothing is asked."""
    tokens = rng.choice(FILLER, (count, sizes.seq_len + 1))
    return Sample(tokens, np.full((count, sizes.seq_len), NO_EVIDENCE))


def in_one_window(documents: Sample) -> Sample:
    """Documents of [N, L] tokens side by side, and a token behind them that nobody is asked for."""
    tokens, evidence = documents
    count, length = tokens.shape
    first = length * np.arange(count)[:, None]
    evidence = np.where(evidence == NO_EVIDENCE, NO_EVIDENCE, evidence + first)
    evidence = np.pad(evidence, ((0, 0), (0, 1)), constant_values=NO_EVIDENCE)
    return Sample(np.append(tokens.reshape(-1), NO_TOKEN), evidence.reshape(-1))


def check_room(task: str, sizes: Sizes, needed: int, room: int) -> None:
    """Refuse a window that is too short for what it must hold."""
    if needed > room:
        raise ValueError(
            f"data.task={task}: {sizes.num_facts} facts need {needed} tokens, and "
            f"model.seq_len={sizes.seq_len} leaves {max(room, 0)} before data.min_distance="
            f"{sizes.min_distance} and the questions: raise model.seq_len, or lower "
            "data.num_facts, data.num_questions or data.min_distance"
        )
