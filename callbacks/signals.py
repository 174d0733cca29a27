"""Signals that end the program. Imports no torch: train.py listens before it does anything else."""

import contextlib
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def exit_code(which: int) -> int:
    """128 + SIGINT after Ctrl-C; after any other signal 128 + SIGTERM, at which a cluster starts
    the run again."""
    return 128 + (signal.SIGINT if which == signal.SIGINT else signal.SIGTERM)


def leave_on_signals() -> None:
    """From here on a signal ends the program at once, in order, without a traceback."""

    def leave(which: int, frame: FrameType | None) -> None:
        if which == signal.SIGINT:
            first_interrupt("interrupted")
        sys.exit(exit_code(which))

    for which in heard(*SIGNALS):
        signal.signal(which, leave)


def heard(*signals: signal.Signals) -> list[signal.Signals]:
    """Those that this program was not started to ignore, as it is by nohup, which hides SIGHUP."""
    return [which for which in signals if signal.getsignal(which) != signal.SIG_IGN]


def first_interrupt(answer: str | None) -> None:
    """Answer a Ctrl-C. The system itself acts on the next one, whatever is running by then."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if answer is not None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, f"\n{answer}\n".encode())  # print may be what was interrupted
