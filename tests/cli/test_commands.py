"""The command line as a person or a script meets it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
from kdcache_cli.frame import Output, in_options
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache.errors import ConfigError
from kdcache.student.config import TrainConfig, TrainOptions
from kdcache.student.from_teacher.config import MakeStudentOptions
from kdcache.teacher.config import DumpOptions
from tests.processes import fresh_kdcache as kdcache

COMMANDS = (
    "dump-teacher", "make-student", "train-student", "inspect-shard", "explore", "evaluate", "verify", "demo", "export",
    "import", "audit", "doctor",
)  # fmt: skip


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = invoke(command, "--help")
    assert code == 0
    for flag in ("--config", "--json", "--quiet", "--plugin"):
        assert flag in out


@pytest.mark.parametrize(
    ("command", "config"),
    [("dump-teacher", DumpOptions), ("train-student", TrainOptions), ("make-student", MakeStudentOptions)],
)
def test_options_are_the_configuration(command: str, config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = invoke(command, "--help")
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in out
        assert "[default" not in field.metadata["help"]  # rich would take it for markup and drop it


@pytest.mark.slow
def test_the_whole_loop_in_real_processes(teacher: Path, corpus: Path, student_config: Path, tmp_path: Path) -> None:
    cache, student = tmp_path / "c", tmp_path / "s"
    dumped = kdcache(
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", cache, "--seq-len", 64, "--k", 8,
        "--temperatures", "1,2", "--json",
    )  # fmt: skip
    assert dumped.returncode == 0 and dumped.stderr == "", dumped.stderr
    summary = json.loads(dumped.stdout)
    assert summary["complete"] is True and summary["cache"] == str(cache)
    assert set(summary) >= {
        "cache", "complete", "shards", "rows", "positions", "entries", "bytes", "bytes_per_position", "seconds",
        "positions_per_second",
    }  # fmt: skip
    trained = kdcache(
        "train-student", "--cache", cache, "--student", student_config, "--out", student, "--steps", 5, "--json"
    )
    assert trained.returncode == 0 and trained.stderr == "", trained.stderr
    figures = json.loads(trained.stdout)
    assert set(figures) >= {"out", "steps", "positions", "heldout", "seconds", "positions_per_second"}
    assert set(figures["heldout"]["after"]) >= {"nll", "teacher_nll", "delta_nll", "kl", "top1_agreement"}
    measured = kdcache("evaluate", "--student", student, "--cache", cache, "--json")
    assert set(json.loads(measured.stdout)) >= {"nll", "teacher_nll", "delta_nll", "kl", "top1_agreement", "positions"}
    assert json.loads(kdcache("verify", cache, "--json").stdout)["ok"] is True


def test_inspect_shows_a_cache_a_row_and_a_position(cache: Path) -> None:
    from kdcache import open_cache

    code, out, _ = invoke("inspect-shard", cache, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["rows"] == len(open_cache(cache))
    assert summary["mean_kept_mass"] + summary["mean_tail"] == pytest.approx(1)
    shard = json.loads(invoke("inspect-shard", cache, "--shard", 1, "--json")[1])
    assert shard["rows"] == open_cache(cache).commits[1].rows

    index = open_cache(cache).index(1, 2)
    row = open_cache(cache)[index]
    slot = int((row.labels != -100).nonzero()[5])
    code, out, _ = invoke("inspect-shard", cache, "--shard", 1, "--row", 2, "--position", slot, "--top", 4, "--json")
    at = json.loads(out)
    assert (at["shard"], at["row"], at["position"]) == (1, 2, slot)
    assert set(at) >= {"context", "token", "label", "entropy", "tail", "entries"}
    assert at["label"]["id"] == int(row.tokens[slot + 1])
    assert at["label"]["logprob"] == pytest.approx(float(row.targets.label_logprob[slot]))
    likely = row.targets.weights[slot].argsort(descending=True, stable=True)[:4]
    assert [e["id"] for e in at["entries"]] == row.targets.ids[slot, likely].tolist()
    assert set(at["entries"][0]) == {"id", "text", "logprob", "probability", "weight"}
    again = json.loads(invoke("inspect-shard", cache, "--row", index, "--position", slot, "--top", 4, "--json")[1])
    assert again == at

    warm = json.loads(
        invoke("inspect-shard", cache, "--row", index, "--position", slot, "--temperature", 2, "--json")[1]
    )
    assert sum(e["probability"] for e in warm["entries"]) + warm["tail"] == pytest.approx(1, abs=1e-5)
    for arguments in ([], ["--shard", 1], ["--row", index], ["--row", index, "--position", slot]):
        code, out, _ = invoke("inspect-shard", cache, *arguments)
        assert code == 0 and out.strip()
    text = json.loads(invoke("inspect-shard", cache, "--row", index, "--json")[1])
    first = [t["text"] for t in text["tokens"] if t["piece"] == 0]
    assert "".join(first).startswith("<s>The ")
    end = int((row.segments == 0).nonzero()[-1])
    last = json.loads(invoke("inspect-shard", cache, "--row", index, "--position", end, "--json")[1])
    assert last["label"] is None and last["entries"] == []


DUMP = ("dump-teacher", "--teacher", "{tmp}", "--corpus", "x.txt", "--out", "{tmp}/o")

BAD = [
    (["inspect-shard", "{cache}", "--row", "9999"], "has rows 0 to"),
    (["inspect-shard", "{cache}", "--shard", "99"], "no committed shard 99"),
    (["inspect-shard", "{cache}", "--shard", "1", "--row", "999"], "shard 1 has rows 0 to"),
    (["inspect-shard", "{cache}", "--row", "0", "--position", "64"], "has positions 0 to"),
    (["inspect-shard", "{cache}", "--position", "1"], "--position needs --row"),
    (["inspect-shard", "{cache}", "--row", "0", "--position", "1", "--temperature", "3"], "temperature 3 is not exact"),
    (["inspect-shard", "{cache}", "--row", "0", "--position", "1", "--top", "0"], "--top is 0"),
    (["inspect-shard", "{tmp}"], "holds no cache"),
    ([*DUMP, "--k", "0"], "--k is 0, but must be at least 1"),
    ([*DUMP, "--select", "best"], "--select best is not one of topk"),
    ([*DUMP, "--select", "topp"], "--top-p is not given, but kind topp needs it"),
    ([*DUMP, "--select", "ipps", "--min-k", "3", "--k", "2"], "--min-k is 3, above k, which is 2"),
    ([*DUMP, "--adaptive"], "--adaptive is True, but kind topk has no such setting"),
    ([*DUMP, "--set", "k"], "--set is 'k', but must be NAME=VALUE"),
    ([*DUMP, "--set", "colour=red"], "colour is red, but kind topk has no such setting"),
    ([*DUMP, "--set", "k=three"], "--k is three, but must be a whole number"),
    ([*DUMP, "--k", "3", "--set", "k=3"], "--set names k, which is given already"),
    ([*DUMP, "--positions", "few"], "--positions 'few' is neither all nor entropy>X"),
    (["verify", "{tmp}"], "holds no cache"),
    (["evaluate", "--student", "{tmp}", "--cache", "{cache}"], "has no config.json"),
    (["dump-teacher", "--teacher", "{tmp}", "--corpus", "x.txt", "--out", "{tmp}/o"], "has no config.json"),
    (["train-student", "--cache", "{tmp}", "--student", "s", "--out", "{tmp}/o"], "holds no cache"),
    (["demo", "--out", "{tmp}"], "is not empty"),
    (["demo", "--out", "{tmp}/new", "--budget", "0"], "--budget is 0"),
]


def test_what_became_of_documents_is_said_in_words(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache_cli.tables import of_documents

    from kdcache.store.commit import commit_name
    from kdcache.store.local import LocalStorage
    from kdcache.store.publish import finish
    from kdcache.store.seal import unseal
    from kdcache.store.sealed_json import seal

    monkeypatch.setenv("COLUMNS", "200")
    whole = json.loads(invoke("inspect-shard", cache, "--json")[1])
    assert of_documents(whole) == [f"{whole['cut']} documents cut into pieces, longer than a row"]
    copy = tmp_path / "c"
    shutil.copytree(cache, copy)
    unseal(LocalStorage(copy))
    path = copy / commit_name(1)
    fields, reason = json.loads(path.read_text()), "refused by the template: [/INST] has no end"
    others = whole["cut"] - fields["cut"]
    fields |= {"dropped": 9, "dropped_by": {"refused by the template": 7, "overlong": 2}, "bad": 7, "cut": 1}
    fields |= {
        "truncated": 2,
        "bad_records": [{"document": fields_first + 36, "reason": reason} for fields_first in range(7)],
    }
    path.write_bytes(seal(fields))
    for other in range(4):
        at = copy / commit_name(other)
        at.write_bytes(seal({**json.loads(at.read_text()), "eos_labels": 0}))
    assert finish(LocalStorage(copy))["complete"]
    _, out, _ = invoke("inspect-shard", copy)
    said = [line.strip() for line in out.splitlines()]
    begin = said.index("9 documents left out: 7 refused by the template, 2 overlong")
    assert said[begin + 1 : begin + 10] == [
        *(f"document {n}: {reason}" for n in range(36, 41)),
        "and 2 documents more that cannot be used (bad_records.jsonl in the cache lists them)",
        f"{others + 1} documents cut into pieces, longer than a row",
        "2 documents truncated to the first row",
        "no end of a document is taught: no label is the end of sequence; see --eos",
    ]


def test_a_setting_that_has_no_option_of_its_own(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    code, _, err = invoke(
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", tmp_path / "c", "--limit-docs", 9,
        "--seq-len", 64,
        "--select", "topp", "--set", "top-p=0.8", "--set", "k=5", "--set", "force_label=true", "--json",
    )  # fmt: skip
    assert code == 0, err
    manifest = json.loads((tmp_path / "c/kdcache.json").read_text())
    assert manifest["selection"] == {"kind": "topp", "k": 5, "top_p": 0.8, "force_label": True}


def test_messages_of_layers_that_name_fields() -> None:
    names = ("teacher", "k", "min_k", "seq_len", "positions", "steps", "epochs", "tile_head")
    for message, worded in (
        ("k is 0, but must be at least 1", "--k is 0, but must be at least 1"),
        ("a row of seq_len 3 slots", "a row of --seq-len 3 slots"),
        ("positions entropy>9 leaves none", "--positions entropy>9 leaves none"),
        ("steps and epochs exclude each other", "--steps and --epochs exclude each other"),
        ("use tile_head=False, or steps=True", "use --no-tile-head, or --steps"),
        ('it needs seq_len="long", min_k=3', "it needs --seq-len long, --min-k=3"),
        ('a path/seq_len="long"', 'a path/seq_len="long"'),
        ("the teacher is not here", "the teacher is not here"),
        ("/data/seq_len/x and min_k.txt are gone", "/data/seq_len/x and min_k.txt are gone"),
    ):
        assert in_options(message, names) == worded


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda x: x if isinstance(x, str) else x[0])
def test_bad_input_is_one_sentence_and_exit_2(cache: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "something").write_text("")
    code, out, err = invoke(*(a.format(cache=cache, tmp=tmp_path) for a in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and words in err and err.count("\n") == 1, err


def test_a_damaged_cache_fails_verification_with_exit_1(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c/shards/00000.arrow").unlink()
    code, out, _ = invoke("verify", tmp_path / "c", "--json")
    report = json.loads(out)
    assert code == 1 and report["ok"] is False
    assert report["problems"] == [{"shard": 0, "object": "shards/00000.arrow", "what": "it is missing"}]
    assert "it is missing" in invoke("verify", tmp_path / "c")[1]


def test_a_config_file_gives_options_and_flags_win(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "dump.toml"
    config.write_text(
        f'teacher = "{teacher}"\ncorpus = "{corpus}"\nout = "{tmp_path / "c"}"\nseq-len = 64\nk = 4\nlimit_docs = 9\n'
    )
    code, out, err = invoke("dump-teacher", "--config", config, "--k", 3, "--json")
    assert code == 0, err
    assert json.loads(out)["documents"] == 9
    manifest = json.loads((tmp_path / "c/kdcache.json").read_text())
    assert manifest["selection"]["k"] == 3 and manifest["seq_len"] == 64
    config.write_text("sequence = 3\n")
    code, _, err = invoke("dump-teacher", "--config", config)
    assert code == 2 and "sets sequence, which dump-teacher does not have" in " ".join(err.replace("│", " ").split())
    config.write_text("= 3\n")
    assert invoke("dump-teacher", "--config", config)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dump-teacher", "--k", "abc"], "--k"),
        (["dump-teacher"], "--teacher"),
        (["inspect-shard", "--depth", "3"], "--depth"),
        (["verify", "c", "--config", "/nowhere.toml"], "cannot be read as TOML"),
        (["fly"], "fly"),
    ],
    ids=str,
)
def test_usage_errors_are_one_sentence_too(arguments: list[str], words: str) -> None:
    done = kdcache(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_quiet_says_nothing(cache: Path) -> None:
    assert invoke("verify", cache, "--quiet") == (0, "", "")


def test_version() -> None:
    import kdcache as package

    assert invoke("--version")[1].strip() == package.__version__


@pytest.mark.parametrize(
    ("line", "expected"),
    [('cache = ["a", "b:2"]', ("a", "b:2")), ('cache = "ab"', ("ab",)), ('rows = ["0:5", "7:"]\ncache = "a"', ("a",))],
)
def test_an_option_that_may_be_given_again_is_a_list_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, expected: tuple[str, ...]
) -> None:
    from kdcache.student import train as module

    seen: list[TrainConfig] = []

    def train(config: TrainConfig, *_: object) -> None:
        seen.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr(module, "train", train)
    (tmp_path / "train.toml").write_text(line)
    usual = ("train-student", "--student", "s", "--out", tmp_path / "o")
    assert invoke(*usual, "--config", tmp_path / "train.toml")[0] == 2
    assert invoke(*usual, "--config", tmp_path / "train.toml", "--cache", "x", "--cache", "y:3")[0] == 2
    assert [config.cache for config in seen] == [expected, ("x", "y:3")]
    assert seen[0].rows == ("0:5,7:" if "rows" in line else None)
    assert invoke(*usual)[0] == 2 and len(seen) == 2


def test_advice_is_on_stderr_with_options_by_name_or_in_the_object(tmp_path: Path, teacher: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One.\n\nTwo.\n\nThree.\n")
    arguments = ("check-data", "--teacher", teacher, "--corpus", short, "--seq-len", 64)
    code, _, err = invoke(*arguments)
    assert code == 0 and err.startswith("note: half of the documents have at most ") and "(--split-text)" in err
    _, out, err = invoke(*arguments, "--json")
    assert err == "" and "(split_text)" in json.loads(out)["advice"][0]
    assert invoke(*arguments, "--quiet")[1:] == ("", "")


def test_make_student_shows_what_it_kept(teacher: Path, cache: Path, tmp_path: Path) -> None:
    usual = ("make-student", "--teacher", teacher, "--cache", cache, "--heldout", 0.1, "--device", "cpu")
    code, out, err = invoke(*usual, "--layers", "best-1", "--importance-rows", 2, "--out", tmp_path / "s")
    assert code == 0 and "note" not in err and "KL without each layer" in out and "kl (lower-bound)" in out
    code, out, err = invoke(*usual, "--layers", "1", "--out", tmp_path / "j", "--json")
    found = json.loads(out)
    assert code == 0 and "note" not in err and found["layers"] == [1] and found["heldout"]["kl"] > 0
    assert set(found) == {
        "out", "teacher", "teacher_sha256", "class", "layers", "sizes", "parameters", "layer_kl", "heldout", "advice",
    }  # fmt: skip
    code, out, err = invoke(*usual, "--hidden", 30, "--out", tmp_path / "x")
    assert (code, out) == (2, "") and err == "error: --hidden is 30, which 4 heads do not divide\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("quiet", [False, True])
def test_what_the_library_warns_of_is_a_note(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    ours = str(importlib.import_module("kdcache.errors").__file__)
    with (
        pytest.warns(UserWarning, match="^old$") as caught,
        Output(json=True, quiet=quiet, names=["soft_weight"]).warnings_as_notes(),
    ):
        warnings.warn_explicit("the tail is blind; raise soft_weight", UserWarning, ours, 1)
        warnings.warn_explicit("old", UserWarning, "other.py", 1)
    assert len(caught) == 1
    assert capsys.readouterr().err == ("" if quiet else "note: the tail is blind; raise --soft-weight\n")


@pytest.mark.slow
def test_a_training_says_what_usually_goes_wrong(cache: Path, student_config: Path, tmp_path: Path) -> None:
    usual = ("train-student", "--cache", cache, "--student", student_config, "--steps", 1, "--heldout", 0.1)
    code, _, err = invoke(*usual, "--device", "cpu", "--out", tmp_path / "s")
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert code == 0 and len(notes) == 2
    assert "random weights" in notes[0] and "(--init-from)" in notes[0] and "--soft-weight 0.9" in notes[1]
