"""Work in a process of its own, beside the training, and what became of it."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from functools import partialmethod
from multiprocessing.connection import Connection

from tqdm import tqdm

from data.loader_signals import leave_signals_to_the_trainer


class Background:
    """A function without arguments in a fresh process, which ends with this one at the latest.

    It draws no progress bars, and leaves signals to the process that started it.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share threads and CUDA
        self._told, tell = context.Pipe(duplex=False)
        self._process = context.Process(target=_do, args=(work, tell), daemon=True)
        self._process.start()
        tell.close()
        self._failure: str | None = None

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def failure(self) -> str | None:
        """Why it failed; None as long as it runs, and if it is done."""
        if self._failure is None and not self.running and self._process.exitcode:
            told = self._told.recv() if self._told.poll() else None
            self._failure = told or f"its process ended with exit code {self._process.exitcode}"
        return self._failure

    def stop(self) -> None:
        """End it, wherever it is."""
        self._process.terminate()
        self._process.join()


def _do(work: Callable[[], None], tell: Connection) -> None:
    leave_signals_to_the_trainer(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]
    try:
        work()
    except Exception as error:
        known = isinstance(error, ValueError | OSError)
        tell.send(str(error) if known else traceback.format_exc())
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
