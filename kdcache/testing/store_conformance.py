"""Testing: one conformance suite that every store passes, also one of your own.

Guarantee: a store whose tests inherit from `StoreConformance` and pass writes format 1's logical content, loses none of
it, and never returns bytes that its checksums do not cover. The suite looks at bytes with another library (the
`streams` hook), not only through the store's own reader, and damages them itself.

    class TestMyStore(StoreConformance):
        store, writer, reader = "mine", MyShardWriter, MyShard

        def streams(self, place, objects, form): ...   # what another library reads
        def spans(self, place, objects, row): ...      # where the bytes of a row are

It needs pytest, which nothing else in the package imports. Cost: a few seconds a store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError, KdcacheError
from kdcache.store.commit import Commit, commit_name
from kdcache.store.commits import read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.publish import new_shard, open_shard, publish_manifest, publish_shard
from kdcache.store.registry import register_store, registered_stores
from kdcache.store.row_format import RowFormat
from kdcache.store.shards import FOLDER, Shard, ShardWriter, shard_stem
from kdcache.store.storage import Storage
from kdcache.testing.example_rows import (
    DOCUMENTS,
    EXTRAS,
    SELECTIONS,
    SHARDS,
    TEACHER_CONTEXT,
    Example,
    everything,
    example_extras,
    example_manifest,
    example_rows,
    histogram_of,
    overwrite,
    same_records,
    same_rows,
    write_cache,
    write_shard,
)  # fmt: skip

Objects = list[dict[str, Any]]

_CASES = [(kind, precision, "all") for kind in SELECTIONS for precision in ("float32", "6")]
_CASES += [(kind, precision, "entropy>1.2") for kind, precision in (("topk", "6"), ("ipps", "6"), ("topp", "float32"))]
_CASES += [("topk", "float16", "all"), ("topk", "6", "extras"), ("ipps", "float16", "extras entropy>1.2")]
_CASES += [("topk", "6", "context")]

_DAMAGE = ("empty", "cut", "longer", "delete", "flip", "swap", "copy", "folder")


class StoreConformance:
    """The suite. Inherit, name the store, its writer and its reader, and fill in the two hooks.

    Attributes:
        store: as manifests name it.
        writer, reader: the classes that write and read its shards.
        flips: bits that are flipped in each stretch of a row, about.
        damage_every: damage every n-th object of a shard; raise it, and lower `flips`, where requests are slow.
    """

    store: ClassVar[str]
    writer: ClassVar[type[ShardWriter]]
    reader: ClassVar[type[Shard]]
    flips: ClassVar[int] = 6
    damage_every: ClassVar[int] = 3

    def streams(self, storage: Storage, objects: Objects, form: RowFormat) -> list[dict[str, NDArray[Any]]]:
        """The streams of each row, `[rows]`, as a library of others reads them."""
        raise NotImplementedError

    def spans(self, storage: Storage, objects: Objects, row: int) -> Iterator[tuple[str, int, int]]:
        """Object, start and end of the bytes that a row is made of."""
        raise NotImplementedError

    def together(self, form: RowFormat) -> int:  # noqa: ARG002  for those that override it
        """How many rows are compressed together, so that damage may be found only in a neighbour of the row."""
        return 1

    @pytest.fixture
    def new_place(self, tmp_path: Path) -> Callable[[str], Storage]:
        """An empty place of some name; override it to test other places than folders."""
        return lambda name: LocalStorage(tmp_path / name)

    @pytest.fixture
    def storage(self, new_place: Callable[[str], Storage]) -> Storage:
        """An empty place."""
        return new_place("cache")

    @pytest.fixture(autouse=True)
    def registered(self) -> Iterator[None]:
        """The store under its name, wherever it comes from."""
        with registered_stores.restored():
            if self.store not in registered_stores:
                register_store(self.store, self.writer, self.reader)
            yield

    @pytest.fixture(params=_CASES, ids="-".join)
    def manifest(self, request: pytest.FixtureRequest) -> Manifest:
        """Each kind of selection, with each kind of codec; positions without a target, extras, teacher contexts."""
        kind, precision, rest = request.param
        extras, context = rest.startswith("extras"), rest.startswith("context")
        positions = rest.removeprefix("extras").removeprefix("context").strip() or "all"
        return example_manifest(
            self.store, selection=SELECTIONS[kind], precision=precision, positions=positions,
            extras=EXTRAS if extras else {}, teacher_context=TEACHER_CONTEXT if context else {},
        )  # fmt: skip

    @pytest.fixture
    def plain(self) -> Manifest:
        """The simplest manifest, for what does not depend on the codec."""
        return example_manifest(self.store)

    # What is written

    @pytest.mark.parametrize("count", [0, 1, 4, 13])
    def test_rows_come_back_in_any_order(self, storage: Storage, manifest: Manifest, count: int) -> None:
        """What is read is what the codec makes of what was written, in whatever order it is read."""
        rows, form = example_rows(manifest, count), manifest.row_format
        created = write_cache(storage, manifest, rows)
        shard = open_shard(storage, created, read_commits(storage, created)[1])
        for i in np.random.default_rng(1).permutation(2 * count) % max(1, count):
            row, targets = rows[int(i)]
            record = form.pack(row, targets, example_extras(manifest, row))
            assert same_records(shard.read_with_record(int(i))[2], record)
            assert same_rows(shard.read(int(i)), form.unpack(record))

    @pytest.mark.parametrize("count", [0, 1, 4, 13])
    def test_another_library_reads_the_same_streams(self, storage: Storage, manifest: Manifest, count: int) -> None:
        """The bytes say it themselves, without our reader."""
        rows = example_rows(manifest, count)
        created = write_cache(storage, manifest, rows)
        found = self.streams(storage, read_commits(storage, created)[1].objects, manifest.row_format)
        form = manifest.row_format
        expected = [form.pack(row, kept, extras=example_extras(manifest, row)).streams for row, kept in rows]
        assert len(found) == count
        for ours, theirs in zip(expected, found, strict=True):
            assert list(ours) == list(theirs)
            assert all(theirs[name].dtype == ours[name].dtype for name in ours)
            assert all(theirs[name].tobytes() == ours[name].tobytes() for name in ours)

    def test_the_same_rows_are_the_same_bytes(self, new_place: Callable[[str], Storage], manifest: Manifest) -> None:
        """Bytes depend on the rows alone; names may differ where each writer has its own."""
        made = []
        for name in ("one", "two"):
            write_cache(new_place(name), manifest, example_rows(manifest, 6))
            made.append([v for k, v in everything(new_place(name)).items() if k.startswith(FOLDER)])
        assert made[0] == made[1]

    def test_a_record_may_be_given_instead_of_packed(self, storage: Storage, plain: Manifest) -> None:
        """Conversion carries records over; a shard of them is the same shard."""
        rows, form = example_rows(plain, 5), plain.row_format
        created = write_cache(storage, plain, rows)
        expected = read_commits(storage, created)[0]
        storage.delete(commit_name(0))
        with self.writer(storage, 0, form) as writer:
            for row in rows:
                writer.write(*row, record=form.pack(*row))
            objects, _ = writer.publish(self.reader)
            assert [(x["bytes"], x["sha256"]) for x in objects] == [(x["bytes"], x["sha256"]) for x in expected.objects]

    def test_a_commit_says_what_is_there(self, storage: Storage, plain: Manifest) -> None:
        """Sizes, hashes and counts, found again without the store; the content hash is the same for every store."""
        rows = example_rows(plain, 7)
        commit = read_commits(storage, write_cache(storage, plain, rows))[1]
        for x in commit.objects:
            data = b"".join(storage.chunks(x["name"]))
            assert (x["bytes"], x["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            assert x["name"].startswith(shard_stem(1))
        content = hashlib.sha256()
        for row in rows:
            plain.row_format.pack(*row).digest(content)
        assert commit.content_sha256 == content.hexdigest()
        assert (commit.rows, commit.positions) == (7, sum(len(t.count) for _, t in rows))
        assert commit.entries == 3 * commit.positions

    # In which order it appears

    def test_nothing_is_there_before_publish_and_nothing_after_an_error(
        self, storage: Storage, plain: Manifest
    ) -> None:
        """A writer that stops leaves no object and no temporary file behind."""
        with pytest.raises(RuntimeError), self.writer(storage, 0, plain.row_format) as writer:
            for row in example_rows(plain, 6):
                writer.write(*row)
            assert storage.names() == []
            raise RuntimeError
        assert storage.names() == []
        if isinstance(storage, LocalStorage):
            assert not [p for p in storage.folder.rglob("*") if p.is_file()]

    def test_the_first_commit_stands(self, storage: Storage, plain: Manifest) -> None:
        """Who comes second changes nothing, whatever it brings."""
        created = write_cache(storage, plain, example_rows(plain, 5))
        before = everything(storage)
        assert not write_shard(storage, created, example_rows(plain, 4, seed=9))
        assert everything(storage) == before

    def test_two_writers_that_race_leave_one_sound_shard(self, storage: Storage, plain: Manifest) -> None:
        """Both write before either publishes; one commit wins, and its data are there."""
        created = publish_manifest(storage, plain, {})
        rows, done = example_rows(plain, 5), []
        with new_shard(storage, created, 0) as one, new_shard(storage, created, 0) as two:
            for writer in (one, two):
                for row in rows:
                    writer.write(*row)
            entropies = histogram_of(rows)
            done += [
                publish_shard(storage, created, w, documents=DOCUMENTS, entropies=entropies, compute={})
                for w in (two, one)
            ]
        assert done == [True, False]
        assert open_shard(storage, created, read_commits(storage, created)[0]).count().rows == 5

    def leftover(self, storage: Storage, plain: Manifest, rows: list[Example]) -> dict[str, bytes]:
        """Data of shard 0 that was never committed."""
        with self.writer(storage, 0, plain.row_format) as writer:
            if writer.data.name not in (f"{shard_stem(0)}{self.writer.suffix}",):
                pytest.skip("no two writers use one name here")
            for row in rows:
                writer.write(*row)
            writer.publish(self.reader)
        return everything(storage)

    def test_a_sound_leftover_is_adopted(self, storage: Storage, plain: Manifest) -> None:
        """Of the same tokens, perhaps with the values of other hardware: it is kept, and the commit describes it."""
        data = self.leftover(storage, plain, example_rows(plain, 6, values=1))
        created = publish_manifest(storage, plain, {})
        assert write_shard(storage, created, example_rows(plain, 6, values=2))
        assert {k: v for k, v in everything(storage).items() if k in data} == data
        commit = read_commits(storage, created)[0]
        assert commit.compute == {"unknown": "its writer stopped before the commit"}
        assert open_shard(storage, created, commit).count().fields().items() <= vars(commit).items()

    def test_a_leftover_of_other_tokens_is_replaced(self, storage: Storage, plain: Manifest) -> None:
        """It is sound, but it is not this shard."""
        self.leftover(storage, plain, example_rows(plain, 6, seed=1))
        created = publish_manifest(storage, plain, {})
        rows = example_rows(plain, 6, seed=2)
        assert write_shard(storage, created, rows)
        self.require_rows(storage, created, rows)

    def test_a_damaged_leftover_is_replaced(self, storage: Storage, plain: Manifest) -> None:
        """Cut short, emptied, deleted, flipped or with a foreign object added, object by object."""
        rows = example_rows(plain, 6)
        data = self.leftover(storage, plain, rows)
        created = publish_manifest(storage, plain, {})
        for name, change in [(n, c) for n in list(data)[::9] for c in ("stranger", *_DAMAGE[:5], "folder")]:
            if change == "stranger":
                if not self.writer.folder:
                    continue
                storage.create(f"{name}.stranger", b"1")
            else:
                damage(storage, name, data[name], change)
            assert write_shard(storage, created, rows), (name, change)
            self.require_rows(storage, created, rows)
            storage.delete(commit_name(0))

    def require_rows(self, storage: Storage, manifest: Manifest, rows: list[Example]) -> None:
        """Shard 0 holds these rows, and no other object is under its name."""
        commit = read_commits(storage, manifest)[0]
        shard = open_shard(storage, manifest, commit)
        assert commit.rows == len(rows)
        for i, row in enumerate(rows):
            assert same_rows(shard.read(i), manifest.row_format.unpack(manifest.row_format.pack(*row)))
        assert {n for n in storage.names(FOLDER) if n.startswith(shard_stem(0))} == {x["name"] for x in commit.objects}

    # What is not believed

    def test_every_byte_of_a_row_is_sealed(self, storage: Storage, manifest: Manifest) -> None:
        """One flipped bit in any byte of a row, and reading it is refused by a sentence that names shard and row.

        Of rows that are compressed together each is refused or is what was written, and rarely are they all.
        """
        rows = example_rows(manifest, 5)
        created = write_cache(storage, manifest, rows)
        commit, form = read_commits(storage, created)[1], manifest.row_format
        honest = [form.unpack(form.pack(row, targets, example_extras(manifest, row))) for row, targets in rows]
        flipped = harmless = 0
        for row in (0, 4):
            for name, start, end in self.spans(storage, commit.objects, row):
                data = bytearray(b"".join(storage.chunks(name)))
                for at in range(start, end, max(1, (end - start) // self.flips)):
                    data[at] ^= 1 << at % 8
                    overwrite(storage, name, bytes(data))
                    data[at] ^= 1 << at % 8
                    flipped += 1
                    try:
                        shard = open_shard(storage, created, commit)
                    except CorruptCacheError as error:
                        assert shard_stem(1) in str(error)
                        continue
                    if self.together(form) == 1:
                        assert not self.readable(shard, honest, [row])
                    else:
                        harmless += len(self.readable(shard, honest, range(5))) == 5
                overwrite(storage, name, bytes(data))
        assert flipped > 20 and harmless < flipped / 4, (flipped, harmless)
        assert open_shard(storage, created, commit).count().rows == 5

    @pytest.mark.parametrize("change", _DAMAGE)
    def test_damaged_objects_are_named_and_never_believed(self, storage: Storage, plain: Manifest, change: str) -> None:
        """Verify names each damaged object; reading raises or gives what was written."""
        rows = example_rows(plain, 5)
        created = write_cache(storage, plain, rows)
        assert self.problems(storage) == set()
        commits = read_commits(storage, created)
        honest = [plain.row_format.unpack(plain.row_format.pack(*row)) for row in rows]
        twins = dict(zip([x["name"] for x in commits[0].objects], [x["name"] for x in commits[1].objects], strict=True))
        data = everything(storage)
        for name, twin in list(twins.items())[:: 1 if len(twins) < 4 else self.damage_every]:
            if change not in ("swap", "copy"):
                damage(storage, name, data[name], change)
            elif data[name] == data[twin]:
                continue  # the description of two arrays of one shape
            else:
                overwrite(storage, name, data[twin])
                overwrite(storage, twin, data[name] if change == "swap" else data[twin])
            assert name in self.problems(storage)
            try:
                shard = open_shard(storage, created, commits[0])
            except KdcacheError as error:
                assert shard_stem(0) in str(error)
            else:
                self.readable(shard, honest, range(len(honest)))
            for changed in (name, twin):
                storage.delete(changed)
                overwrite(storage, changed, data[changed])
        assert self.problems(storage) == set()

    def readable(self, shard: Shard, honest: list[Example], rows: Iterable[int]) -> list[int]:
        """The rows that can be read and are what was written; each of the others is refused by name."""
        found = []
        for i in rows:
            try:
                assert same_rows(shard.read(i), honest[i]), f"row {i} is damaged and was believed"
                found.append(i)
            except CorruptCacheError as error:
                assert shard_stem(shard.shard) in str(error)
        return found

    def problems(self, storage: Storage) -> set[str]:
        """The objects that verify complains about."""
        from kdcache.verify import verify_cache

        return {str(problem["object"]) for problem in verify_cache(storage.url).problems}

    @pytest.mark.parametrize("change", ["empty", "cut", "delete", "copy", "flip"])
    def test_damaged_records_are_named_and_never_believed(self, storage: Storage, plain: Manifest, change: str) -> None:
        """The same for the manifest and the commits; opening the cache is refused."""
        from kdcache.cache import open_cache

        write_cache(storage, plain, example_rows(plain, 3))
        data = everything(storage)
        for name in (NAME, commit_name(0)):
            if change == "copy":
                overwrite(storage, name, data[commit_name(1)])
            else:
                damage(storage, name, data[name], change)
            if (name, change) != (NAME, "delete"):
                assert name in self.problems(storage)
            with pytest.raises(KdcacheError):
                open_cache(storage.url)
            overwrite(storage, name, data[name])
        assert self.problems(storage) == set()

    def test_a_shard_knows_its_number_and_how_many_rows_it_has(self, storage: Storage, plain: Manifest) -> None:
        """Under another number, or with another count, nothing of it is read."""
        created = write_cache(storage, plain, example_rows(plain, 5))
        commit = read_commits(storage, created)[1]
        for shard, count in ((0, 5), (1, 4), (1, 6), (1, 1000), (1, 1 << 40)):
            with pytest.raises(CorruptCacheError):
                self.reader(storage, shard, created.row_format, commit.objects, count).count()

    def test_objects_that_nobody_names_are_reported(self, storage: Storage, plain: Manifest) -> None:
        """A copy of a shard or of a commit under a number beyond the plan, and a file that no commit names."""
        created = write_cache(storage, plain, example_rows(plain, 2))
        commit = read_commits(storage, created)[1]
        copy = shard_stem(SHARDS) + commit.objects[0]["name"].removeprefix(shard_stem(1))
        for name, source in ((copy, commit.objects[0]["name"]), (commit_name(SHARDS), commit_name(1))):
            storage.create(name, b"".join(storage.chunks(source)))
            assert self.problems(storage) == {name}
            storage.delete(name)
        for name in (f"{shard_stem(0)}.more", "tokenizer/more.json", "commits/more"):
            storage.create(name, b"1")
            assert self.problems(storage) == {name}
            storage.delete(name)

    def test_a_commit_of_other_content_is_reported(self, storage: Storage, plain: Manifest) -> None:
        """Hashes and counts that a commit claims are compared with what its rows say, even if its seal is right."""
        created = write_cache(storage, plain, example_rows(plain, 3))
        commit = read_commits(storage, created)[1]
        for field in ("labels", "positions", "entries", "documents", "dropped", "tokens_sha256", "content_sha256"):
            lie = "f" * 64 if field.endswith("sha256") else getattr(commit, field) + DOCUMENTS + 1
            storage.delete(commit_name(1))
            Commit(**{**vars(commit), field: lie}).write(storage)
            assert self.problems(storage) & {commit_name(1), commit.objects[0]["name"]}, field


def damage(storage: Storage, name: str, data: bytes, how: str) -> None:
    """Change an object whose bytes are `data`."""
    at = data.index(b": ") + 3 if name.startswith("commits") or name == NAME else len(data) // 2
    changed = {
        "empty": b"",
        "cut": data[: max(0, len(data) - 7)],
        "longer": data + b"\0",
        "flip": data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :],
    }
    storage.delete(name)
    if how == "folder":
        storage.create(f"{name}/inside", b"1")
    elif how != "delete":
        storage.create(name, changed[how])
