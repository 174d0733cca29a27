"""What is plain text in UTF-8 and what is not, whatever a file is called."""

import codecs
from pathlib import Path

import charset_normalizer

from data.sources import UNPACKABLE, packing, unpacked

ROWS = "it holds rows: data=hf data.name={} data.data_files={{0}}"
UNPACK = f"unpack it first, or pack it as {UNPACKABLE}"
CONVERT = "convert it to text first"
RENAME = "it is packed: give its name the suffix {}"

# What is not text, by suffix and by first bytes, each with the way out.
BY_SUFFIX = {
    **dict.fromkeys((".jsonl", ".ndjson"), ROWS.format("json")),
    ".parquet": ROWS.format("parquet"),
    **dict.fromkeys((".arrow", ".feather"), ROWS.format("arrow")),
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".txz", ".7z", ".rar", ".lz4", ".z"), UNPACK),
    **dict.fromkeys((".pdf", ".epub", ".doc", ".docx", ".odt", ".rtf", ".sqlite", ".db"), CONVERT),
}
BY_START = {
    b"PAR1": ROWS.format("parquet"),
    b"ARROW1": ROWS.format("arrow"),
    b"%PDF-": CONVERT,
    b"SQLite format 3": CONVERT,
    b"7z\xbc\xaf": UNPACK,
    b"Rar!": UNPACK,
    b"\x1f\x8b": RENAME.format(".gz"),
    b"BZh": RENAME.format(".bz2"),
    b"\xfd7zXZ": RENAME.format(".xz"),
    b"\x28\xb5\x2f\xfd": RENAME.format(".zst"),
    b"PK\x03\x04": RENAME.format(".zip"),
}


def check_text(option: str, path: Path) -> None:
    """Refuse a container that would be trained on as if its bytes were text.

    Raises:
        ValueError: naming the file and the way out.
    """
    inner = path.with_suffix("") if packing(path) else path
    way = BY_SUFFIX.get(inner.suffix.lower())
    if way is None:
        start = next(unpacked(path), b"")
        way = next((way for magic, way in BY_START.items() if start.startswith(magic)), None)
    if way is not None:
        raise ValueError(f"{option}: {path} is not a text file: {way.format(path)}")


class Decoding:
    """Counts what of files' bytes is no UTF-8 text: a tokenizer would read it as U+FFFD."""

    def __init__(self) -> None:
        self.seen = self.wrong = 0
        self.first: tuple[Path, bytes] | None = None  # the first file with such bytes, its block
        self._file: Path | None = None

    def count(self, file: Path, block: bytes) -> None:
        """Take in a file's next block. Zero bytes are no text either: UTF-16 is full of them."""
        if file != self._file:
            self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")("replace")
        replaced = self._decoder.decode(block).count("\ufffd") - block.count("\ufffd".encode())
        wrong = max(replaced, 0) + block.count(0)
        self.seen += len(block)
        self.wrong += wrong
        if wrong and self.first is None:
            self.first = file, block

    def check(self) -> None:
        """Refuse text of which more than one byte in a thousand is no UTF-8."""
        if self.first and self.wrong * 1000 > self.seen:
            file, block = self.first
            raise ValueError(
                f"{file} is not UTF-8 text: {self.wrong:,} of {self.seen:,} bytes cannot be "
                f"decoded; it is probably {likely_encoding(block)}. Convert it (iconv -f ... -t "
                "utf-8), or train on its bytes: data.tokenizer=bytes data.vocab_size=256"
            )


def likely_encoding(block: bytes) -> str:
    """A guess at what text is encoded in that is no UTF-8."""
    if block.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    even, odd = block[::2].count(0), block[1::2].count(0)
    if block.startswith((b"\xff\xfe", b"\xfe\xff")) or max(even, odd) > 20 * min(even, odd) + 8:
        return "UTF-16"
    if even + odd:
        return "binary data"
    guess = charset_normalizer.from_bytes(block[: 1 << 16]).best()
    return guess.encoding if guess else "Latin-1"
