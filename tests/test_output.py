"""Does a run outlive an output that nobody reads, or that lacks its characters?"""

import io
import os

from runs.output import OutlivingStream


def test_what_nobody_reads_is_dropped() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        stream = OutlivingStream(pipe)
        for _ in range(2):
            print("a line", file=stream, flush=True)


def test_a_character_that_the_output_lacks_is_a_question_mark() -> None:
    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, "ascii")
    print("1 × cpu", file=OutlivingStream(text), flush=True)
    assert raw.getvalue() == b"1 ? cpu\n"
