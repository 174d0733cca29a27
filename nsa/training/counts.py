"""Lightning's counts in a checkpoint, which are of micro-batches."""

from typing import Any


def restate_progress(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Count for a run that accumulates so many micro-batches a step, whatever wrote it did."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = checkpoint["global_step"] * accumulate
    for count in (progress["total"], progress["current"]):
        unfinished = count["ready"] - count["completed"]
        count.update(ready=done, started=done, processed=done, completed=done - unfinished)
