"""Sources of the splits: the config's data section, and the rows of a split with our columns."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

from rlhf_jax.config import Count, check_ranges
from rlhf_jax.data import conventions, formats
from rlhf_jax.data.conventions import OWN_NAMES, Columns
from rlhf_jax.types import Json, RlhfError

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources of the splits, and maximum lengths of prompts and responses.

    A source is a file, a Hugging Face dataset directory, `tfds:NAME/SPLIT`, `hub:OWNER/NAME[:CONFIG]/SPLIT`, or
    generated (module `arithmetic`). `test` is never used for selection; if it is None, `eval` takes its place. Plain
    `text` rows become prompts by truncation to a length in `text_prompt_tokens` (least, most). SFT trains on the
    completion (for `messages`, the assistant's last message), or with loss_on = "assistant" on all messages of the
    assistant.
    """

    # Training split: a file, a dataset directory, hub:OWNER/NAME/SPLIT, tfds:NAME/SPLIT, or
    # arithmetic:SPLIT,problems=...
    train: str
    eval: str  # source of the validation split, for evaluation during training and model selection
    test: str | None  # source of the test split, never used for selection; None: eval
    limit: Count | None  # use only the first rows of each split; None: all
    text_prompt_tokens: tuple[Count, Count]  # range of prompt lengths for rows of plain `text`
    max_prompt_tokens: Count  # longest prompt, including BOS; longer ones are truncated on the left
    max_response_tokens: Count  # longest response, including EOS; longer ones are truncated
    # Tokens of a chat that SFT trains on: the last answer, or every turn of the assistant.
    loss_on: Literal["completion", "assistant"] = "completion"
    columns: Columns = OWN_NAMES

    def __post_init__(self) -> None:
        check_ranges(self)
        least, most = self.text_prompt_tokens
        if not 1 <= least <= most:
            raise ValueError(f"text_prompt_tokens = {self.text_prompt_tokens} must be (least, most) with 1 <= least")
        if self.max_prompt_tokens < most + 1:
            raise ValueError(
                f"max_prompt_tokens = {self.max_prompt_tokens} has no room for BOS and "
                f"the {most} tokens of text_prompt_tokens"
            )

    @property
    def settings(self) -> dict[str, Json]:
        """Fields as JSON, without `columns` if they have our own names, as in configs of older releases."""
        fields = dataclasses.asdict(self)
        return fields if self.columns != OWN_NAMES else {name: fields[name] for name in fields if name != "columns"}

    def source(self, split: str) -> str:
        """Source of a split ("train", "eval" or "test")."""
        return {"train": self.train, "eval": self.eval, "test": self.test or self.eval}[split]


class Source(NamedTuple):
    """Rows and columns of a split's source, before `limit`."""

    name: str
    rows: int
    columns: list[str]  # columns that are read, of the first row
    further: list[str]  # other columns
    convention: str | None  # name of the convention that the columns follow; None: our own names


def read_source(config: DataConfig, split: str) -> Source:
    """Count the rows and list the columns of a split's source."""
    source = config.source(split)
    table = _table(source, formats.file_hash(source))
    (first,) = conventions.renamed(table[:1], config.columns, source)
    convention = conventions.convention_of(first)
    reads = formats.COLUMNS[formats.kind_of([first], source)] if convention is None else convention.reads
    theirs = {ours: name for ours, name in dataclasses.asdict(config.columns).items() if name is not None}
    columns = [theirs.get(column, column) for column in reads if column in first]
    further = [column for column in table[0] if column not in columns]
    return Source(source, len(table), columns, further, convention.name if convention else None)


def load_rows(config: DataConfig, split: str) -> list[Row]:
    """Load and check the rows of a split. Preference rows get the columns `prompt, chosen, rejected`; others are kept.

    Columns are renamed as `config.columns` says, and those of well-known data sets are converted.

    Raises RlhfError, naming file and row, if a value is missing or neither text nor chat, or if chosen and rejected
    are equal in every preference row.
    """
    source = config.source(split)
    table = _table(source, formats.file_hash(source))[: config.limit]
    rows = conventions.converted(table, config.columns, source)
    kind = formats.kind_of(rows, source)
    if kind in ("preference", "implicit_prompt_preference"):
        pairs = formats.preference_rows(rows, source)
        if all(row["chosen"] == row["rejected"] for row in pairs):
            raise RlhfError(
                f"{source}: chosen and rejected are identical in every row, so there is no preference: check the data"
            )
        return pairs
    if kind in ("unpaired", "ranked"):
        return {"unpaired": formats.unpaired_rows, "ranked": formats.ranked_rows}[kind](rows, source)
    return formats.checked_rows(rows, formats.COLUMNS[kind], source)


@functools.lru_cache(maxsize=4)
def _table(source: str, content: str) -> list[Row]:
    del content  # part of the cache key, so that a changed file is read again
    return formats.read_table(source)
