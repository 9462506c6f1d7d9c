"""Which text, and which of its documents."""

from dataclasses import dataclass

from saelab.errors import SettingError
from saelab.files import expanded


@dataclass(frozen=True)
class CorpusSettings:
    """Which text to read."""

    source: str = "demo"
    """``demo``, a local folder or file (text, JSON Lines, JSON, Parquet, CSV, TSV), or the id of a Hub dataset."""
    text_column: str | None = None
    """Column of a dataset that holds the text or token ids. Default: ``text``, else token ids in ``input_ids`` or
    ``tokens``."""
    split: str = "train"
    """Which split of a dataset: on the Hub, saved as a DatasetDict, or in a folder laid out like one on the Hub."""
    subset: str | None = None
    """Which configuration of a dataset that has several: on the Hub, or in a folder with its README.md."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset; default: its current commit. A cache can be continued, and trained on,
    only while this is the same commit."""
    held_out: float = 0.05
    """Share of the documents that are never trained on, at least one document. The demo has a split of its own."""
    min_tokens: int = 0
    """Documents with fewer tokens (EOS not counted) are left out of training and held-out text; not for corpora of
    token ids. A document is a row of a dataset, a file of a folder, or a piece of a long text file."""
    max_tokens: int | None = None
    """Documents with more tokens are left out too. Default: no limit."""

    def __post_init__(self) -> None:
        for name in ("source", "text_column", "split", "subset", "revision"):
            value = getattr(self, name)
            if value == "":
                raise SettingError(f"{name}: is empty; give a value or leave the setting out")
            if value is not None and value != value.encode(errors="replace").decode():
                raise SettingError(
                    f"{name}: {value!a} is not UTF-8, so no file can hold this setting; use another name"
                )
        object.__setattr__(self, "source", expanded(self.source, "source"))
        if not 0 < self.held_out < 1:
            raise SettingError(
                f"held_out: {self.held_out} is not between 0 and 1; evaluation needs text that is not trained on"
            )
        if self.min_tokens < 0:
            raise SettingError(f"min_tokens: {self.min_tokens} is negative; 0 leaves no document out")
        if self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens):
            least = "min_tokens" if self.min_tokens > 1 else "1"
            raise SettingError(f"max_tokens: {self.max_tokens} is less than {least}; every document would be left out")
