"""Which layers of a teacher are kept: `0,3,7`, `every-2`, `first-8`, `best-8`. Loads no large library."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kdcache.errors import ConfigError

_NAMED = re.compile(r"(every|first|best)-(\d+)")


@dataclass(frozen=True)
class LayerRule:
    """A rule, before the number of layers is known.

    Attributes:
        text: as it was given; None keeps all.
        kind: `all`, `numbers`, `every`, `first` or `best`.
        numbers: the layers that are named, or the number behind the word.
    """

    text: str | None
    kind: str
    numbers: tuple[int, ...]

    @staticmethod
    def parse(text: str | None) -> LayerRule:
        """The rule that a text names.

        Raises:
            ConfigError: it names none, or names a layer twice or out of order.
        """
        if text is None:
            return LayerRule(None, "all", ())
        named = _NAMED.fullmatch(text.strip())
        if named:
            number = int(named[2])
            if number < 1:
                raise ConfigError(f"layers is {text}, but the number must be at least 1")
            return LayerRule(text, named[1], (number,))
        try:
            numbers = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(
                f"layers is {text!r}, but must be numbers such as 0,3,7, or every-N, first-N or best-N"
            ) from None
        for number in numbers:
            if number < 0:
                raise ConfigError(f"layers names {number}, but layers are counted from 0")
            if numbers.count(number) > 1:
                raise ConfigError(f"layers names {number} twice")
        if list(numbers) != sorted(numbers):
            raise ConfigError(f"layers is {text}, but must name layers in the order of the teacher")
        return LayerRule(text, "numbers", numbers)

    @property
    def best(self) -> int | None:
        """How many layers are to be chosen by their importance; None for a rule that needs no measuring."""
        return self.numbers[0] if self.kind == "best" else None

    def kept(self, total: int) -> tuple[int, ...]:
        """The layers of a teacher with `total` of them, ascending; for `best` all, from which the best are chosen.

        Raises:
            ConfigError: there are not so many.
        """
        if self.kind in ("first", "best") and self.numbers[0] > total:
            raise ConfigError(f"layers is {self.text}, but the teacher has {total} layers")
        if self.kind == "numbers" and self.numbers[-1] >= total:
            raise ConfigError(f"layers names {self.numbers[-1]}, but the teacher's layers are 0 to {total - 1}")
        if self.kind == "numbers":
            return self.numbers
        if self.kind == "every":
            return tuple(range(0, total, self.numbers[0]))
        return tuple(range(self.numbers[0] if self.kind == "first" else total))
