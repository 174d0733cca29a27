"""Tasks of symbols: keys and values among filler, each kind with ids of its own.

Letters: N windows, F facts in each.
"""

import numpy as np
from numpy.typing import NDArray

from data.tasks.sample import KEYS, VALUES, Sample, Sizes, blank, check_room

Ints = NDArray[np.int64]


def recall(rng: np.random.Generator, sizes: Sizes, count: int) -> Sample:
    """Scattered multi-query associative recall (MQAR, arXiv 2312.04927): key, value, key, value
    in clusters among filler; then some of the keys again, each with its value as the label.
    """
    room = recall_room("recall", sizes)
    return facts_and_questions(rng, sizes, scattered(rng, sizes, room, count))


def straddle(rng: np.random.Generator, sizes: Sizes, count: int) -> Sample:
    """Recall whose keys all have one place in the grid of blocks: by default the last of a block,
    so that the block which holds a value does not hold its key.
    """
    offset = sizes.block_size - 1 if sizes.offset is None else sizes.offset
    slots = np.arange(offset, recall_room("straddle", sizes) - 1, sizes.block_size)
    check_room("straddle", sizes, sizes.num_facts * sizes.block_size, len(slots) * sizes.block_size)
    starts = np.sort(distinct(rng, slots, sizes.num_facts, count))
    return facts_and_questions(rng, sizes, starts)


def induction(rng: np.random.Generator, sizes: Sizes, count: int) -> Sample:
    """A row of values comes again at the end: each of its tokens but the first is asked for."""
    length = sizes.num_facts
    first_question = sizes.seq_len + 1 - length
    room = first_question - sizes.min_distance
    check_room("induction", sizes, length, room)
    sample = blank(rng, sizes, count)
    row = distinct(rng, np.concatenate([KEYS, VALUES]), length, count)
    places = rng.integers(0, room - length + 1, (count, 1)) + np.arange(length)
    np.put_along_axis(sample.tokens, places, row, axis=1)
    sample.tokens[:, first_question:] = row
    sample.evidence[:, first_question:] = places[:, 1:]
    return sample


def selective_copy(rng: np.random.Generator, sizes: Sizes, count: int) -> Sample:
    """Values scattered among filler are asked for in their order (arXiv 2312.00752, section 4)."""
    first_label = sizes.seq_len + 1 - sizes.num_facts
    room = first_label - 1 - sizes.min_distance
    check_room("selective_copy", sizes, sizes.num_facts, room)
    sample = blank(rng, sizes, count)
    places = np.sort(distinct(rng, np.arange(room), sizes.num_facts, count))
    values = rng.choice(VALUES, places.shape)
    np.put_along_axis(sample.tokens, places, values, axis=1)
    sample.tokens[:, first_label - 1] = KEYS[0]  # copy from here on
    sample.tokens[:, first_label:] = values
    sample.evidence[:, first_label - 1 :] = places
    return sample


def distinct(rng: np.random.Generator, choices: Ints, num: int, count: int) -> Ints:
    """For each of `count` windows `num` of the choices, none of them twice: [N, num]."""
    return choices[rng.random((count, len(choices))).argsort(axis=1)[:, :num]]


def recall_room(task: str, sizes: Sizes) -> int:
    """The tokens in front that may hold facts, checked to be enough."""
    room = sizes.seq_len + 1 - 2 * sizes.num_questions - sizes.min_distance
    check_room(task, sizes, 2 * sizes.num_facts, room)
    return room


def scattered(rng: np.random.Generator, sizes: Sizes, room: int, count: int) -> Ints:
    """Where facts of two tokens begin, [N, F]: in clusters, anywhere in `room`, none on another."""
    facts = np.arange(sizes.num_facts)
    cluster = facts // sizes.facts_per_cluster
    free = room - 2 * sizes.num_facts
    gaps = np.sort(rng.integers(0, free + 1, (count, cluster[-1] + 1)))
    return gaps[:, cluster] + 2 * facts


def facts_and_questions(rng: np.random.Generator, sizes: Sizes, starts: Ints) -> Sample:
    """Facts at `starts`, [N, F], then questions to the end of each window."""
    count = len(starts)
    sample = blank(rng, sizes, count)
    keys = distinct(rng, KEYS, sizes.num_facts, count)
    values = rng.choice(VALUES, starts.shape)
    np.put_along_axis(sample.tokens, starts, keys, axis=1)
    np.put_along_axis(sample.tokens, starts + 1, values, axis=1)
    asked = distinct(rng, np.arange(sizes.num_facts), sizes.num_questions, count)
    questions = sizes.seq_len + 1 - 2 * sizes.num_questions + 2 * np.arange(sizes.num_questions)
    sample.tokens[:, questions] = np.take_along_axis(keys, asked, axis=1)
    sample.tokens[:, questions + 1] = np.take_along_axis(values, asked, axis=1)
    sample.evidence[:, questions] = np.take_along_axis(starts, asked, axis=1) + 1
    return sample
