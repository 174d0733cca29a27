"""Tasks of symbols: keys and values among filler, each kind with ids of its own."""

import numpy as np
from numpy.typing import NDArray

from data.tasks.sample import KEYS, VALUES, Sample, Sizes, blank, check_room


def recall(rng: np.random.Generator, sizes: Sizes) -> Sample:
    """Scattered multi-query associative recall (MQAR, arXiv 2312.04927): key, value, key, value
    in clusters among filler; then some of the keys again, each with its value as the label.
    """
    room = recall_room("recall", sizes)
    starts = scattered(rng, sizes.num_facts, sizes.facts_per_cluster, room)
    return facts_and_questions(rng, sizes, starts)


def straddle(rng: np.random.Generator, sizes: Sizes) -> Sample:
    """Recall whose keys all have one place in the grid of blocks: by default the last of a block,
    so that the block which holds a value does not hold its key.
    """
    offset = sizes.block_size - 1 if sizes.offset is None else sizes.offset
    slots = np.arange(offset, recall_room("straddle", sizes) - 1, sizes.block_size)
    check_room("straddle", sizes, sizes.num_facts * sizes.block_size, len(slots) * sizes.block_size)
    starts = np.sort(rng.choice(slots, sizes.num_facts, replace=False))
    return facts_and_questions(rng, sizes, starts)


def induction(rng: np.random.Generator, sizes: Sizes) -> Sample:
    """A row of values comes again at the end: each of its tokens but the first is asked for."""
    length = sizes.num_facts
    first_question = sizes.seq_len + 1 - length
    room = first_question - sizes.min_distance
    check_room("induction", sizes, length, room)
    sample = blank(rng, sizes)
    row = rng.choice(np.concatenate([KEYS, VALUES]), length, replace=False)
    start = rng.integers(0, room - length + 1)
    sample.tokens[start : start + length] = row
    sample.tokens[first_question:] = row
    sample.evidence[first_question:] = np.arange(start + 1, start + length)
    return sample


def selective_copy(rng: np.random.Generator, sizes: Sizes) -> Sample:
    """Values scattered among filler are asked for in their order (arXiv 2312.00752, section 4)."""
    first_label = sizes.seq_len + 1 - sizes.num_facts
    room = first_label - 1 - sizes.min_distance
    check_room("selective_copy", sizes, sizes.num_facts, room)
    sample = blank(rng, sizes)
    places = np.sort(rng.choice(room, sizes.num_facts, replace=False))
    values = rng.choice(VALUES, sizes.num_facts)
    sample.tokens[places] = values
    sample.tokens[first_label - 1] = KEYS[0]  # copy from here on
    sample.tokens[first_label:] = values
    sample.evidence[first_label - 1 :] = places
    return sample


def recall_room(task: str, sizes: Sizes) -> int:
    """The tokens in front that may hold facts, checked to be enough."""
    room = sizes.seq_len + 1 - 2 * sizes.num_questions - sizes.min_distance
    check_room(task, sizes, 2 * sizes.num_facts, room)
    return room


def scattered(
    rng: np.random.Generator, num_facts: int, per_cluster: int, room: int
) -> NDArray[np.int64]:
    """Where facts of two tokens begin: clusters of `per_cluster`, anywhere in `room`, none on
    another.
    """
    sizes = np.full(-(-num_facts // per_cluster), per_cluster)
    sizes[-1] = num_facts - per_cluster * (len(sizes) - 1)
    free = room - 2 * num_facts
    gaps = np.sort(rng.integers(0, free + 1, len(sizes)))
    begins = gaps + 2 * np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.concatenate([b + 2 * np.arange(n) for b, n in zip(begins, sizes, strict=True)])


def facts_and_questions(
    rng: np.random.Generator, sizes: Sizes, starts: NDArray[np.int64]
) -> Sample:
    """Facts at `starts`, then questions to the end of the window."""
    sample = blank(rng, sizes)
    keys = rng.choice(KEYS, sizes.num_facts, replace=False)
    values = rng.choice(VALUES, sizes.num_facts)
    sample.tokens[starts], sample.tokens[starts + 1] = keys, values
    asked = rng.choice(sizes.num_facts, sizes.num_questions, replace=False)
    questions = sizes.seq_len + 1 - 2 * sizes.num_questions + 2 * np.arange(sizes.num_questions)
    sample.tokens[questions], sample.tokens[questions + 1] = keys[asked], values[asked]
    sample.evidence[questions] = starts[asked] + 1
    return sample
