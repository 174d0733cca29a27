"""metrics.csv: one row a step, a column a metric, readable at any moment."""

import csv
import io
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from runs.folder import csv_head, csv_text, replacing

Row = dict[str, str]
EPOCH = "epoch"  # a column that only files of an older version have


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.csv, empty cells left out; none if there is no such file.

    A last line without its end, as a kill may leave it, is not read. A file of an older version,
    whose steps count from 0, is read as if they counted from 1.
    """
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    rows = [{name: value for name, value in row.items() if value} for row in reader]
    return [counted_from_one(row) for row in rows] if EPOCH in (reader.fieldnames or ()) else rows


def counted_from_one(row: Row) -> Row:
    """A row whose step counts from 0, unless it is a test's, without Lightning's epoch."""
    known = {name: value for name, value in row.items() if name != EPOCH}
    is_test = any(name.startswith("test/") for name in row)
    return known if is_test else known | {"step": str(int(row["step"]) + 1)}


class RunCSVLogger(Logger):
    """Writes <save_dir>/metrics.csv: the union of all metrics as columns, a row for every step.

    Row 100 holds what was known after 100 optimizer steps.
    Every call leaves the file complete; a kill in the middle of one costs that step's row at most.
    In a folder that has a metrics.csv already, rows are added, and a step logged again is merged
    into its row.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self._save_dir = Path(save_dir)
        self._columns: list[str] = []
        self._last: Row = {}  # the file's last row, which starts at byte _offset
        self._offset = 0
        self._opened = False

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def path(self) -> Path:
        return self._save_dir / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: the provenance callback writes the resolved config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError(f"metrics.csv needs the step of {sorted(metrics)}: pass step=")
        if not self._opened:
            self._rewrite(read_rows(self.path))
        row = {"step": str(step)} | {name: f"{value:.9g}" for name, value in metrics.items()}
        known = set(row) <= set(self._columns)
        if known and self._last and step == int(self._last["step"]):
            self._write_last(self._last | row, self._offset)
        elif known and (not self._last or step > int(self._last["step"])):
            self._write_last(row, self.path.stat().st_size)
        else:
            self._rewrite([*read_rows(self.path), row])

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Drop the rows of later steps, which are about to be trained again."""
        rows = read_rows(self.path)
        if any(int(row["step"]) > step for row in rows):
            self._rewrite([row for row in rows if int(row["step"]) <= step])

    def _write_last(self, row: Row, offset: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.truncate()
            file.write(self._lines([row]))
        self._last, self._offset = row, offset

    def _rewrite(self, rows: Iterable[Row]) -> None:
        """Write the whole file anew: rows of one step merged, in the order of their steps."""
        merged: dict[int, Row] = {}
        for row in rows:
            merged[int(row["step"])] = merged.get(int(row["step"]), {}) | row
        ordered = [merged[step] for step in sorted(merged)]
        self._columns = list(dict.fromkeys(["step", *(name for row in ordered for name in row)]))
        head = csv_head(self._columns).encode() + self._lines(ordered[:-1])
        with replacing(self.path) as draft:
            draft.write_bytes(head + self._lines(ordered[-1:]))
        self._last, self._offset = (ordered[-1] if ordered else {}), len(head)
        self._opened = True

    def _lines(self, rows: Iterable[Row]) -> bytes:
        return csv_text(self._columns, rows).encode()
