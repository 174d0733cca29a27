"""Rows of text files, looked at before a library reads them or where it could not."""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data.sources import unpacked

SAMPLED = 16  # rows of a CSV file that tell how long its rows are


def broken_line(files: list[Path], column: str) -> str | None:
    """The first line of JSON Lines that is none, or has no text that UTF-8 can hold."""
    for file in files:
        lines = (line for line in text_lines(file) if line.strip())
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                str(row.get(column, "")).encode()
            except (ValueError, AttributeError) as error:
                return f"{file} line {number}: {error}"
    return None


def csv_rows(files: list[Path], size: int) -> int | None:
    """How many rows of CSV files are about `size` bytes, by the first rows of the first file."""
    named = [file for file in files if ".csv" in file.name.lower()] or files
    if not named:
        return None
    lines = (line.decode(errors="replace") for line in text_lines(named[0]))
    csv.field_size_limit(sys.maxsize)
    try:
        first = [sum(map(len, row)) for row in islice(csv.reader(lines), 1, 1 + SAMPLED)]
    except csv.Error:  # the library that reads all of it says what is wrong
        return None
    return max(1, size * len(first) // max(1, sum(first))) if first else None


def text_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked."""
    rest = b""
    for block in unpacked(file):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest
