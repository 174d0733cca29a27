"""Parquet files a few rows at a time: `datasets` decodes a whole row group before the first row."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

PORTION = 1 << 22  # bytes of rows decoded at once
BUFFER = 1 << 20  # bytes of a file read at once


def parquet_tables(files: list[str], column: str) -> Iterator[pa.Table]:
    """One column of files on this disk; of a file that lacks it, all columns without a row."""
    for file in files:
        with pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as opened:
            if column not in opened.schema_arrow.names:
                yield opened.schema_arrow.empty_table()
                continue
            groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
            for number, group in enumerate(groups):
                rows = max(1, PORTION * group.num_rows // max(1, group.total_byte_size))
                for batch in opened.iter_batches(rows, [number], [column]):
                    yield pa.Table.from_batches([batch])
