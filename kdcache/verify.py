"""Verify: re-hash every object, decode every row, and report all that is wrong, not only the first.

What the seal of a cache says is compared with its commits, and what commits say with the rows: counts and hashes
exactly, sums of entropy and the like to what a codec may round.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kdcache.corpus.plan import Plan
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.store.commit import FOLDER as COMMITS
from kdcache.store.commit import Commit, commit_name
from kdcache.store.commits import Commits
from kdcache.store.manifest import NAME, PLAN, Manifest
from kdcache.store.open_storage import open_storage
from kdcache.store.plan import read_plan
from kdcache.store.publish import TOKENIZER, open_shard
from kdcache.store.seal import SEAL, read_seal
from kdcache.store.shards import FOLDER, shard_stem
from kdcache.store.storage import Storage

_MOST_MISSING = 1000
"""Shards without a commit that are named one by one."""

_ROUNDING, _RELATIVE = 1e-2, 1e-3
"""Nats or mass a position, and share, by which a sum may differ from that of the rounded targets. No codec rounds a
scalar by half of it; a log p below -512 is cut by 4 to 16 bits, which only these sums show."""
_NUMBER = re.compile("[0-9]{5,8}")


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify_cache` found.

    Attributes:
        shards, objects, bytes: how much was checked.
        content_sha256: over the content of all shards, equal for caches of equal content in any store; None if any is
            missing or damaged.
        problems: `{"shard", "object", "what"}` each; shard is None for what belongs to the whole cache.
    """

    shards: int = 0
    objects: int = 0
    bytes: int = 0
    content_sha256: str | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, shard: int | None, name: str, what: object) -> None:
        """Note a problem."""
        self.problems.append({"shard": shard, "object": name, "what": str(what)})


def verify_cache(path: str | os.PathLike[str], on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Re-hash every object, decode every row, and report all problems.

    Args:
        path: the cache's folder or URL.
        on_progress: called with (shards done, shards planned).

    Raises:
        CacheError: there is no cache to verify, or it cannot be reached.
    """
    storage, report = open_storage(path), VerifyReport()
    try:
        manifest = Manifest.read(storage)
    except CorruptCacheError as error:
        report.add(None, NAME, error)
        return report
    report.objects, report.bytes = 1, storage.size(NAME) or 0
    files = [{"name": f"{TOKENIZER}/{name}", "sha256": sha256} for name, sha256 in manifest.tokenizer_files.items()]
    _check_objects(report, storage, None, files)
    plan, sealed = _read_plan(report, storage, manifest), _read_seal(report, storage, manifest)
    content, listed = hashlib.sha256(), set(storage.names(COMMITS))
    known: dict[str, int | None] = {f"{TOKENIZER}/{name}": None for name in manifest.tokenizer_files}
    missing = 0
    for shard in range(manifest.shards):
        if on_progress:
            on_progress(shard, manifest.shards)
        if commit_name(shard) not in listed:
            missing += 1
            if missing <= _MOST_MISSING:
                report.add(shard, commit_name(shard), "the shard is not committed")
            continue
        known[commit_name(shard)] = None
        commit = _read_commit(report, storage, manifest, plan, shard)
        if commit is None:
            continue
        known |= {data["name"]: shard for data in commit.objects}
        _check_seal(report, sealed, commit)
        report.shards += 1
        if _check_objects(report, storage, shard, commit.objects):
            _check_rows(report, storage, manifest, commit)
        content.update(commit.content_sha256.encode())
    if on_progress:
        on_progress(manifest.shards, manifest.shards)
    if missing > _MOST_MISSING:
        report.add(None, COMMITS, f"{missing - _MOST_MISSING:,} more shards are not committed")
    _check_strays(report, storage, manifest, known)
    if report.ok:
        report.content_sha256 = content.hexdigest()
    return report


def _read_plan(report: VerifyReport, storage: Storage, manifest: Manifest) -> Plan | None:
    """The plan, if there is one and it is sound."""
    try:
        plan = read_plan(storage, manifest)
    except CorruptCacheError as error:
        report.add(None, PLAN, error)
        return None
    if plan is not None:
        report.objects, report.bytes = report.objects + 1, report.bytes + manifest.plan["bytes"]
    return plan


def _read_seal(report: VerifyReport, storage: Storage, manifest: Manifest) -> Commits | None:
    """What the seal says, if there is one that can be read."""
    try:
        sealed = read_seal(storage, manifest)
    except CorruptCacheError as error:
        report.add(None, SEAL, error)
        return None
    if sealed is not None:
        report.objects, report.bytes = report.objects + 1, report.bytes + (storage.size(SEAL) or 0)
    return sealed


def _check_seal(report: VerifyReport, sealed: Commits | None, commit: Commit) -> None:
    try:
        if sealed is not None and sealed[commit.shard] != commit:
            report.add(commit.shard, SEAL, f"it does not say what the commit of shard {commit.shard} says")
    except CorruptCacheError as error:
        report.add(commit.shard, SEAL, error)


def _read_commit(
    report: VerifyReport, storage: Storage, manifest: Manifest, plan: Plan | None, shard: int
) -> Commit | None:
    name = commit_name(shard)
    try:
        commit = Commit.read(storage, shard, manifest.sha256)
    except CacheError as error:
        if storage.remote and not isinstance(error, CorruptCacheError):
            raise  # no answer says nothing of the cache
        report.add(shard, name, error)
        return None
    if commit is None:
        report.add(shard, name, "it cannot be read")
        return None
    documents = plan.documents_of(shard) if plan else manifest.documents
    if (plan and commit.documents != documents) or not commit.dropped <= commit.documents <= documents:
        report.add(shard, name, f"it claims {commit.documents} documents, {commit.dropped} dropped, of {documents}")
    first, last = (plan.first[shard], plan.last[shard]) if plan else (0, manifest.documents - 1)
    strangers = [bad["document"] for bad in commit.bad_records if not first <= bad["document"] <= last]
    if strangers:
        report.add(shard, name, f"it lists the bad record {strangers[0]}, but has the documents {first} to {last}")
    report.objects, report.bytes = report.objects + 1, report.bytes + (storage.size(name) or 0)
    return commit


def _check_objects(report: VerifyReport, storage: Storage, shard: int | None, objects: list[dict[str, Any]]) -> bool:
    """Whether all of them are what their records say."""
    sound = True
    for data, (size, problem) in zip(objects, storage.map(lambda data: _examine(storage, data), objects), strict=True):
        report.objects += 1
        if problem is None:
            report.bytes += size
        else:
            report.add(shard, data["name"], problem)
            sound = False
    return sound


def _examine(storage: Storage, data: dict[str, Any]) -> tuple[int, object]:
    """The size of an object, and what is wrong with it."""
    try:
        size, sha256 = storage.digest(data["name"])
    except CorruptCacheError as error:
        return 0, "it is missing" if storage.size(data["name"]) is None else error
    return size, None if sha256 == data["sha256"] else "its sha256 is not the one recorded"


def _check_rows(report: VerifyReport, storage: Storage, manifest: Manifest, commit: Commit) -> None:
    try:
        counted = open_shard(storage, manifest, commit).count()
    except CorruptCacheError as error:
        report.add(commit.shard, commit.objects[0]["name"], error)
        return
    if any(getattr(commit, name) != value for name, value in counted.fields().items()):
        report.add(commit.shard, commit.objects[0]["name"], "its rows are not the ones that were committed")
    for name, read in counted.sums.fields().items():
        if not _agree(commit.sums[name], read, commit.positions):
            report.add(commit.shard, commit_name(commit.shard), f"its sum of {name} is not that of its rows")


def _agree(said: Any, read: Any, positions: int) -> bool:
    """Whether sums over targets before rounding can be those of the rounded ones, or of one T each."""
    if isinstance(said, list) and isinstance(read, list):
        return len(said) == len(read) and all(_agree(a, b, positions) for a, b in zip(said, read, strict=True))
    if said is None or read is None:  # an infinite log p is stored as a finite one
        return True
    return bool(abs(said - read) <= _ROUNDING * positions + _RELATIVE * abs(said))


def _check_strays(report: VerifyReport, storage: Storage, manifest: Manifest, known: dict[str, int | None]) -> None:
    """Objects that no record names: a copy under another name, or another cache's.

    What a writer left that was not first, or has not committed, is no fault.
    """
    committed = set(known.values())
    for name in (name for folder in (FOLDER, COMMITS, TOKENIZER) for name in storage.names(folder)):
        number = _NUMBER.match(name.removeprefix(f"{FOLDER}/"))
        shard = int(number[0]) if number else -1
        leftover = 0 <= shard < manifest.shards and name.startswith(shard_stem(shard))
        if leftover and shard in committed:
            leftover = name.startswith(f"{shard_stem(shard)}-")
        if name not in known and not leftover:
            printable = name.encode("ascii", "backslashreplace").decode()
            report.add(None, printable, "no record names it")
