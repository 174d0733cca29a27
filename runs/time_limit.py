"""A limit for each start of a run, which then goes on with the same command line."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer

from callbacks.preemption import Preemption


def seconds(limit: str) -> float:
    """Of DD:HH:MM:SS.

    Raises:
        ValueError: for another form.
    """
    if not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", str(limit)):
        raise ValueError(f"max_time_per_start={limit} must have the form DD:HH:MM:SS, in quotes")
    days, hours, minutes, rest = (int(part) for part in str(limit).split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def check(limit: str | None, trainer: Trainer) -> None:
    """Refuse a limit of another form, or one that nobody would save for.

    Raises:
        ValueError: naming the way out.
    """
    if limit is None:
        return
    seconds(limit)
    if not any(isinstance(c, Preemption) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"max_time_per_start={limit} saves through callbacks.preemption: keep that callback"
        )


@contextmanager
def per_start(limit: str | None) -> Iterator[None]:
    """After so long, this process tells itself to save and to end, as a cluster would."""
    if limit is None:
        yield
        return
    tell = threading.Timer(seconds(limit), os.kill, (os.getpid(), signal.SIGUSR1))
    tell.daemon = True
    tell.start()
    try:
        yield
    finally:
        tell.cancel()
