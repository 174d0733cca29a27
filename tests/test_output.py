"""Does a run outlive an output that nobody reads, or that lacks its characters?"""

import io
import os
import pty
import sys

from runs.output import OutlivingStream, outlive_readers


def test_what_nobody_reads_is_dropped() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        stream = OutlivingStream(pipe)
        for _ in range(2):
            print("a line", file=stream, flush=True)


def test_a_closed_terminal_and_a_full_disk_end_nothing() -> None:
    terminal, inside = pty.openpty()
    os.close(terminal)
    for output in (inside, os.open("/dev/full", os.O_WRONLY)):
        with os.fdopen(output, "w") as stream:
            for _ in range(2):
                print("a line", file=OutlivingStream(stream), flush=True)


def test_an_output_that_was_closed_from_the_start_is_none(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after >&-
    monkeypatch.setattr(sys, "stderr", None)
    outlive_readers()
    print("a line", flush=True)
    for output in (sys.stdout, sys.stderr):
        output.stream.close()  # type: ignore[union-attr]


def test_a_character_that_the_output_lacks_is_a_question_mark() -> None:
    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, "ascii")
    print("1 × cpu", file=OutlivingStream(text), flush=True)
    assert raw.getvalue() == b"1 ? cpu\n"
