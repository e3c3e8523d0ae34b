"""Registry: things that are found by name and may be added from outside the package.

kdcache has four: divergences, selection kinds, engines and stores. A name that is looked up and not there may belong to
a plug-in that this process has not imported yet (a worker process starts empty), so a miss imports the plug-ins of the
run once and looks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from kdcache.errors import ConfigError
from kdcache.plugins import load_inherited

T = TypeVar("T")


class Registry(Generic[T]):
    """Values by name.

    Args:
        what: the thing, for messages: `divergence`.
        others: names that mean something else in the same place: they cannot be registered, and messages list them.
    """

    def __init__(self, what: str, others: tuple[str, ...] = ()) -> None:
        self._what, self._others = what, others
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Add a value.

        Raises:
            ConfigError: the name is taken, is empty, or has a character other than letters, digits, `-`, `_` and `.`.
        """
        if not name or not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ConfigError(f"a {self._what} cannot be registered as {name!r}: use letters, digits, - _ and .")
        if name in self._values or name in self._others:
            raise ConfigError(f"a {self._what} named {name} is registered already; choose another name")
        self._values[name] = value

    def __contains__(self, name: object) -> bool:
        if name not in self._values:
            load_inherited()
        return name in self._values

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Forget, at the end of the block, what was registered in it; for tests."""
        before = dict(self._values)
        try:
            yield
        finally:
            self._values = before

    def find(self, name: object) -> T:
        """The value of a name.

        Raises:
            ConfigError: there is none; the message lists the names that there are.
        """
        if not isinstance(name, str) or name not in self:
            raise ConfigError(
                f"{self._what} {str(name)[:40]} is not one of {', '.join([*self._values, *self._others])}"
            )
        return self._values[name]

    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self._values)
