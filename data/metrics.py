"""What a run is judged by. A datamodule names its metric; every other part takes it from there."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Metric(NamedTuple):
    """How good a model is on some tokens, as one number.

    It is logged as `train/<name>`, `val/<name>` and `test/<name>`, and stands in result.json as
    `val_<name>` and `test_<name>`.

    Args:
        name: in logs and file names.
        label: on the axis of a plot.
        better: whether a lower or a higher value is better.
        of: the value, from three means over the scored labels, numbers or tensors: nats, the share
            of labels that the model finds most likely, and bytes of text. The share is None, and
            its cost is saved, unless `counts_correct`.
        counts_correct: whether `of` needs that share.
    """

    name: str
    label: str
    better: Literal["lower", "higher"]
    of: Callable[[Any, Any, float], Any]
    counts_correct: bool = False

    @property
    def mode(self) -> str:
        """`better` in Lightning's words."""
        return "min" if self.better == "lower" else "max"


BITS_PER_BYTE = Metric(
    "bpb", "bits per byte", "lower", lambda nats, correct, bytes: nats / (math.log(2) * bytes)
)
ACCURACY = Metric(
    "accuracy", "accuracy", "higher", lambda nats, correct, bytes: correct, counts_correct=True
)
LABELS = {metric.name: metric.label for metric in (BITS_PER_BYTE, ACCURACY)}
