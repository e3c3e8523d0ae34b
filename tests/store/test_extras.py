"""Extras in a cache: written, read back, converted, verified, batched; and refused where they lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.convert import convert
from kdcache.errors import CorruptCacheError, TargetError
from kdcache.extras import ExtraSpec
from kdcache.report.inspect import inspect_summary
from kdcache.rows import IGNORE
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import Manifest
from kdcache.store.publish import new_shard
from kdcache.store.row_format import Record
from kdcache.student.data import Collator, RowDataset
from kdcache.testing.example_rows import EXTRAS, Example, example_extras, example_manifest, example_rows, write_cache

STORES = ("arrow", "zarr")
TOLERANCE = {"hidden:-1": 0.02, "surprise": 2e-3, "wide_0.5": 2e-2, "exact": 0.0}


def write(folder: Path, store: str, **changes: Any) -> tuple[Manifest, list[Example]]:
    manifest = example_manifest(store, extras=EXTRAS, **changes)
    rows = example_rows(manifest, 9)
    return write_cache(LocalStorage(folder), manifest, rows), rows


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("positions", ["all", "entropy>1.2"])
def test_a_row_holds_what_was_given(tmp_path: Path, store: str, positions: str) -> None:
    manifest, rows = write(tmp_path / "c", store, positions=positions)
    cache = open_cache(tmp_path / "c")
    for i, (packed, _) in enumerate(rows):
        found, n = cache[i], len(packed.tokens)
        assert list(found.extras) == sorted(EXTRAS)
        labelled = torch.from_numpy(packed.labels(manifest.seq_len) != IGNORE)
        for name, values in example_extras(manifest, packed).items():
            spec, extra = manifest.extra_specs[name], found.extras[name]
            has = labelled if spec.per == "position" else torch.arange(manifest.seq_len) < n
            assert extra.shape == (manifest.seq_len, spec.width) and extra.dtype == torch.float32
            assert extra[~has].isnan().all()
            torch.testing.assert_close(extra[has], torch.from_numpy(values), rtol=0, atol=3 * TOLERANCE[name])
    assert verify_cache(tmp_path / "c").ok


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"k": 2}, {"precision": "6"}, {"k": 2, "precision": "float16"}], ids=str)
@pytest.mark.parametrize("stores", [STORES, STORES[::-1]], ids=str)
def test_conversion_carries_them_bit_for_bit(tmp_path: Path, stores: tuple[str, str], options: dict[str, Any]) -> None:
    write(tmp_path / "one", stores[0])
    convert(tmp_path / "one", tmp_path / "two", store=stores[1], **options)
    convert(tmp_path / "two", tmp_path / "back", store=stores[0])
    assert verify_cache(tmp_path / "two").ok
    one, two, back = (open_cache(tmp_path / name) for name in ("one", "two", "back"))
    assert one.manifest.extras == two.manifest.extras == back.manifest.extras
    if not options:
        assert {s: c.content_sha256 for s, c in one.commits.items()} == {
            s: c.content_sha256 for s, c in two.commits.items()
        }
    for i in range(len(one)):
        for name in EXTRAS:
            assert np.array_equal(one[i].extras[name], two[i].extras[name], equal_nan=True)
            assert np.array_equal(one[i].extras[name], back[i].extras[name], equal_nan=True)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("exact", lambda v: np.where(np.arange(3) == 1, np.nan, v), "extra exact cannot be stored: it holds NaN"),
        ("hidden:-1", lambda v: v[:-1], "extra hidden:-1 cannot be stored: it has 11 vectors for 12 tokens"),
        ("surprise", lambda v: v[:, :0], r"extra surprise .* not \[vectors, 1\]"),
        ("surprise", lambda v: v * 1e6, "extra surprise .* float16 cannot hold"),
        ("exact", None, "a row comes with the extras hidden:-1, surprise, wide_0.5, but the cache holds exact, hidden"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, name: str, change: Any, sentence: str) -> None:
    manifest = example_manifest("arrow", extras=EXTRAS)
    row, targets = example_rows(manifest, 1)[0]
    extras = dict(example_extras(manifest, row))
    if change is None:
        del extras[name]
    else:
        extras[name] = change(extras[name])
    with new_shard(LocalStorage(tmp_path), manifest, 0) as writer:
        with pytest.raises(TargetError, match=sentence):
            writer.write(row, targets, extras=extras)
        assert writer.tally.rows == 0
        writer.write(row, targets, extras=example_extras(manifest, row))


@pytest.mark.parametrize(
    ("stream", "change"),
    [
        ("extra.hidden~-1", lambda s: s[:-1]),
        ("extra.hidden~-1", lambda s: s[:-5]),
        ("extra.hidden~-1", lambda s: np.append(s, s)),
        ("extra.hidden~-1", lambda s: np.full_like(s, -128)),
        ("scale.hidden~-1", lambda s: s[:0]),
        ("scale.hidden~-1", lambda s: -s),
        ("scale.hidden~-1", lambda s: s * np.float32(np.nan)),
        ("scale.hidden~-1", lambda s: np.full_like(s, 3e38)),
        ("extra.surprise", lambda s: s * np.float16(np.inf)),
        ("extra.exact", lambda s: s[:-3]),
        ("extra.wide_0.5", lambda s: np.full_like(s, 0x7F80)),
    ],
)
@pytest.mark.parametrize("store", STORES)
def test_an_extra_that_lies_is_damage(tmp_path: Path, store: str, stream: str, change: Any) -> None:
    """Sealed by the store's own writer: what is left to see the lie is the structure."""
    from kdcache.store.commit import histogram
    from kdcache.store.publish import publish_manifest, publish_shard

    manifest, storage = example_manifest(store, extras=EXTRAS), LocalStorage(tmp_path)
    manifest = publish_manifest(storage, manifest, {})
    (row, targets), form = example_rows(manifest, 1)[0], manifest.row_format
    record = form.pack(row, targets, example_extras(manifest, row))
    streams = {**record.streams, stream: change(record.streams[stream])}
    lie = Record(positions=record.positions, streams=streams)
    limit = dict(form.shapes(form.seq_len))[stream][1]
    if lie.streams[stream].size > int(np.prod(limit)) and store == "zarr":
        pytest.skip("no array has room for it")
    with new_shard(storage, manifest, 0) as writer:
        writer.write(row, targets, lie)
        publish_shard(storage, manifest, writer, documents=20, entropies=histogram(targets.entropy), compute={})
    with pytest.raises(CorruptCacheError, match=r"shards/00000\.\w+, row 0: "):
        open_cache(tmp_path, partial=True)[0]
    assert not verify_cache(tmp_path).ok


def test_batches_carry_them(tmp_path: Path) -> None:
    write(tmp_path / "c", "arrow")
    cache = open_cache(tmp_path / "c")
    batch = Collator([cache])(RowDataset([cache], [[3, 0, 5]]).__getitems__(range(3)))
    for name, values in batch["extras"].items():
        assert torch.equal(values.nan_to_num(9), torch.stack([cache[i].extras[name] for i in (3, 0, 5)]).nan_to_num(9))
    other = {
        "hidden:-1": ExtraSpec(width=40, precision="float16").to_fields(),
        "exact": ExtraSpec(width=4, per="position").to_fields(),
    }
    manifest = example_manifest("zarr", extras=other)
    write_cache(LocalStorage(tmp_path / "d"), manifest, example_rows(manifest, 3))
    mixed = [cache, open_cache(tmp_path / "d")]
    batch = Collator(mixed)(RowDataset(mixed, [[3], [1]]).__getitems__(range(2)))
    assert list(batch["extras"]) == ["hidden:-1"]


def test_a_summary_lists_them(tmp_path: Path) -> None:
    _, rows = write(tmp_path / "c", "arrow")
    found = inspect_summary(str(tmp_path / "c"), 0)["extras"]
    tokens = sum(len(row.tokens) for row, _ in rows)
    assert [x["name"] for x in found] == sorted(EXTRAS)
    assert found[1] == {"name": "hidden:-1", **EXTRAS["hidden:-1"], "bytes": tokens * (40 + 4 + 2 * (4 + 2))}


def test_an_auxiliary_term_learns_from_them(cache: Path, student_config: Path) -> None:
    """A mean square between the student's hidden states and an extra: the sum of both losses and of both gradients."""
    from kdcache.losses import Objective
    from kdcache.student import compute_loss, fuse_head, load_student

    opened = open_cache(cache)
    model = load_student(str(student_config), opened, torch.device("cpu"), 0)
    batch = Collator([opened])(RowDataset([opened], [range(2)]).__getitems__(range(2)))
    width = model.config.hidden_size
    wanted = torch.randn(*batch["input_ids"].shape, width, generator=torch.Generator().manual_seed(0))
    wanted[0, 5:] = torch.nan
    batch["extras"] = {"hidden:-1": wanted}

    def auxiliary(hidden: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        teacher = batch["extras"]["hidden:-1"].to(hidden.device)
        has = ~teacher.isnan().any(-1)
        return (hidden[has].float() - teacher[has]).square().mean()

    def run(objective: Objective, **more: Any) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = compute_loss(model, head, batch, objective, vocab_size=320, **more)
        loss.backward()
        return loss.item(), next(model.model.layers.parameters()).grad.clone()

    head, objective = fuse_head(model, "cpu"), Objective(soft_weight=0.7)
    alone, together = run(objective), run(objective, auxiliary=auxiliary)
    hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    term = auxiliary(hidden, batch)
    model.zero_grad()
    term.backward()
    gradient = next(model.model.layers.parameters()).grad
    assert together[0] == pytest.approx(alone[0] + term.item(), rel=1e-5)
    torch.testing.assert_close(together[1], alone[1] + gradient, rtol=1e-4, atol=1e-6)


def test_specs_in_a_manifest_are_checked(tmp_path: Path) -> None:
    spec = ExtraSpec(width=5, precision="int8")
    assert {**dataclasses.asdict(spec), "error_bound": spec.error_bound} == spec.to_fields()
    manifest = example_manifest("arrow", extras={"h": dataclasses.replace(spec, width=1 << 28).to_fields()})
    with pytest.raises(Exception, match="above the limit"):
        manifest.require_sound()
