"""A lock on a path, of one process at a time, that says who it waits for."""

import errno
import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

# What file systems answer that have no locks: Lustre, NFS, those of object stores.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
FIRST_LOOK = 2  # seconds to wait for another process without a word


class NamedLock:
    """A `filelock` whose file names its holder: process and machine, a line each.

    The system releases it when its process dies. Where the file system knows no such lock, the file
    itself is the lock: one of this machine is still released, one of another machine, or without a
    name, has to be deleted by hand, and whoever waits says which.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path) if has_locks(path.parent) else SoftFileLock(path)

    def acquire(self, patience: float = -1) -> None:
        """Wait for it, at most so many seconds; below 0, as long as it takes.

        Raises:
            Timeout: if another process still holds it.
        """
        first = FIRST_LOOK if patience < 0 else min(patience, FIRST_LOOK)
        try:
            self.take(first)
        except Timeout:
            log.warning("%s", self.waiting())
            self.take(patience if patience < 0 else patience - first)

    def take(self, patience: float = 0) -> None:
        """As `acquire`, without a word."""
        self._lock.acquire(timeout=patience)
        if not isinstance(self._lock, SoftFileLock):  # that one names its holder itself
            self.path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")

    def release(self) -> None:
        self._lock.release()

    def holder(self) -> str:
        """Who the file says holds it."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        if len(lines) < 2:
            return "a process that left no name"
        return f"process {lines[0]} on {lines[1]}"

    def waiting(self) -> str:
        """What to say to somebody who waits."""
        return (
            f"waiting for {self.holder()}, which holds {self.path}; if it is not running any more, "
            "delete that file"
        )


def has_locks(folder: Path) -> bool:
    """Whether the system can lock a file in this folder."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, waiting for it as long as it takes."""
    lock = NamedLock(path)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
