"""Rules by which documents become rows: what each may be, and a check. Importing this loads nothing.

eos             whether an end-of-sequence token closes each document of text: `auto` where the tokenizer adds one
pack            `best-fit`: pieces of several documents share a row; `none`: each document has a row of its own
overlong        a document of more tokens than a row: `cut` into pieces, `truncate` to the first row, or `drop`; `auto`
                cuts text, and truncates everything that has a question and an answer
on_bad_record   a document that cannot be used: `skip` leaves it out and counts it, `stop` refuses the corpus
"""

from __future__ import annotations

from collections.abc import Mapping

from kdcache.errors import ConfigError

RULES = {
    "eos": ("auto", "always", "never"),
    "pack": ("best-fit", "none"),
    "overlong": ("auto", "cut", "truncate", "drop"),
    "on_bad_record": ("skip", "stop"),
}


def require_rules(values: Mapping[str, object]) -> None:
    """Refuse a rule that does not exist.

    Args:
        values: a value for each name of `RULES`, among others.

    Raises:
        ConfigError: naming the rule and what it may be.
    """
    for name, choices in RULES.items():
        if values[name] not in choices:
            raise ConfigError(f"{name} is {str(values[name])[:60]}, not one of {', '.join(choices)}")
