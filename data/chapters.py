"""The chapters of a corpus: prepared one by one, so that training can begin with the first.

    <folder>/                 the first chapter: the splits that are held out, and the tokenizer
    <folder>/chapter-00001/   the second: training tokens alone
    <folder>/chapter-00002/   …

Each is a folder of shards (`data.shards`), complete from the moment it has its name. What its index
says under "chapter": how many documents of the training split are taken by its end, how many
training tokens there are by then, and whether it is the last. Most corpora are one chapter, whose
index does not say so.
"""

from pathlib import Path
from typing import Any

from data.shards import open_shards
from data.token_split import TokenSplit


class Chapters:
    """The chapters of a corpus that are there. More may come; `look` opens them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.indices: list[dict[str, Any]] = []
        self.splits: list[TokenSplit] = []  # the training split's part in each
        self.held_out: dict[str, TokenSplit] = {}
        while self.look():
            pass

    def __len__(self) -> int:
        return len(self.splits)

    @property
    def complete(self) -> bool:
        """Whether the last chapter is there."""
        return self.indices[-1].get("chapter", {"last": True})["last"]

    @property
    def num_tokens(self) -> int:
        """Training tokens of all that are there."""
        return sum(map(len, self.splits))

    def there(self) -> str:
        """What there is, in words."""
        chapters = "1 chapter" if len(self) == 1 else f"{len(self)} chapters"
        return f"{chapters} of {self.num_tokens:,} training tokens"

    def look(self) -> bool:
        """Open the next chapter, if it has come."""
        folder = chapter_folder(self.folder, len(self))
        if self.indices and (self.complete or not folder.exists()):
            return False
        index, splits = open_shards(folder)
        self.indices.append(index)
        self.splits.append(splits.pop("train"))
        self.held_out |= splits
        return True


def chapter_folder(folder: Path, number: int) -> Path:
    """Where the chapter with a number, from 0, lies or will lie."""
    return folder / f"chapter-{number:05d}" if number else folder
