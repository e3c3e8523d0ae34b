"""The JSON schemas of the records: true of every record that is written, and refusing what readers refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kdcache.errors import CacheError
from kdcache.extras import ExtraSpec
from kdcache.known import TAIL_SUMS, Known
from kdcache.selection import Selection
from kdcache.selection.kind import find_kind
from kdcache.store.commit import Commit
from kdcache.store.commits import read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.registry import store_names
from kdcache.store.sealed_json import seal
from kdcache.testing.example_rows import SELECTIONS, TEACHER_CONTEXT, example_manifest, example_rows, write_cache

SCHEMAS = Path(__file__).parents[2] / "docs/schema"
RECORDS = {"manifest": Manifest, "commit": Commit}
LATER: dict[str, set[str]] = {"manifest": {"teacher_context"}, "commit": set()}
"""Fields that were added to the format, and are absent where they say nothing."""


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text())
    return found


def is_valid(name: str, record: Any) -> bool:
    """To a schema 1.0 is a whole number; a reader refuses it."""
    return Draft202012Validator(schema(name)).is_valid(record)


@pytest.mark.parametrize("name", RECORDS)
def test_a_schema_names_the_fields_of_its_record(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))
    fields = {field.name for field in dataclasses.fields(RECORDS[name])} | {"format", "checksum"}
    assert set(schema(name)["properties"]) == fields == {*schema(name)["required"], *LATER[name]}


def test_a_schema_names_every_choice() -> None:
    properties = schema("manifest")["properties"]
    settings = properties["selection"]["properties"]
    own = {field.name for kind in SELECTIONS for field in dataclasses.fields(find_kind(kind))}
    assert set(settings) == {"kind", *own}
    assert set(settings["kind"]["enum"]) == set(SELECTIONS)
    assert set(properties["known"]["properties"]) == {field.name for field in dataclasses.fields(Known)}
    assert set(properties["known"]["properties"]["tail_sum"]["enum"]) == {*TAIL_SUMS, None}
    assert all(re.search(properties["store"]["pattern"], name) for name in store_names())
    for precision in properties["precision"]["enum"]:
        _ = example_manifest("arrow", precision=precision).codec


def test_a_teacher_context_is_valid_and_its_absence_is_not_written(tmp_path: Path) -> None:
    for name, context in (("with", TEACHER_CONTEXT), ("without", {})):
        manifest = example_manifest("arrow", teacher_context=context)
        write_cache(LocalStorage(tmp_path / name), manifest, example_rows(manifest, 3))
        found = json.loads((tmp_path / name / NAME).read_text())
        Draft202012Validator(schema("manifest")).validate(found)
        assert found.get("teacher_context") == (context or None)
        assert Manifest.read(LocalStorage(tmp_path / name)).teacher_context == context


@pytest.mark.parametrize("store", store_names())
@pytest.mark.parametrize("kind", SELECTIONS)
def test_records_of_examples_are_valid(tmp_path: Path, store: str, kind: str) -> None:
    manifest = example_manifest(
        store, selection=SELECTIONS[kind], positions="entropy>1e-05" if kind == "topk" else "all"
    )
    write_cache(LocalStorage(tmp_path), manifest, example_rows(manifest, 3))
    Draft202012Validator(schema("manifest")).validate(json.loads((tmp_path / NAME).read_text()))
    for path in (tmp_path / "commits").iterdir():
        Draft202012Validator(schema("commit")).validate(json.loads(path.read_text()))


KNOWN = Selection(k=8).known((1.0, 2.0)).to_fields()

UNPLAIN = ("a\n", "\0", "\x1b[2J", "\x9b", "a\u2028b", "\u202ea", "\u2066a")
"""Reasons that would do more in a terminal than stand there."""

NINE: dict[str, Any] = {"dropped": 9, "dropped_by": {"r": 9}, "bad": 9}
"""Counts of a commit that has nine bad records."""

LIES: list[tuple[str, dict[str, Any]]] = [
    ("manifest", {"format": 2}),
    ("manifest", {"surprise": 1}),
    ("manifest", {"teacher_sha256": "0"}),
    ("manifest", {"tokenizer_files": {"../tokenizer.json": "0" * 64}}),
    ("manifest", {"tokenizer_files": {"..": "0" * 64}}),
    ("manifest", {"tokenizer_files": {"a\n": "0" * 64}}),
    ("manifest", {"tokenizer_files": {"a": "0" * 64 + "\n"}}),
    ("manifest", {"tokenizer_files": {"a:b": "0" * 64}}),
    ("manifest", {"tokenizer_files": {"tokenizer.json": "0"}}),
    ("manifest", {"tokenizer_files": []}),
    ("manifest", {"documents": 0}),
    ("manifest", {"documents": "many"}),
    ("manifest", {"shards": 0}),
    ("manifest", {"shards": 10_000_001}),
    ("manifest", {"plan": None}),
    ("manifest", {"plan": {"bytes": 100}}),
    ("manifest", {"plan": {"bytes": 100, "sha256": "0"}}),
    ("manifest", {"plan": {"bytes": 100, "sha256": "0" * 64, "more": 1}}),
    ("manifest", {"date": "28 November"}),
    ("manifest", {"date": "2026-11-28\n"}),
    ("manifest", {"date": None}),
    ("manifest", {"on_bad_record": "retry"}),
    ("manifest", {"vocab_size": 1 << 31}),
    ("manifest", {"seq_len": True}),
    ("manifest", {"seq_len": 1 << 63}),
    ("manifest", {"isolate": 1}),
    ("manifest", {"selection": {"kind": "best"}}),
    ("manifest", {"selection": {"kind": "topk", "k": "8"}}),
    ("manifest", {"selection": {"kind": "topk", "k": 8, "q": 1}}),
    ("manifest", {"selection": []}),
    ("manifest", {"selection": {"kind": "ipps", "k": 8, "tau": 2.0}}),
    ("manifest", {"selection": {"kind": "ipps", "k": 8, "tau": "0.5"}}),
    ("manifest", {"selection": {"kind": "ipps", "k": 8, "adaptive": None}}),
    ("manifest", {"known": {}}),
    ("manifest", {"known": KNOWN | {"entropy": 1}}),
    ("manifest", {"known": KNOWN | {"tails": 1.0}}),
    ("manifest", {"known": KNOWN | {"partitions": ["1"]}}),
    ("manifest", {"known": KNOWN | {"tail_sum": "guess"}}),
    ("manifest", {"known": KNOWN | {"surprise": True}}),
    ("manifest", {"positions": "some"}),
    ("manifest", {"positions": "entropy>"}),
    ("manifest", {"positions": "entropy>-1"}),
    ("manifest", {"positions": "entropy>nan"}),
    ("manifest", {"positions": "all\n"}),
    ("manifest", {"positions": None}),
    ("manifest", {"seed": -1}),
    ("manifest", {"temperatures": []}),
    ("manifest", {"temperatures": [2.0]}),
    ("manifest", {"temperatures": [1.0, 1.0]}),
    ("manifest", {"temperatures": [1.0, "2"]}),
    ("manifest", {"temperatures": [1.0, 0]}),
    ("manifest", {"temperatures": [1.0, 1000]}),
    ("manifest", {"precision": "float8"}),
    ("manifest", {"precision": 6}),
    ("manifest", {"id_order": [1, 2]}),
    ("manifest", {"store": "Tape"}),
    ("manifest", {"origin": None}),
    ("manifest", {"extras": None}),
    ("manifest", {"extras": {"a": {"width": 4}}}),
    *(
        ("manifest", {"extras": {name: {**ExtraSpec(width=4).to_fields(), **lie}}})
        for name, lie in (
            ("A", {}), ("a/b", {}), ("a\n", {}), ("a" * 81, {}), ("a", {"width": 0}), ("a", {"width": True}),
            ("a", {"dtype": "int8"}), ("a", {"precision": "4"}), ("a", {"per": "row"}), ("a", {"more": 1}),
            ("a", {"error_bound": "0"}), ("a", {"error_bound": -1}),
        )
    ),
    ("manifest", {"teacher_context": None}),
    ("manifest", {"teacher_context": {}}),
    ("manifest", {"teacher_context": {"seq_len": 24}}),
    ("manifest", {"teacher_context": {"seq_len": "24", "system": None}}),
    ("manifest", {"teacher_context": {"seq_len": 0, "system": None}}),
    ("manifest", {"teacher_context": {"seq_len": 24, "system": 1}}),
    ("manifest", {"teacher_context": {"seq_len": 24, "system": None, "more": 1}}),
    ("commit", {"format": 0}),
    ("commit", {"surprise": 1}),
    ("commit", {"shard": -1}),
    ("commit", {"shard": 10_000_000}),
    ("commit", {"rows": -1}),
    ("commit", {"rows": 1 << 32}),
    ("commit", {"rows": "3"}),
    ("commit", {"positions": None}),
    ("commit", {"labels": -1}),
    ("commit", {"entropy_histogram": [0] * 151}),
    ("commit", {"entropy_histogram": [-1]}),
    ("commit", {"entropy_histogram": {}}),
    ("commit", {"tokens": 1 << 50}),
    ("commit", {"pieces": -1}),
    ("commit", {"most_entries": 1.5}),
    ("commit", {"sums": None}),
    ("commit", {"sums": {}}),
    ("commit", {"sums": {"entropy": 1.0, "label_logprob": -1.0, "tail_mass": None, "more": 1.0}}),
    ("commit", {"sums": {"entropy": "1", "label_logprob": -1.0, "tail_mass": None}}),
    ("commit", {"sums": {"entropy": 1.0, "label_logprob": True, "tail_mass": None}}),
    ("commit", {"sums": {"entropy": 1.0, "label_logprob": -1.0, "tail_mass": 0.5}}),
    ("commit", {"sums": {"entropy": 1.0, "label_logprob": -1.0, "tail_mass": [-0.5, 0.5]}}),
    ("commit", {"sums": {"entropy": 1.0, "label_logprob": -1.0, "tail_mass": [0.5] * 65}}),
    ("commit", {"tokens_sha256": "F" * 64}),
    ("commit", {"compute": []}),
    ("commit", {"cut": -1}),
    ("commit", {"truncated": None}),
    ("commit", {"bad": "1"}),
    ("commit", {"eos_labels": -1}),
    ("commit", {"eos_labels": 1.5}),
    ("commit", {"dropped_by": []}),
    ("commit", {"dropped_by": {"r": "1"}}),
    *(("commit", {"dropped": 1, "dropped_by": {reason: 1}}) for reason in ("", "a" * 201, *UNPLAIN)),
    ("commit", {"dropped_by": {"r": 0}}),
    *(
        ("commit", {**NINE, "bad_records": [{"document": 1, "reason": "r", **lie}]})
        for lie in (
            {"document": -1}, {"document": True}, {"document": "1"}, {"reason": 1}, {"reason": ""}, {"more": 1},
            *({"reason": reason} for reason in UNPLAIN),
        )
    ),
    ("commit", {**NINE, "bad_records": [{"document": 1}]}),
    ("commit", {"bad_records": {}}),
    ("commit", {"objects": []}),
    ("commit", {"objects": {}}),
    ("commit", {"objects": ["shards/00000.arrow"]}),
    *(
        ("commit", {"objects": [{"name": name, "bytes": 1000, "sha256": "0" * 64}]})
        for name in (
            "../00000.arrow", "/shards/00000.arrow", "shards/00000.arrow/../x", "shards/00000./..", "shards/00000.//x",
            "shards/00000.a/./b", "shards/000001.arrow", "tokenizer/tokenizer.json", "shards/00000.\0",
            "shards/00000.a\n", "shards/00000.C:x",
            "shards/00000.a\\b", "shards/00000.é", "shards/00000." + "a" * 200, "", "shards/00000.a/",
        )
    ),
    ("commit", {"objects": [{"name": "shards/00000.arrow", "bytes": -1, "sha256": "0" * 64}]}),
    ("commit", {"objects": [{"name": "shards/00000.arrow", "bytes": 1000}]}),
    ("commit", {"objects": [{"name": "shards/00000.arrow", "bytes": 1000, "sha256": "0"}]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lie"), LIES, ids=str)
def test_a_reader_refuses_what_the_schema_refuses(cache: Path, tmp_path: Path, name: str, lie: dict[str, Any]) -> None:
    records = shutil.copytree(cache, tmp_path / "c", ignore=shutil.ignore_patterns("shards", "tokenizer"))
    copy = LocalStorage(records)
    path = copy.folder / (NAME if name == "manifest" else "commits/00000.json")
    honest = json.loads(path.read_text())
    assert is_valid(name, honest)
    assert not is_valid(name, {**honest, **lie})
    path.write_bytes(seal({**honest, **lie}))
    with pytest.raises(CacheError, match=path.name):
        read_commits(copy, Manifest.read(copy))


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_needed(cache: Path, name: str) -> None:
    path = cache / (NAME if name == "manifest" else "commits/00000.json")
    honest = json.loads(path.read_text())
    for field in honest:
        assert not is_valid(name, {k: v for k, v in honest.items() if k != field})
