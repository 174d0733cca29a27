"""Which GPU of this machine is free: a lock on each, held while a job of a sweep runs on it."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import Timeout

from runs.file_lock import NamedLock

log = logging.getLogger(__name__)


def visible() -> dict[int, str]:
    """The GPUs that this process sees: number -> the id that every process knows it by."""
    numbers = range(torch.cuda.device_count())
    return {number: str(torch.cuda.get_device_properties(number).uuid) for number in numbers}


def lock_folder() -> Path:
    """Shared by all processes of this user on this machine."""
    return Path(tempfile.gettempdir(), f"nsa-gpus-{os.getuid()}")


@contextmanager
def free_gpu(
    choice: Mapping[int, str], folder: Path | None = None, poll_seconds: float = 1.0
) -> Iterator[int]:
    """The number of a GPU that nobody else holds, waited for if need be and held until the end.

    The system lets go of the lock of a process that dies; see `NamedLock` where it cannot.

    Args:
        choice: the GPUs to choose from, as `visible` has them.
        folder: where the locks lie; None is `lock_folder`.
        poll_seconds: between two looks while all are taken.
    """
    folder = folder or lock_folder()
    folder.mkdir(parents=True, exist_ok=True)
    locks = {number: NamedLock(folder / f"{gpu}.lock") for number, gpu in choice.items()}
    number = acquire_any(locks)
    if number is None:
        for lock in locks.values():
            log.warning("%s", lock.waiting())
    while number is None:
        time.sleep(poll_seconds)
        number = acquire_any(locks)
    try:
        yield number
    finally:
        locks[number].release()


def acquire_any(locks: Mapping[int, NamedLock]) -> int | None:
    """Take the first lock that is free and return its number; None where all are taken."""
    for number, lock in locks.items():
        try:
            lock.take()
        except Timeout:
            continue
        return number
    return None
