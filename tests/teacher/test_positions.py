"""`dump-teacher --positions`: targets where a dense float64 entropy says so, and nothing stored elsewhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache import SparseTargets, open_cache, verify_cache
from kdcache.convert import convert
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.report.faithfulness import check_faithfulness
from kdcache.report.inspect import inspect_position, inspect_row, inspect_summary
from kdcache.teacher.dump import dump
from tests.making import dump_options
from tests.processes import kdcache


def files(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def content(cache: Path) -> str:
    report = verify_cache(cache)
    assert report.ok and report.content_sha256, report.problems
    return report.content_sha256


def equal(one: SparseTargets, two: SparseTargets) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture(scope="module")
def whole(sure_teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher's cache with a target at every label."""
    out = tmp_path_factory.mktemp("whole") / "c"
    dump(dump_options(sure_teacher, corpus, out))
    return out


def test_a_dense_entropy_decides(chosen_cache: Path, sure_teacher: Path) -> None:
    """Each piece alone, in float64; positions nearer to the threshold than 1e-5 are left out of the judgement."""
    model = AutoModelForCausalLM.from_pretrained(sure_teacher, dtype=torch.float64).eval()
    seen = {True: 0, False: 0}
    for row in open_cache(chosen_cache):
        for piece in range(len(row.documents)):
            slots = (row.segments == piece).nonzero()[:, 0]
            with torch.no_grad():
                logp = model(input_ids=row.tokens[slots][None]).logits[0, :, :320].log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            for slot, exact in zip(slots.tolist(), entropy.tolist(), strict=True):
                has = bool(row.targets.count[slot])
                if row.labels[slot] == -100:
                    assert not has
                elif abs(exact - 2) > 1e-5:
                    assert has == (exact > 2)
                    seen[has] += 1
    assert min(seen.values()) > 500


def test_what_is_chosen_is_what_a_whole_cache_has_there(chosen_cache: Path, whole: Path) -> None:
    some, every = open_cache(chosen_cache), open_cache(whole)
    for index in range(len(every)):
        (packed, targets), (other, rest) = some.read_packed(index), every.read_packed(index)
        assert packed.tokens.tolist() == other.tokens.tolist() and len(targets.count) == len(rest.count)
        has = rest.entropy > 2
        assert torch.equal(targets.count > 0, has)
        assert equal(targets[has], rest[has])
        assert not targets.entropy[~has].any() and not targets.weights[~has].any()
    counts = [commit.positions for commit in some.commits.values()]
    assert sum(counts) == sum(int((row.targets.count > 0).sum()) for row in some)
    assert [c.labels for c in some.commits.values()] == [c.positions for c in every.commits.values()]


def test_bytes_follow_the_chosen(chosen_cache: Path, whole: Path) -> None:
    sizes = [sum(p.stat().st_size for p in (c / "shards").iterdir()) for c in (chosen_cache, whole)]
    assert sizes[0] < 0.4 * sizes[1]


def test_quantiles_are_over_all_labels(chosen_cache: Path, whole: Path, sure_teacher: Path, corpus: Path) -> None:
    found = dump(dump_options(sure_teacher, corpus, chosen_cache, positions="entropy>2.0"))  # nothing is left to do
    entropy = torch.cat([row.targets.entropy[row.labels != -100] for row in open_cache(whole)])
    assert found["labels"] == len(entropy) and found["positions"] == int((entropy > 2).sum())
    assert list(found["entropy_quantiles"]) == ["0.1", "0.25", "0.5", "0.75", "0.9", "0.99"]
    for level, value in found["entropy_quantiles"].items():
        assert value == pytest.approx(float(entropy.double().quantile(float(level))), abs=0.1)
    for cache in (chosen_cache, whole):
        assert inspect_summary(str(cache))["entropy_quantiles"] == found["entropy_quantiles"]


def test_the_same_by_any_workers_and_gone_on_with(
    chosen_cache: Path, sure_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    for worker in ("1/3", "0/1"):
        dump(dump_options(sure_teacher, corpus, tmp_path / "c", positions="entropy>2", worker=worker))
    assert files(tmp_path / "c") == files(chosen_cache)


@pytest.mark.slow
def test_both_stores_and_any_precision(chosen_cache: Path, sure_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    dump(dump_options(sure_teacher, corpus, tmp_path / "z", positions="entropy>2", store="zarr"))
    assert content(tmp_path / "z") == content(chosen_cache)
    dump(dump_options(sure_teacher, corpus, tmp_path / "6", positions="entropy>2", precision="6"))
    convert(chosen_cache, tmp_path / "cut", precision="6")
    compact = open_cache(tmp_path / "6")
    assert verify_cache(tmp_path / "6").ok
    assert content(tmp_path / "cut") != content(chosen_cache)
    for one, two, plain in zip(compact, open_cache(tmp_path / "cut"), open_cache(chosen_cache), strict=True):
        assert torch.equal(one.targets.count, plain.targets.count) and torch.equal(two.targets.count, one.targets.count)


def test_converting_keeps_the_choice(chosen_cache: Path, sure_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    convert(chosen_cache, tmp_path / "z", store="zarr")
    found = convert(chosen_cache, tmp_path / "3", k=3)
    assert content(tmp_path / "z") == content(chosen_cache)
    assert found["entries"] == 3 * found["positions"] and verify_cache(tmp_path / "3").ok
    dump(dump_options(sure_teacher, corpus, tmp_path / "direct", positions="entropy>2", k=3))
    for cut, direct in zip(open_cache(tmp_path / "3"), open_cache(tmp_path / "direct"), strict=True):
        assert torch.equal(cut.targets.ids, direct.targets.ids) and torch.equal(cut.targets.count, direct.targets.count)
    histograms = [[c.entropy_histogram for c in open_cache(p).commits.values()] for p in (tmp_path / "3", chosen_cache)]
    assert histograms[0] == histograms[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("select", "fewer"),
    [({"select": "ipps", "k": 6}, 4), ({"select": "sample", "draws": 20}, 10)],
    ids=str,
)
def test_draws_are_keyed_by_the_slot_and_not_by_what_is_chosen(
    sure_teacher: Path, corpus: Path, tmp_path: Path, select: dict[str, Any], fewer: int
) -> None:
    """Narrowing too: what remains of a position does not depend on which others there are."""
    for name, positions in (("some", "entropy>2"), ("every", "all")):
        dump(dump_options(sure_teacher, corpus, tmp_path / name, **select, positions=positions))
        convert(tmp_path / name, tmp_path / f"{name} less", k=fewer)
    for suffix in ("", " less"):
        for some, every in zip(
            open_cache(tmp_path / f"some{suffix}"), open_cache(tmp_path / f"every{suffix}"), strict=True
        ):
            has = some.targets.count > 0
            assert torch.equal(some.targets.ids[has], every.targets.ids[has])
            assert torch.equal(some.targets.weights[has], every.targets.weights[has])


def test_adaptive_means_k_over_the_chosen(sure_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    options = {"select": "ipps", "k": 6, "adaptive": True}
    taus = {}
    for positions in ("all", "entropy>2"):
        found = dump(dump_options(sure_teacher, corpus, tmp_path / positions, positions=positions, **options))
        assert found["entries"] / found["positions"] == pytest.approx(6, abs=0.3)
        taus[positions] = open_cache(tmp_path / positions).manifest.selection["tau"]
    assert taus["entropy>2"] > 1.2 * taus["all"]  # unsure positions alone need a higher one for as few entries
    with pytest.raises(ConfigError, match="entropy>9 leaves none of the first 5544 positions to find tau by"):
        dump(dump_options(sure_teacher, corpus, tmp_path / "none", positions="entropy>9", **options))
    assert not (tmp_path / "none").exists()


def test_another_choice_is_another_cache(chosen_cache: Path, sure_teacher: Path, corpus: Path) -> None:
    for positions in ("all", "entropy>1"):
        with pytest.raises(CacheMismatchError, match=rf"positions \(cache: entropy>2, asked: {positions}\)"):
            dump(dump_options(sure_teacher, corpus, chosen_cache, positions=positions))


@pytest.mark.slow
@pytest.mark.parametrize(
    "select",
    [{"precision": "6"}, {"precision": "float32"}, {"select": "ipps", "precision": "6"},
     {"select": "sample", "draws": 20, "proposal_power": 0.8, "precision": "6"}],
    ids=str,
)  # fmt: skip
def test_rows_and_caches_in_which_nothing_is_chosen(
    sure_teacher: Path, corpus: Path, tmp_path: Path, select: dict[str, Any]
) -> None:
    for positions, least in (("entropy>2.6", 1), ("entropy>9", 0)):
        out = tmp_path / positions
        found = dump(dump_options(sure_teacher, corpus, out, positions=positions, **select))
        assert found["complete"] and found["labels"] == 5544 and verify_cache(out).ok
        counts = [int((row.targets.count > 0).sum()) for row in open_cache(out)]
        assert 0 in counts and max(counts) >= least and sum(counts) == found["positions"]
        assert inspect_summary(str(out))["positions"] == found["positions"]


def test_inspect_says_what_is_not_there_and_why(chosen_cache: Path) -> None:
    summary = inspect_summary(str(chosen_cache))
    assert summary["position_choice"] == "entropy>2" and 0 < summary["positions"] < summary["labels"]
    assert summary["mean_entropy"] > 2 and summary["mean_kept_mass"] + summary["mean_tail"] == pytest.approx(1)
    row = open_cache(chosen_cache)[0]
    told, untold = (row.targets.count > 0), (row.labels != -100) & (row.targets.count == 0)
    slot = int(untold.nonzero()[3])
    at = inspect_position(str(chosen_cache), 0, slot)
    assert at["no_target"] == "the teacher's entropy here is not above 2 nats (positions entropy>2)"
    assert at["label"]["id"] == int(row.tokens[slot + 1]) and at["label"]["logprob"] is None
    assert at["entries"] == [] and at["entropy"] is None
    assert inspect_position(str(chosen_cache), 0, int(told.nonzero()[0]))["no_target"] is None
    logprobs = [token["logprob"] for token in inspect_row(str(chosen_cache), 0)["tokens"]]
    assert [logprob is not None for logprob in logprobs[1:]] == told[: len(logprobs) - 1].tolist()
    shown = kdcache("inspect-shard", chosen_cache, "--row", "0", "--position", slot)
    assert shown.returncode == 0 and "no target here: the teacher's entropy here is not above 2 nats" in shown.stdout
    overview = kdcache("inspect-shard", chosen_cache)
    assert f"{summary['positions']:,} positions of {summary['labels']:,} labels" in overview.stdout


def test_the_teacher_agrees_with_its_choice(chosen_cache: Path, sure_teacher: Path, tmp_path: Path) -> None:
    found = check_faithfulness(chosen_cache, str(sure_teacher), rows=6)
    assert found["agrees"] and found["positions"] > 10
    assert found["stored"]["choice"]["mean"] < 0.01 and found["stored"]["total_variation"]["worst"] < 1e-4


def test_the_teacher_disagrees_with_another_choice(chosen_cache: Path, sure_teacher: Path, tmp_path: Path) -> None:
    """The same rows under a manifest that claims a lower threshold."""
    from tests.attacks.forge import ArrowForgery

    copy = tmp_path / "c"
    copy.mkdir()
    for name, data in files(chosen_cache).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    ArrowForgery(copy).change_manifest(positions="entropy>1")
    assert verify_cache(copy).ok
    found = check_faithfulness(copy, str(sure_teacher), rows=6)
    assert not found["agrees"] and found["stored"]["choice"]["mean"] > 0.2


def test_the_command(sure_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ["--teacher", sure_teacher, "--corpus", corpus, "--seq-len", "64", "--k", "8", "--limit-docs", "20"]
    done = kdcache("dump-teacher", *arguments, "--out", tmp_path / "c", "--positions", "entropy>1.50")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "c/kdcache.json").read_text())
    commits = [json.loads(p.read_text()) for p in (tmp_path / "c/commits").iterdir()]
    positions, labels = (sum(c[name] for c in commits) for name in ("positions", "labels"))
    assert manifest["positions"] == "entropy>1.5" and 0 < positions < labels
    assert f"{positions:,} positions of {labels:,} labels ({positions / labels:.1%})" in " ".join(done.stdout.split())
    assert "teacher in nats: 10% below " in done.stdout
    for bad in ("entropy>", "entropy>-1", "entropy>nan", "entropy<1"):
        done = kdcache("dump-teacher", *arguments, "--out", tmp_path / "d", "--positions", bad)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: --positions {bad!r} is neither all nor entropy>X")
