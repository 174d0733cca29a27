"""Tasks in real text: numbers hidden in it, and one of them asked for at the end."""

import numpy as np
from numpy.typing import NDArray

from data.tasks.sample import NO_EVIDENCE, Sample, Sizes, check_room

DIGITS = 5
NAMES = np.array(["amber", "birch", "cedar", "delta", "ember", "frost", "grove", "haven"])


def needle(name: str, number: str) -> bytes:
    """The sentence that hides a number, and, without the number, asks for it."""
    return f"\nThe number of {name} is {number}".encode()


def passkey(rng: np.random.Generator, sizes: Sizes, text: NDArray[np.int64]) -> Sample:
    """One number in each text, [N, T + 1], at `needle_depth`; its digits are asked for
    (arXiv 2305.16300).
    """
    sizes = sizes.with_facts(1)
    return stacked([hide(rng, sizes, each, rng.choice(NAMES, 1)) for each in text])


def needles(rng: np.random.Generator, sizes: Sizes, text: NDArray[np.int64]) -> Sample:
    """As many numbers as facts, each with a name; one name is asked for (RULER's multi-key task,
    arXiv 2404.06654). `needle_depth` places that one.
    """
    if sizes.num_facts > len(NAMES):
        raise ValueError(f"data.num_facts={sizes.num_facts}: data.task=needles has {len(NAMES)}")
    count = sizes.num_facts
    return stacked([hide(rng, sizes, t, rng.choice(NAMES, count, replace=False)) for t in text])


def stacked(samples: list[Sample]) -> Sample:
    """Single windows as one sample of all of them."""
    return Sample(*map(np.stack, zip(*samples, strict=True)))


def hide(
    rng: np.random.Generator, sizes: Sizes, text: NDArray[np.int64], names: NDArray[np.str_]
) -> Sample:
    """Put a needle for each name into the text [T + 1]; ask for the first name's number."""
    numbers = ["".join(map(str, rng.integers(0, 10, DIGITS))) for _ in names]
    hidden = [needle(*pair) + b".\n" for pair in zip(names, numbers, strict=True)]
    question = needle(names[0], numbers[0])
    begins_asking = len(text) - len(question)
    length = max(map(len, hidden))
    slots = (begins_asking - sizes.min_distance) // length
    check_room(
        "passkey" if len(names) == 1 else "needles", sizes, length * len(hidden), slots * length
    )
    asked = (
        rng.integers(slots)
        if sizes.needle_depth is None
        else round(sizes.needle_depth * (slots - 1))
    )
    others = rng.choice(np.delete(np.arange(slots), asked), len(hidden) - 1, replace=False)
    tokens = text.copy()
    for slot, sentence in zip([asked, *others], hidden, strict=True):
        tokens[slot * length : slot * length + len(sentence)] = list(sentence)
    tokens[begins_asking:] = list(question)
    evidence = np.full(sizes.seq_len, NO_EVIDENCE)
    first_digit = asked * length + len(question) - DIGITS
    evidence[-DIGITS:] = first_digit + np.arange(DIGITS)
    return Sample(tokens, evidence)
