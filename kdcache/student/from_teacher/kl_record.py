"""What was measured of layers so far, in a file beside the student: choosing the best goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.store.atomic_files import storage_errors


class KlRecord:
    """KLs by the layers that were left out: a JSON line each, below a line that says what they were measured on.

    A file of other measurements is begun anew. A line that was cut off is measured again.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._known = path, dict[frozenset[int], float]()
        first, *lines = (path.read_text(encoding="utf-8").splitlines() if path.exists() else []) or [""]
        whole = [first]
        if first == json.dumps(about):
            for line in lines:
                try:
                    found = json.loads(line)
                    self._known[frozenset(found["without"])] = float(found["kl"])
                except (ValueError, KeyError, TypeError):
                    break
                whole.append(line)
        else:
            whole = [json.dumps(about)]
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def kl(self, without: frozenset[int], measure: Callable[[], float]) -> float:
        """The KL without some layers: what is known, or what `measure` gives now."""
        if without not in self._known:
            self._known[without] = measure()
            line = json.dumps({"without": sorted(without), "kl": self._known[without]})
            with storage_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        return self._known[without]

    def delete(self) -> None:
        """Forget it all: the student is there."""
        self._path.unlink(missing_ok=True)
