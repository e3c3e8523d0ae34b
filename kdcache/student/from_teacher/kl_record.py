"""What was measured of layers so far, in a file beside the student: choosing the best goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.store.atomic_files import write_over


class KlRecord:
    """KLs by the layers that were left out: a JSON line each, below a line that says what they were measured on.

    A file of other measurements is begun anew. A line that was cut off is measured again.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._known = path, dict[frozenset[int], float]()
        self._lines = [json.dumps(about)]
        first, *lines = (path.read_text(encoding="utf-8").splitlines() if path.exists() else []) or [""]
        for line in lines if first == self._lines[0] else []:
            try:
                found = json.loads(line)
                self._known[frozenset(found["without"])] = float(found["kl"])
            except (ValueError, KeyError, TypeError):
                break
            self._lines.append(line)

    def kl(self, without: frozenset[int], measure: Callable[[], float]) -> float:
        """The KL without some layers: what is known, or what `measure` gives now."""
        if without not in self._known:
            self._known[without] = measure()
            self._lines.append(json.dumps({"without": sorted(without), "kl": self._known[without]}))
            write_over(self._path, "".join(f"{line}\n" for line in self._lines).encode())
        return self._known[without]

    def delete(self) -> None:
        """Forget it all: the student is there."""
        self._path.unlink(missing_ok=True)
