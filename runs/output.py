"""What is printed, and what becomes of a run where nobody can read it."""

import io
import os
import sys
from typing import TextIO


class OutlivingStream(io.TextIOBase):
    """A text stream that drops what is written once that fails: its reader has gone, as in
    `train.py | head`, its terminal was closed, or its disk is full.

    A character that the encoding of the output lacks is written as a question mark.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._drop_from_now_on()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._drop_from_now_on()

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def _drop_from_now_on(self) -> None:
        with nowhere() as dropped:
            os.dup2(dropped.fileno(), self.stream.fileno())


def outlive_readers() -> None:
    """From here on, a closed output or one of few characters ends nothing."""
    sys.stdout = OutlivingStream(sys.stdout or nowhere())  # none where it was closed from the start
    sys.stderr = OutlivingStream(sys.stderr or nowhere())


def nowhere() -> TextIO:
    return open(os.devnull, "w")
