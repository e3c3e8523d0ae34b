"""Lies of the manifest and of commits, and strange things in the place of an object."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from kdcache import Selection
from kdcache.store.commit import commit_name
from kdcache.store.manifest import NAME
from tests.attacks.forge import SHARD, Attack, Forgery, frame, order

_OTHER = "f" * 64


def _manifest(**fields: Any) -> Callable[[Forgery], str]:
    return lambda f: f.change_manifest(**fields)


TWO = '"temperatures": [\n    1.0,\n    2.0'
"""As it stands in the text of a manifest."""


def _known(**changes: Any) -> dict[str, Any]:
    return {**Selection(k=8).known((1.0, 2.0)).to_fields(), **changes}


def _raw(old: str, new: str) -> Callable[[Forgery], str]:
    """The text of the manifest changed where a dictionary could not say it."""

    def change(text: str) -> str:
        assert text.count(old) == 1, text
        return text.replace(old, new)

    return lambda f: f.raw_manifest(change)


def _bytes(change: Callable[[bytes], bytes], name: str = NAME) -> Callable[[Forgery], str]:
    def forge(f: Forgery) -> str:
        (f.folder / name).write_bytes(change((f.folder / name).read_bytes()))
        return name

    return forge


def _bits(**fields: Any) -> Callable[[Forgery], str]:
    """Fields of a manifest whose codec is another than the one that wrote the rows."""
    return lambda f: (f.change_manifest(precision="6", **fields), "shards/00000")[1]


def _tokenizer(name: str) -> Callable[[Forgery], str]:
    return lambda f: f.change_manifest(tokenizer_files={**f.manifest.tokenizer_files, name: _OTHER})


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _b64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


MANIFESTS = [
    Attack("2^31 slots", _manifest(seq_len=1 << 31)),
    Attack("2^62 slots", _manifest(seq_len=1 << 62)),
    Attack("slots times entries", _manifest(seq_len=1 << 22, selection={"kind": "topk", "k": 300})),
    Attack("no slots", _manifest(seq_len=0)),
    Attack("slots below zero", _manifest(seq_len=-64)),
    Attack("slots of a float", _manifest(seq_len=64.0)),
    Attack("slots of true", _manifest(seq_len=True)),
    Attack("slots of text", _manifest(seq_len="64")),
    Attack("a vocabulary of 2^31", _manifest(vocab_size=1 << 31)),
    Attack("a vocabulary of 2^30", lambda f: (f.change_manifest(vocab_size=1 << 30), "shards/00000")[1]),
    Attack("a vocabulary of 2^30 in few bits", _bits(vocab_size=1 << 30)),
    Attack("everything of a vocabulary of 2^30", _manifest(vocab_size=1 << 30, selection={"kind": "full"})),
    Attack("a vocabulary of 2^63", _manifest(vocab_size=1 << 63)),
    Attack("a vocabulary of nothing", _manifest(vocab_size=0)),
    Attack("a vocabulary below the entries", _manifest(vocab_size=7)),
    Attack("2^60 documents", _manifest(documents=1 << 60)),
    Attack("a shard for each of 2^40 documents", _manifest(documents=1 << 40, shards=1 << 40)),
    Attack("no documents", _manifest(documents=0)),
    Attack("no shards", _manifest(shards=0)),
    Attack("more shards than documents", _manifest(shards=13)),
    Attack("10 million shards and one", _manifest(documents=1 << 40, shards=10_000_001)),
    Attack("a plan of 2^60 bytes", _manifest(plan={"bytes": 1 << 60, "sha256": _OTHER})),
    Attack("a plan of true bytes", _manifest(plan={"bytes": True, "sha256": _OTHER})),
    Attack("a plan without a hash", _manifest(plan={"bytes": 1000})),
    Attack("a plan that is a list", _manifest(plan=[])),
    Attack("a date of text", _manifest(date="today")),
    Attack("a date of no day", _manifest(date="2026-02-30")),
    Attack("a date of a number", _manifest(date=20261128)),
    Attack("records that are retried", _manifest(on_bad_record="retry")),
    Attack("many documents", _manifest(documents="many")),
    Attack("an order that unfolds to 2^40 bytes", _manifest(id_order=_b64(frame(1 << 40)), precision="6")),
    Attack(
        "an order of the largest id",
        _manifest(id_order=order([(1 << 31) - 1], "<u4"), vocab_size=(1 << 31) - 1, precision="6"),
    ),
    Attack("an order that repeats an id", _manifest(id_order=order([1, 2, 1]), precision="6")),
    Attack("an order of an id outside", _manifest(id_order=order([1, 320]), precision="6")),
    Attack("an order longer than the vocabulary", _manifest(id_order=order(range(321)))),
    Attack("an order that is no frame", _manifest(id_order=_b64(b"order"))),
    Attack("an order that is not base64", _manifest(id_order="%%%")),
    Attack("an order that is a list", _manifest(id_order=[1, 2, 3])),
    Attack("no temperatures", _manifest(temperatures=[])),
    Attack("a temperature of zero", _manifest(temperatures=[1.0, 0])),
    Attack("a temperature below zero", _manifest(temperatures=[1.0, -2.0])),
    Attack("a temperature of 1e300", _manifest(temperatures=[1.0, 1e300])),
    Attack("a temperature twice", _manifest(temperatures=[1.0, 1.0])),
    Attack("temperatures without 1", _manifest(temperatures=[2.0])),
    Attack("temperatures of text", _manifest(temperatures=["1.0"])),
    Attack("temperatures that are text", _manifest(temperatures="1")),
    Attack("temperatures of true", _manifest(temperatures=[True])),
    Attack("temperatures of null", _manifest(temperatures=[1.0, None])),
    Attack("temperatures that nest", _manifest(temperatures=[[1.0]])),
    Attack("60,000 temperatures", _manifest(temperatures=[1.0, *(1 + n / 1000 for n in range(1, 60000))])),
    Attack("a temperature that is no number", _raw(TWO, TWO.replace("2.0", "NaN"))),
    Attack("a temperature without end", _raw(TWO, TWO.replace("2.0", "Infinity"))),
    Attack("a temperature of 1e400", _raw(TWO, TWO.replace("2.0", "1e400"))),
    Attack("a selection of unknown fields", _manifest(selection={"kind": "topk", "k": 8, "q": 1})),
    Attack("a selection of unknown kind", _manifest(selection={"kind": "best"})),
    Attack("a selection of a list as kind", _manifest(selection={"kind": ["topk"], "k": 8})),
    Attack("a selection that is a number", _manifest(selection=3)),
    Attack("10^9 entries", _manifest(selection={"kind": "topk", "k": 10**9})),
    Attack("no entries", _manifest(selection={"kind": "topk", "k": 0})),
    Attack("entries of text", _manifest(selection={"kind": "topk", "k": "8"})),
    Attack("2.5 entries", _manifest(selection={"kind": "topk", "k": 2.5})),
    Attack("entries of true", _manifest(selection={"kind": "topk", "k": True})),
    Attack("a threshold of text", _manifest(tau="0.5")),
    Attack("a threshold for a kind that has none", _manifest(tau=0.5)),
    Attack("adaptive of 1", _manifest(selection={"kind": "ipps", "k": 8, "adaptive": 1, "tau": 0.1})),
    Attack("adaptive without a threshold", _manifest(selection={"kind": "ipps", "k": 8, "adaptive": True})),
    Attack("knowing a number", _manifest(known=1)),
    Attack("knowing nothing", _manifest(known={})),
    Attack("knowing the tail of another temperature", _manifest(known=_known(tails=[3.0]))),
    Attack("knowing a tail of a list", _manifest(known=_known(tail_sum=["complement"]))),
    Attack("knowing an entropy of text", _manifest(known=_known(entropy="yes"))),
    Attack("a choice by an unknown entropy", _manifest(known=_known(entropy=False), positions="entropy>1")),
    Attack("positions of a number", _manifest(positions=1)),
    Attack("positions of null", _manifest(positions=None)),
    Attack("positions in a list", _manifest(positions=["all"])),
    Attack("positions of nothing", _manifest(positions="")),
    Attack("positions of an unknown rule", _manifest(positions="some")),
    Attack("positions of text", _manifest(positions="entropy>half")),
    Attack("positions above no number", _manifest(positions="entropy>nan")),
    Attack("positions above everything", _manifest(positions="entropy>inf")),
    Attack("positions above less than nothing", _manifest(positions="entropy>-1")),
    Attack("positions in another spelling", _manifest(positions="entropy>0.50")),
    Attack("positions of 5,000 digits", _manifest(positions="entropy>" + "1" * 5000)),
    Attack("a seed below zero", _manifest(seed=-1)),
    Attack("a seed of 2^64", _manifest(seed=1 << 64)),
    Attack("an unknown precision", _manifest(precision="float8")),
    Attack("a precision of a long number", _manifest(precision="9" * 5000)),
    Attack("a precision that is a number", _manifest(precision=6)),
    Attack("an unknown store", _manifest(store="tape")),
    Attack("a store that is a list", _manifest(store=["arrow"])),
    Attack(
        "the other store",
        lambda f: (f.change_manifest(store="zarr" if f.manifest.store == "arrow" else "arrow"), "shard")[1],
    ),
    Attack("isolate of 1", _manifest(isolate=1)),
    Attack("an origin that is a list", _manifest(origin=[])),
    Attack("filters of null", _manifest(filters=None)),
    Attack("a fingerprint that is short", _manifest(corpus_sha256="0")),
    Attack("a fingerprint of capitals", _manifest(teacher_sha256="A" * 64)),
    Attack("an unknown field", _manifest(surprise=1)),
    Attack("a format of true", _manifest(format=True)),
    Attack("a format of 1.0", _manifest(format=1.0)),
    Attack("a format of text", _manifest(format="1")),
    Attack("a tokenizer file above", _tokenizer("../tokenizer.json")),
    Attack("a tokenizer file in a folder", _tokenizer("more/tokenizer.json")),
    Attack("a tokenizer file at the root", _tokenizer("/etc/passwd")),
    Attack("a tokenizer file on a drive", _tokenizer("C:tokenizer.json")),
    Attack("a tokenizer file with a backslash", _tokenizer("..\\tokenizer.json")),
    Attack("a tokenizer file without a name", _tokenizer("")),
    Attack("a tokenizer file named ..", _tokenizer("..")),
    Attack("a tokenizer file of 5,000 letters", _tokenizer("a" * 5000)),
    Attack("a tokenizer file with a line's end", _tokenizer("a\nb")),
    Attack("a tokenizer file with a null", _tokenizer("a\0b")),
    Attack("tokenizer files in a list", _manifest(tokenizer_files=["tokenizer.json"])),
    Attack("a tokenizer file without a hash", _manifest(tokenizer_files={"tokenizer.json": None})),
    Attack("an origin of 40 levels", _manifest(origin={"a": _nested(40)})),
    Attack("an origin of 900 levels", _manifest(origin={"a": _nested(900)})),
    Attack("100,000 levels", _bytes(lambda data: b"[" * 100_000 + b"]" * 100_000)),
    Attack("100,000 levels of objects", _bytes(lambda data: b'{"a":' * 100_000)),
    Attack("a million small values", _bytes(lambda data: b"[" + b"{}," * 1_000_000 + b"1]")),
    Attack("a field twice", _raw('"seq_len": 64', '"seq_len": 32, "seq_len": 64')),
    Attack("half of a surrogate pair", _raw('"origin": {', '"origin": {"a": "\\ud800",')),
    Attack("a number of 10,000 digits", _raw('"documents": 12', '"documents": ' + "1" * 10_000)),
    Attack("a number of 4,000 digits", _raw('"documents": 12', '"documents": ' + "1" * 4_000)),
    Attack("a list", _bytes(lambda data: b"[1]")),
    Attack("nothing", _bytes(lambda data: b"")),
    Attack("UTF-16", _bytes(lambda data: data.decode().encode("utf-16"))),
    Attack("bytes that are no text", _bytes(lambda data: b"\xff\xfe\xfd")),
    Attack("8 MiB of spaces", _bytes(lambda data: data + b" " * (8 << 20))),
]


def _commit(**fields: Any) -> Callable[[Forgery], str]:
    return lambda f: f.change_commit(**fields)


def _object(**fields: Any) -> Callable[[Forgery], str]:
    """The first object of the commit described otherwise."""
    return lambda f: f.change_commit(objects=[{**f.objects[0], **fields}, *f.objects[1:]])


def _sums(**fields: Any) -> Callable[[Forgery], str]:
    return lambda f: f.change_commit(sums={**f.commit.sums, **fields})


def _bad(*records: Any, **fields: Any) -> Callable[[Forgery], str]:
    """A commit of bad records, or of an honest one whose counts lie."""
    listed = list(records) or [{"document": 1, "reason": "r"}]
    count = len(listed)
    return lambda f: f.change_commit(
        **{"documents": max(count, f.commit.documents), "dropped": count, "dropped_by": {"r": count}, "bad": count,
           "bad_records": listed, **fields}
    )  # fmt: skip


def _drop_hash(f: Forgery) -> str:
    return f.change_commit(objects=[{k: v for k, v in f.objects[0].items() if k != "sha256"}])


def _other_shards(f: Forgery) -> str:
    """Shard 0 is committed as the objects of shard 1."""
    found = json.loads((f.folder / commit_name(1)).read_text())
    return f.change_commit(objects=found["objects"], rows=found["rows"])


COMMITS = [
    Attack("more targets than labels in all", lambda f: f.change_commit(positions=f.commit.labels + 1)),
    Attack("labels without entropies", _commit(entropy_histogram=[])),
    Attack("one label more than entropies", lambda f: f.change_commit(labels=f.commit.labels + 1)),
    Attack("entropies below zero", lambda f: f.change_commit(entropy_histogram=[f.commit.labels + 1, -1])),
    Attack("entropies of text", _commit(entropy_histogram=["1"])),
    Attack("entropies that are a number", lambda f: f.change_commit(entropy_histogram=f.commit.labels)),
    Attack("entropies without end", lambda f: f.change_commit(entropy_histogram=[f.commit.labels, *[0] * 60_000])),
    Attack("2^60 tokens", _commit(tokens=1 << 60)),
    Attack("fewer tokens than labels", _commit(tokens=3)),
    Attack("more pieces than tokens", lambda f: f.change_commit(pieces=f.commit.tokens + 1)),
    Attack("more entries than its most allow", _commit(most_entries=0, least_entries=0)),
    Attack("more dropped than reasons", _commit(dropped=1)),
    Attack("reasons for nothing", _commit(dropped_by={"r": 0})),
    Attack("reasons for more than is dropped", _commit(dropped_by={"r": 1})),
    Attack("reasons for 2^62 documents twice", _commit(dropped_by={"r": 1 << 62, "s": 1 << 62})),
    Attack("reasons of text", _commit(dropped=1, dropped_by={"r": "1"})),
    Attack("reasons in a list", _commit(dropped_by=["r"])),
    Attack("a reason that clears the screen", _commit(dropped=1, dropped_by={"\x1b[2J": 1})),
    Attack("a reason of a megabyte", _commit(dropped=1, dropped_by={"r" * (1 << 20): 1})),
    Attack("a bad record that nobody dropped", _bad(dropped=0, dropped_by={})),
    Attack("a bad record that is not counted", _bad(bad=0)),
    Attack("a bad record twice", _bad({"document": 1, "reason": "r"}, {"document": 1, "reason": "r"})),
    Attack("bad records in another order", _bad({"document": 2, "reason": "r"}, {"document": 1, "reason": "r"})),
    Attack("a bad record of two lines", _bad({"document": 1, "reason": "one\ntwo"})),
    Attack("a bad record without a reason", _bad({"document": 1})),
    Attack("a bad record that is a number", _bad(1)),
    Attack("10,001 bad records", _bad(*({"document": n, "reason": "r"} for n in range(10_001)))),
    Attack("more cut than documents", _commit(cut=1 << 60)),
    Attack("more cut and truncated than documents", lambda f: f.change_commit(cut=f.commit.documents, truncated=1)),
    Attack("more ends of sequence than labels", lambda f: f.change_commit(eos_labels=f.commit.labels + 1)),
    Attack("ends of sequence of text", _commit(eos_labels="0")),
    Attack("sums that are missing", _commit(sums={})),
    Attack("entropy beyond any", _sums(entropy=1e9)),
    Attack("entropy of 400 digits", _sums(entropy=10**400)),
    Attack("label log p of 400 digits", _sums(label_logprob=-(10**400))),
    Attack("label log p above zero", _sums(label_logprob=1e6)),
    Attack("a tail mass below zero", _sums(tail_mass=[-1.0])),
    Attack("tail masses of other temperatures", _sums(tail_mass=[0.0] * 9)),
    Attack("tail masses of text", _sums(tail_mass="0")),
    Attack("an object above", _object(name="../shards/00000.arrow")),
    Attack("an object beside", _object(name="shards/00000.arrow/../00001.arrow")),
    Attack("an object at the root", _object(name="/etc/passwd")),
    Attack("an object in the tokenizer", _object(name="tokenizer/tokenizer.json")),
    Attack("an object of another shard", _other_shards),
    Attack("an object of shard 100,000", _object(name="shards/000001.arrow")),
    Attack("an object without a name", _object(name="")),
    Attack("an object that is a number", _object(name=3)),
    Attack("an object of 10,000 letters", _object(name="shards/00000." + "a" * 10_000)),
    Attack("an object with a null", _object(name="shards/00000.\0")),
    Attack("an object in other letters", _object(name="shards/00000.аrrow")),
    Attack("an object twice", lambda f: f.change_commit(objects=[f.objects[0], f.objects[0]])),
    Attack("an object without a hash", _drop_hash),
    Attack("an object with more", _object(more=1)),
    Attack("an object of a short hash", _object(sha256="0")),
    Attack("an object of 1.0 bytes", _object(bytes=1000.0)),
    Attack("an object of true bytes", _object(bytes=True)),
    Attack("an object of text bytes", _object(bytes="1000")),
    Attack("an object below zero", _object(bytes=-1)),
    Attack("an object of 2^70 bytes", _object(bytes=1 << 70)),
    Attack("no objects", _commit(objects=[])),
    Attack("objects in a map", _commit(objects={})),
    Attack("objects that are names", _commit(objects=["shards/00000.arrow"])),
    Attack("2^50 rows", _commit(rows=1 << 50)),
    Attack("2^31 rows", _commit(rows=1 << 31)),
    Attack("rows of true", _commit(rows=True)),
    Attack("rows below zero", _commit(rows=-1)),
    Attack("rows of null", _commit(rows=None)),
    Attack("positions of a float", _commit(positions=1e3)),
    Attack("entries of text", _commit(entries="1")),
    Attack("2^64 documents", _commit(documents=1 << 64)),
    Attack("another shard's number", _commit(shard=1)),
    Attack("a shard of true", _commit(shard=False)),
    Attack("a shard of 0.0", _commit(shard=0.0)),
    Attack("another cache", _commit(manifest_sha256=_OTHER)),
    Attack("a hash that is null", _commit(tokens_sha256=None)),
    Attack("a compute that is a list", _commit(compute=[])),
    Attack("a compute of 900 levels", _commit(compute={"a": _nested(900)})),
    Attack("an unknown field", _commit(surprise=1)),
    Attack("a format of 2", _commit(format=2)),
    Attack("a format of true", _commit(format=True)),
    Attack("nothing", _bytes(lambda data: b"", commit_name(SHARD))),
    Attack("the manifest", lambda f: _bytes(lambda data: (f.folder / NAME).read_bytes(), commit_name(SHARD))(f)),
]


def _instead(name: str | None, make: Callable[[Any], Any]) -> Callable[[Forgery], str]:
    """Something else in the place of an object."""

    def forge(f: Forgery) -> str:
        path = f.folder / (name or f.objects[0]["name"])
        path.unlink()
        make(path)
        return name or str(f.objects[0]["name"]).split("/zarr.json")[0]

    return forge


_ABSENT = {("a link to nothing", "manifest"), ("a link to nothing", "commit"), ("a folder", "commit")}
"""These are no cache, or one that is not complete."""


def _devices() -> list[Attack]:
    places = {"object": None, "manifest": NAME, "commit": commit_name(SHARD), "tokenizer": "tokenizer/tokenizer.json"}
    makers: dict[str, Callable[[Any], Any]] = {
        "a pipe": os.mkfifo,
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
        "a folder": lambda path: path.mkdir(),
    }
    return [
        Attack(f"{what} as {which}", _instead(name, make))
        for what, make in makers.items()
        for which, name in places.items()
        if (what, which) not in _ABSENT
    ]


DEVICES = _devices()
