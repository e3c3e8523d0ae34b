"""Reading options: how the records of a corpus are read, for every command that is given one.

Importing this costs nothing: the command line takes its options from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.options import option

if TYPE_CHECKING:
    from kdcache.corpus.forms import Columns
    from kdcache.corpus.sources import Corpus, Filters


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Which columns, which split and which documents of a corpus are read."""

    text_column: str | None = option("column that holds the texts (default: text)", None)
    messages_column: str | None = option("column that holds the conversations (default: messages)", None)
    prompt_column: str | None = option("column that holds the prompts (default: prompt)", None)
    completion_column: str | None = option("column that holds the completions (default: completion)", None)
    tools_column: str | None = option("column that holds the tools of a conversation (default: tools)", None)
    documents_column: str | None = option("column that holds the documents for the template", None)
    ignore_columns: str | None = option("comma-separated columns that do not count", None)
    chat_template: str | None = option("file with a chat template to use instead of the tokenizer's own", None)
    split: str = option("split to read, for hf: and for save_to_disk folders with several", "train")
    split_text: str = option("what one document of a .txt file is: paragraph, line or file", "paragraph")
    min_chars: int = option("drop documents of fewer characters", 0)
    drop: str | None = option("drop documents in which this regular expression is found", None)
    limit_docs: int | None = option("number of documents to take from the start of the corpus", None)

    @property
    def columns(self) -> Columns:
        """The columns that are named.

        Raises:
            ConfigError: names that exclude each other.
        """
        from kdcache.corpus.forms import Columns

        return Columns(
            text=self.text_column, messages=self.messages_column, prompt=self.prompt_column,
            completion=self.completion_column, tools=self.tools_column, documents=self.documents_column,
            ignored=tuple(name for name in (self.ignore_columns or "").split(",") if name),
        )  # fmt: skip

    @property
    def filters(self) -> Filters:
        """Which documents are left out.

        Raises:
            ConfigError: a pattern that does not compile, or a number out of range.
        """
        from kdcache.corpus.sources import Filters

        return Filters(min_chars=self.min_chars, drop=self.drop, limit_docs=self.limit_docs)

    def open(self, corpus: str, columns: Columns | None = None) -> Corpus:
        """A corpus, read as these options say.

        Args:
            corpus: a path, glob, folder or URL, or `hf:NAME[:CONFIG]`.
            columns: instead of those that are named.

        Raises:
            KdcacheError: it cannot be opened.
        """
        from kdcache.corpus.sources import open_corpus

        return open_corpus(
            corpus, split=self.split, split_text=self.split_text, columns=columns or self.columns, filters=self.filters
        )
