"""Exports are read back by who they are for, and imports give the numbers that were exported."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
import yaml
import zarr
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache import Cache, Selection, create_cache, open_cache, select, verify_cache
from kdcache.errors import CacheError, ConfigError
from kdcache.interop.export import export
from kdcache.interop.formats import WRITTEN
from kdcache.interop.import_rows import IMPORTED, import_cache
from kdcache.rows import IGNORE, PackedRow
from kdcache.targets import SparseTargets

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 6},
    "masked": {"kind": "topk", "k": 6},
    "topp": {"kind": "topp", "top_p": 0.7, "k": 12},
    "ipps": {"kind": "ipps", "k": 6},
}
SOME = ["topk", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("masked", "topp", "ipps"))]
VOCABULARY, SEQ_LEN = 320, 24


@pytest.fixture(scope="module")
def caches(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small cache of each kind: rows of several pieces, some tokens masked; of `masked`, positions left out, too."""
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: write(folder / kind, kind, teacher) for kind in KINDS}


def write(path: Path, kind: str, tokenizer: Path) -> Path:
    rule = Selection(**KINDS[kind])
    temperatures = (1.0,) if rule.sampled else (1.0, 2.0)
    writer = create_cache(
        path, vocab_size=VOCABULARY, seq_len=SEQ_LEN, selection=rule, temperatures=temperatures, shards=2,
        teacher="random", documents=30, tokenizer=tokenizer, precision="float32",
        positions="entropy>2.5" if kind == "masked" else "all",
    )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    for number in range(2):
        with writer.shard(number) as shard:
            for row, n in enumerate((24, 17, 24, 9, 2)):
                lengths = [n] if n < 9 else [1, 7, n - 8]
                mask = torch.rand(n, generator=g) < 0.7 if row % 2 else torch.ones(n, dtype=torch.bool)
                tokens = torch.randint(0, VOCABULARY, (n,), generator=g)
                logits = 3 * torch.randn(n, VOCABULARY, generator=g)
                labels = torch.cat([tokens[1:], torch.tensor([-100])])
                keys = torch.tensor([[number, row, slot] for slot in range(n)])
                shard.write(
                    tokens, select(logits, rule, labels=labels, temperatures=temperatures, keys=keys),
                    piece_lengths=lengths, supervised=mask.numpy(), documents=list(range(row, row + len(lengths))),
                )  # fmt: skip
    assert writer.finish()["complete"]
    return path


def pieces(cache: Cache) -> list[tuple[np.ndarray, SparseTargets, np.ndarray]]:
    """Tokens, targets and slots of each piece that has a target, in order."""
    found = []
    for packed, targets in cache.read_rows(range(len(cache))):
        slots, kept = carrying(packed, targets)
        ends = np.cumsum(packed.piece_lengths)
        for start, end in zip(ends - packed.piece_lengths, ends, strict=True):
            here = (slots >= start) & (slots < end)
            if here.any():
                found.append((packed.tokens[start:end], kept[torch.from_numpy(here)], slots[here] - start))
    return found


def carrying(packed: PackedRow, targets: SparseTargets) -> tuple[np.ndarray, SparseTargets]:
    has = (targets.count > 0).numpy()
    slots = np.flatnonzero(packed.labels(len(packed.tokens)) != IGNORE)
    return slots[has], targets[torch.from_numpy(has)]


def entries(targets: SparseTargets) -> list[dict[int, float]]:
    """Log-probability by id of each position; of sampled targets the log of the weight."""
    values = targets.weights.log() if targets.sampled else targets.logprobs
    return [
        dict(zip(ids[:count].tolist(), each[:count].tolist(), strict=True))
        for ids, each, count in zip(targets.ids, values, targets.count.tolist(), strict=True)
    ]


def close(one: list[dict[int, float]], two: list[dict[int, float]], tolerance: float = 1e-5) -> None:
    assert len(one) == len(two)
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        assert max((abs(mine[i] - other[i]) for i in mine), default=0) < tolerance


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_a_table_holds_the_caches_numbers(caches: dict[str, Path], tmp_path: Path, kind: str, form: str) -> None:
    out = tmp_path / f"t.{form}"
    summary = export(caches[kind], out, form)
    cache = open_cache(caches[kind])
    if form == "parquet":
        records = duckdb.sql(f"select * from '{out}'").to_arrow_table().to_pylist()
        assert datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "hf"))[0]["ids"] == records[0]["ids"]
        total = duckdb.sql(f"select sum(len(slots)), sum(list_sum(list_transform(ids, lambda x: len(x)))) from '{out}'")
        assert total.fetchall() == [(summary["positions"], summary["entries"])]
    elif form == "arrow":
        records = pa.ipc.open_file(out).read_all().to_pylist()
        assert pl.read_ipc(out)["slots"].to_list()[0] == records[0]["slots"]
    else:
        records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == summary["rows"] == len(cache) and "the tokenizer" in summary["lost"]
    for index, (packed, targets) in enumerate(cache.read_rows(range(len(cache)))):
        slots, kept = carrying(packed, targets)
        record = records[index]
        assert (record["shard"], record["row"]) == cache.locate(index)
        assert record["tokens"] == packed.tokens.tolist() and record["slots"] == slots.tolist()
        assert record["labels"] == packed.labels(SEQ_LEN)[slots].tolist()
        assert record["piece_lengths"] == packed.piece_lengths.tolist()
        assert record["documents"] == packed.piece_documents.tolist()
        for at in range(len(slots)):
            count = int(kept.count[at])
            assert record["ids"][at] == kept.ids[at, :count].tolist()
            np.testing.assert_allclose(record["weights"][at], kept.weights[at, :count], rtol=1e-6)
            wanted = [None if np.isnan(x) else x for x in kept.logprobs[at, :count].tolist()]
            assert record["logprobs"][at] == pytest.approx(wanted)
        for name in ("log_tail", "log_partition", "entropy", "label_logprob"):
            values = getattr(kept, name)
            assert (values is None) == (name not in record)
            if values is not None:
                got = np.array(record[name], np.float64).reshape(values.shape)
                wanted = values.double().numpy()
                if form == "jsonl":  # which has no infinity
                    wanted = np.where(np.isfinite(wanted), wanted, np.nan)
                np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", SOME)
def test_zarr_arrays_hold_the_caches_numbers(caches: dict[str, Path], tmp_path: Path, kind: str) -> None:
    export(caches[kind], tmp_path / "z", "zarr")
    group, cache = zarr.open_group(str(tmp_path / "z"), mode="r"), open_cache(caches[kind])
    assert group["ids"].metadata.dimension_names == ("row", "slot", "entry")
    assert group.attrs["vocab_size"] == cache.manifest.vocab_size
    for index, row in enumerate(cache):
        assert np.array_equal(group["count"][index], row.targets.count)
        assert np.array_equal(group["segments"][index], row.segments) and np.array_equal(
            group["labels"][index], row.labels
        )
        used = row.targets.valid.numpy()
        assert np.array_equal(group["ids"][index][used], row.targets.ids.numpy()[used])
        np.testing.assert_array_equal(group["weights"][index][used], row.targets.weights.numpy()[used])
        assert np.isnan(group["weights"][index][~used]).all()


FOREIGN = ("distillkit", "megatron", "topk-jsonl")


@pytest.mark.parametrize("kind", SOME[:-1])
@pytest.mark.parametrize("form", FOREIGN)
def test_what_is_exported_is_imported_as_it_was(caches: dict[str, Path], tmp_path: Path, kind: str, form: str) -> None:
    export(caches[kind], tmp_path / "x", form)
    summary = import_cache(
        str(tmp_path / "x"), tmp_path / "c", form, teacher="the sure one", vocab_size=VOCABULARY, precision="float32",
        rows_per_shard=6,
    )  # fmt: skip
    assert summary["complete"] and summary["shards"]["planned"] > 1 and not summary["renormalised"]
    assert verify_cache(tmp_path / "c").ok
    mine, theirs = open_cache(caches[kind]), open_cache(tmp_path / "c")
    assert summary["positions"] == mine.commits.total("positions")
    one, two = pieces(mine), pieces(theirs)
    assert len(one) == len(two)
    for (tokens, targets, slots), (tokens_2, targets_2, slots_2) in zip(one, two, strict=True):
        assert np.array_equal(tokens, tokens_2) and np.array_equal(slots, slots_2)
        close(entries(targets), entries(targets_2))
        kept = targets.weights.double().sum(-1)
        torch.testing.assert_close(targets_2.log_tail[:, 0].double().exp(), 1 - kept, atol=2e-6, rtol=0)
        if form == "topk-jsonl":
            torch.testing.assert_close(targets_2.label_logprob, targets.label_logprob, atol=1e-5, rtol=0)
        else:
            assert targets_2.label_logprob is None


@pytest.mark.slow
def test_an_import_goes_on_where_it_was_stopped(caches: dict[str, Path], tmp_path: Path) -> None:
    export(caches["topk"], tmp_path / "x", "distillkit")
    options: dict[str, Any] = {"as_": "distillkit", "teacher": "t", "vocab_size": VOCABULARY, "rows_per_shard": 6}
    whole = import_cache(str(tmp_path / "x"), tmp_path / "whole", **options)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_cache(str(tmp_path / "x"), tmp_path / "c", **options, on_progress=stop)
    assert 0 < len(open_cache(tmp_path / "c", partial=True).commits) < whole["shards"]["planned"]
    import_cache(str(tmp_path / "x"), tmp_path / "c", **options)
    assert verify_cache(tmp_path / "c").content_sha256 == verify_cache(tmp_path / "whole").content_sha256


@pytest.mark.slow
@pytest.mark.parametrize("form", FOREIGN)
def test_sampled_weights_are_exported_as_log_weights_and_that_is_said(
    caches: dict[str, Path], tmp_path: Path, form: str
) -> None:
    summary = export(caches["ipps"], tmp_path / "x", form)
    assert any("ipps are estimates" in sentence for sentence in summary["lost"])
    found = import_cache(
        str(tmp_path / "x"), tmp_path / "c", form, teacher="t", vocab_size=VOCABULARY, precision="float32"
    )
    assert found["renormalised"] and "add up to 1" in found["advice"][0]
    one, two = pieces(open_cache(caches["ipps"])), pieces(open_cache(tmp_path / "c"))
    for (_, targets, _), (_, targets_2, _) in zip(one, two, strict=True):
        close(entries(targets), entries(targets_2), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", WRITTEN)
def test_an_export_replaces_nothing_and_leaves_nothing(caches: dict[str, Path], tmp_path: Path, form: str) -> None:
    out = tmp_path / "x"
    out.write_text("mine")
    with pytest.raises(CacheError, match="replaces nothing"):
        export(caches["topk"], out, form)
    assert out.read_text() == "mine"
    out.unlink()

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(caches["topk"], out, form, on_progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert export(caches["topk"], out, form)["bytes"] > 0


def test_the_commands(caches: dict[str, Path], tmp_path: Path) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [str(each) for each in arguments])
        return done.exit_code, done.stdout, done.stderr

    code, out, err = call("export", caches["topk"], "--as", "topk-jsonl", "--out", tmp_path / "x.jsonl")
    assert code == 0 and "10 rows" in out and err.startswith("note: not in the export: ") and err.count("\n") == 1
    code, out, err = call("export", caches["topk"], "--as", "parquet", "--out", tmp_path / "x.parquet", "--json")
    assert code == 0 and err == "" and json.loads(out)["as"] == "parquet" and json.loads(out)["lost"]
    code, out, err = call("export", caches["topk"], "--as", "excel", "--out", tmp_path / "y")
    assert (code, out) == (2, "") and err.startswith("error: --as is excel, but must be one of parquet, arrow")
    code, out, err = call("export", caches["topk"], "--as", "jsonl", "--out", tmp_path / "x.jsonl")
    assert code == 2 and err.count("\n") == 1 and "replaces nothing" in err

    usual = ("import", tmp_path / "x.jsonl", "--as", "topk-jsonl", "--teacher", "t", "--out", tmp_path / "c")
    code, out, err = call(*usual)
    assert (
        code == 2
        and err == "error: --vocab-size is not given, and the source does not say it; name it, or the tokenizer\n"
    )
    code, out, err = call(*usual, "--vocab-size", VOCABULARY)
    assert code == 0 and "positions" in out and "not in the source: the teacher's entropy" in err
    code, out, err = call(*usual, "--vocab-size", 7)
    assert code == 2 and "has the token id" in err and verify_cache(tmp_path / "c").ok
    (tmp_path / "o.toml").write_text('as = "jsonl"\n')
    assert call("export", caches["topk"], "--config", tmp_path / "o.toml", "--out", tmp_path / "z.jsonl")[0] == 0
    code, _, err = call("import", tmp_path / "x.jsonl", "--as", "se-kd", "--teacher", "t", "--out", tmp_path / "d")
    assert code == 2 and err.count("\n") == 1


def test_what_no_format_can_do_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be one of parquet"):
        export(caches["topk"], tmp_path / "x", "excel")
    with pytest.raises(ConfigError, match="local file"):
        export(caches["topk"], "s3://bucket/x", "parquet")
    for form in ("maxtext", "se-kd", "kdcache"):
        assert form not in IMPORTED


def test_distillkit_as_its_own_reader_takes_it(caches: dict[str, Path], tmp_path: Path) -> None:
    """Its `LogprobCompressor.decompress_to_sparse`, derived again for a configuration of exact values."""
    export(caches["topk"], tmp_path / "x", "distillkit")
    config = yaml.safe_load((tmp_path / "x/compression_config.yaml").read_text())
    assert config["exact_k"] == config["k"] == 6 and config["exact_dtype"] == "float32"
    assert not config["delta_encoding"] and not config["residual_bins"] and not config["polynomial_terms"]
    width = int(np.ceil(np.log2(config["d"])))
    records = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "x/data_*.parquet"), cache_dir=str(tmp_path / "hf")
    )["train"]
    wanted = pieces(open_cache(caches["topk"]))
    assert len(records) == len(wanted)
    for record, (tokens, targets, slots) in zip(records, wanted, strict=True):
        assert record["input_ids"] == tokens.tolist() and len(record["compressed_logprobs"]) == len(tokens) - 1
        for entries_of, slot in zip(entries(targets), slots, strict=True):
            values = np.frombuffer(bytes(record["compressed_logprobs"][slot]), "<f4")
            text = "".join(format(byte, "08b") for byte in record["bytepacked_indices"][slot])
            ids = [int(text[i * width : (i + 1) * width], 2) for i in range(config["k"])]
            assert (np.diff(values) <= 0).all()
            close([dict(zip(ids, values.tolist(), strict=True))], [entries_of])
        for slot in set(range(len(tokens) - 1)) - set(slots.tolist()):  # no target: adds nothing to a KL
            assert np.exp(np.frombuffer(bytes(record["compressed_logprobs"][slot]), "<f4")).sum() == 0


def test_megatron_as_its_own_reader_takes_it(caches: dict[str, Path], tmp_path: Path) -> None:
    """Its `iter_logprobs_tar_entries` and `decode_logprobs_payload`, derived again."""
    export(caches["topk"], tmp_path / "x", "megatron")
    cache, found = open_cache(caches["topk"]), []
    for path in sorted((tmp_path / "x").glob("dp0__*.tar")):
        with tarfile.open(path, "r|*") as archive:
            for number, member in enumerate(archive):
                data = archive.extractfile(member)
                assert data is not None
                if number == 0:
                    saver = json.loads(data.read())["saver"]
                    assert member.name == "_meta.json" and saver["format_version"] == 2
                    continue
                with pa.input_stream(pa.BufferReader(data.read()), compression="zstd") as stream:
                    content = torch.load(io.BytesIO(stream.read()), weights_only=True)
                ids = content["bit_17"].long() << 16 | content["indices_low"].long()
                found += list(zip(content["values"].unbind(1), ids.unbind(1), strict=True))
    assert len(found) % saver["gbs_save"] == 0 and len(found) >= len(cache)
    for (values, ids), row in zip(found, cache, strict=False):
        has = row.targets.count > 0
        assert values.shape == (SEQ_LEN, 6) and (values[~has] <= -1e3).all() and (ids[~has] == 131071).all()
        close(
            [dict(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(ids[has], values[has], strict=True)],
            entries(row.targets[has]),
        )
