"""Crafted shards, manifests and commits, one for each kind of lie that a header can tell.

Every one is an error of one sentence that names the object; no other exception, no memory, no time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache import open_cache, verify_cache
from tests.attacks import arrow_lies, record_lies, row_lies, zarr_lies
from tests.attacks.forge import ArrowForgery, Attack, ZarrForgery
from tests.attacks.reading import MOST_SECONDS
from tests.processes import PATIENCE

RECORDS = [*record_lies.MANIFESTS, *record_lies.COMMITS, *record_lies.DEVICES]
ROOM = 64 << 20
"""Bytes that all attacks together may add to the peak memory of their reader."""

CASES: dict[str, tuple[str, Attack]] = {
    f"{store}: {attack}": (store, attack)
    for store, attacks in {
        "arrow": [*arrow_lies.NUMBERS, *row_lies.ATTACKS, *RECORDS],
        "arrow frames": arrow_lies.FRAMES,
        "zarr": [*zarr_lies.ATTACKS, *row_lies.ATTACKS, *record_lies.DEVICES],
        "arrow chosen": row_lies.CHOSEN,
        "zarr chosen": row_lies.CHOSEN,
    }.items()
    for attack in attacks
}


@pytest.fixture(scope="module")
def forged(honest: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Every attacked cache, and what its error must name."""
    folder, found = tmp_path_factory.mktemp("forged"), {}
    for number, (name, (store, attack)) in enumerate(CASES.items()):
        copy = Path(shutil.copytree(honest[store], folder / str(number)))
        forgery = (ArrowForgery if store.startswith("arrow") else ZarrForgery)(copy)
        found[name] = copy, attack.forge(forgery)  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def outcomes(honest: dict[str, Path], forged: dict[str, tuple[Path, str]]) -> dict[str, Any]:
    """What a process of its own met in each of them."""
    given = json.dumps([[str(p) for p in honest.values()], {name: str(copy) for name, (copy, _) in forged.items()}])
    done = subprocess.run(
        [sys.executable, "-m", "tests.attacks.reading"], input=given, capture_output=True, text=True, check=False,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_there_is_an_attack_of_every_kind() -> None:
    names = [f"{store}: {attack}" for store, attack in CASES.values()]
    assert len(names) == len(set(names)) == len(CASES) > 200


@pytest.mark.parametrize("name", CASES)
def test_an_attack_is_refused_by_name_at_once(
    name: str, forged: dict[str, tuple[Path, str]], outcomes: dict[str, Any]
) -> None:
    culprit = forged[name][1]
    for act in ("read", "inspect"):
        outcome = outcomes[name][act]
        if act == "inspect" and "tokenizer" in culprit:
            continue  # a summary shows no text
        assert outcome["kind"] == "refused", outcome
        assert culprit in outcome["text"], outcome
        assert "\n" not in outcome["text"] and len(outcome["text"]) < 600
        assert outcome["seconds"] < MOST_SECONDS
    outcome = outcomes[name]["verify"]
    assert outcome["kind"] == "done", outcome
    assert culprit in outcome["text"], outcome
    assert outcome["seconds"] < MOST_SECONDS


def test_all_attacks_together_take_no_memory(outcomes: dict[str, Any]) -> None:
    worst = max(outcomes, key=lambda name: outcomes[name]["grown"])
    assert outcomes[worst]["grown"] < ROOM, (worst, outcomes[worst]["grown"])


@pytest.mark.long
@pytest.mark.parametrize("name", list(CASES)[::9])  # commands call what is tested above with all of them
def test_commands_name_it_too(name: str, forged: dict[str, tuple[Path, str]]) -> None:
    folder, culprit = forged[name]
    code, out, _ = invoke("verify", folder, "--json")
    assert code == 1
    assert any(culprit in f"{p['object']}: {p['what']}" for p in json.loads(out)["problems"])
    if "tokenizer" not in culprit:
        code, out, err = invoke("inspect-shard", folder, "--exact")
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and culprit in err


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


SHARDS = [
    "a body that unfolds to 1 GB", "numbers that claim 2^40 bytes", "a wrong seal", "a token outside the vocabulary",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"arrow: {a}" for a in SHARDS + [str(a) for a in RECORDS][::45]])
def test_training_refuses_it_in_one_sentence(
    name: str, forged: dict[str, tuple[Path, str]], student_config: Path, tmp_path: Path
) -> None:
    folder, culprit = forged[name]
    code, out, err = invoke(
        "train-student", "--cache", folder, "--student", student_config, "--out", tmp_path / "s", "--epochs", 1,
        "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert culprit in err or ("vocabulary of 2^30" in name and "does not cover the cache's 1073741824 ids" in err)


@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_a_shard_that_claims_no_rows_is_found_by_verify(honest: dict[str, Path], tmp_path: Path, store: str) -> None:
    """Reading never comes to such a shard; that something is missing, only the whole cache can tell."""
    copy = Path(shutil.copytree(honest[store], tmp_path / "c"))
    (ArrowForgery if store == "arrow" else ZarrForgery)(copy).change_commit(rows=0)
    assert 0 < len(open_cache(copy)) < len(open_cache(honest[store]))
    assert any(str(problem["object"]).startswith("shards/00000") for problem in verify_cache(copy).problems)


@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_links_to_plain_files_are_followed_and_not_believed(
    honest: dict[str, Path], tmp_path: Path, store: str
) -> None:
    copy, disk = Path(shutil.copytree(honest[store], tmp_path / "c")), tmp_path / "disk"
    objects = [p for p in copy.rglob("*") if p.is_file()]
    for number, path in enumerate(objects):
        disk.mkdir(exist_ok=True)
        path.rename(disk / str(number))
        path.symlink_to(disk / str(number))
    assert verify_cache(copy).ok
    assert [row.tokens.tolist() for row in open_cache(copy)] == [
        row.tokens.tolist() for row in open_cache(honest[store])
    ]
    secret = tmp_path / "secret"
    secret.write_text("a line of somebody's file\n" * 4)
    for path in objects:
        link = path.readlink()
        path.unlink()
        path.symlink_to(secret)
        found = [p for p in verify_cache(copy).problems if p["object"] == path.relative_to(copy).as_posix()]
        assert found and not any("somebody" in str(problem["what"]) for problem in found)
        path.unlink()
        path.symlink_to(link)
