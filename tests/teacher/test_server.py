"""A served teacher: its top k and nothing else, asked again where it is busy, refused where it is not what it says."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import open_cache
from kdcache.errors import ConfigError, EngineError, KdcacheError, ModelError
from kdcache.report.faithfulness import check_faithfulness
from kdcache.teacher.dump import dump
from kdcache.teacher.engines import completions
from kdcache.teacher.engines.server import ServerEngine
from tests.making import dump_options, make_tokenizer
from tests.processes import kdcache
from tests.served import LOGPROBS, Served, serving
from tests.teacher.test_dump import files

QUICK = ("retries=1", "timeout=20")


@pytest.fixture(scope="module")
def running(teacher: Path) -> Iterator[Served]:
    with serving(teacher) as state:
        yield state


@pytest.fixture
def served(running: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The server as it is when nothing was changed."""
    running.models, running.max_logprobs, running.busy_every, running.dies_after = ["teacher"], 20, 0, None
    running.changes, running.prompts, running.requests, running.most_at_once = {}, 0, 0, 0
    monkeypatch.setattr(completions, "_LONGEST_PAUSE", 0.05)
    return running


def options(served: Served, corpus: Path, out: Path, **changes: Any) -> Any:
    given = {"engine": "server", "device": "auto", "temperatures": "1", "engine_set": QUICK, **changes}
    return dump_options(served.address, corpus, out, **given)


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.startswith("shards")}


def test_what_it_knows_is_what_the_cache_holds(served: Served, corpus: Path, tmp_path: Path) -> None:
    """Every third request is answered with 503; pieces of all lengths; the tail is one minus the kept mass."""
    served.busy_every = 3
    settings = ("concurrency=3", "retries=10")
    summary = dump(options(served, corpus, tmp_path / "c", limit_docs=40, engine_set=settings))
    assert summary["complete"] and served.most_at_once <= 3 and served.requests > served.prompts > 40
    cache = open_cache(tmp_path / "c")
    assert cache.known.label_logprob and not cache.known.entropy and cache.known.tail_sum == "remainder"
    assert cache.known.partitions == cache.known.tails == (1.0,)
    compute = cache.commits[0].compute
    assert (compute["engine"], compute["served_model"], compute["tokenizer_compared"]) == ("server", "teacher", True)
    for row in (cache[0], cache[len(cache) - 1]):
        labelled = row.labels != -100
        truth = LOGPROBS[row.tokens[labelled]]
        targets = row.targets[labelled]
        assert torch.equal(targets.ids.sort(-1).values, truth.topk(8).indices.sort(-1).values)
        torch.testing.assert_close(targets.logprobs.double(), truth.gather(-1, targets.ids), rtol=0, atol=1e-6)
        label = truth.gather(-1, row.labels[labelled][:, None])[:, 0]
        torch.testing.assert_close(targets.label_logprob.double(), label, rtol=0, atol=1e-6)
        assert targets.entropy is None and targets.log_tail is not None
        rest = truth.scatter(-1, targets.ids, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(targets.log_tail[:, 0].double(), rest, rtol=0, atol=1e-4)
    served.busy_every = 0
    assert check_faithfulness(tmp_path / "c", served.address, rows=2, engine="server")["agrees"]


@pytest.mark.slow
def test_a_server_that_dies_leaves_whole_shards(served: Served, corpus: Path, tmp_path: Path) -> None:
    served.dies_after = 70
    with pytest.raises(ModelError, match=r"the server http://\S+ does not answer: \w"):
        dump(options(served, corpus, tmp_path / "c"))
    assert 0 < len(list((tmp_path / "c" / "commits").iterdir())) < 4
    served.dies_after = None
    assert dump(options(served, corpus, tmp_path / "c"))["complete"]
    dump(options(served, corpus, tmp_path / "whole"))
    assert shards(tmp_path / "c") == shards(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select": "ipps"}, "selection ipps needs the whole vocabulary, which the engine server does not know"),
        ({"select": "topp", "top_p": 0.9}, "selection topp needs the whole vocabulary"),
        ({"select": "sample", "draws": 9, "k": None}, "selection sample needs the whole vocabulary"),
        ({"select": "full"}, "selection full needs the whole vocabulary"),
        ({"force_label": True}, "selection topk, with force_label, needs the whole vocabulary"),
        ({"temperatures": "1,2"}, "temperature 2 needs the partition at that temperature"),
        ({"positions": "entropy>1"}, "positions entropy>1 needs the teacher's entropy"),
        ({"extra": ("hidden:-1",)}, "extra is hidden:-1, but the engine server offers no extra"),
        ({"dtype": "bfloat16"}, "dtype is not for the engine server"),
        ({"tensor_parallel": 2}, "tensor_parallel is not for the engine server"),
        ({"engine_python": "/usr/bin/python3"}, "engine_python is not for the engine server"),
        ({"engine_set": ("gpus=2",)}, "engine_set names gpus, which is none of concurrency, model, retries, timeout"),
        ({"engine_set": ("concurrency=many",)}, "concurrency is many, but must be a whole number"),
        ({"engine_set": ("concurrency=0",)}, "engine_set concurrency is 0, but must be above 0"),
        ({"engine_set": ("retries",)}, "engine_set is 'retries', but must be NAME=VALUE"),
        ({"seq_len": 129}, "seq_len is 129, above the 128 positions of the teacher http"),
        ({"tokenizer": "/nowhere/at all"}, "the tokenizer folder /nowhere/at all does not exist"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_it_does_not_know_is_refused_before_a_prompt_is_sent(
    served: Served, corpus: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError if "tokenizer" not in changes else ModelError, match=words):
        dump(options(served, corpus, tmp_path / "c", **changes))
    assert served.prompts == 0 and not (tmp_path / "c").exists()


def of_choice(change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """A change of an answer's log-probabilities."""

    def changed(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["prompt_logprobs"] = change(answer["choices"][0]["prompt_logprobs"])
        return answer

    return {"answer": changed}


def without_one(places: list[Any]) -> list[Any]:
    return [None] + [dict(list(place.items())[1:]) for place in places[1:]]


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"answer": lambda a: {**a, "model": "other"}}, "an answer of the model other, where teacher was"),
    "rounded": ({"numbers": lambda v: round(v, 4)}, "rounds log-probabilities to 4 decimals"),
    "half": ({"numbers": lambda v: float(torch.tensor(v).bfloat16())}, "rounds log-probabilities to 16 bits"),
    "truncated": (of_choice(lambda p: p[-20:]), "log-probabilities of 20 tokens for a prompt of 64: it truncates"),
    "none": (of_choice(lambda _: None), "no prompt_logprobs, so it cannot be a teacher"),
    "shifted": (of_choice(lambda p: [*p[1:], p[1]]), "no log-probability of token 1 of a prompt"),
    "fewer": (of_choice(without_one), "log-probabilit"),
    "logits": ({"numbers": lambda v: v + 9}, "a log-probability of an entry is not finite, or is above 0"),
    "too much": ({"numbers": lambda v: v / 9}, "the entries of a position have a mass of"),
    "no numbers": ({"numbers": str}, "no log-probability of token 1 of a prompt"),
    "another tokenizer": ({"tokenize": [3, 4, 5]}, "has another tokenizer than .*code token 0 is 3, not"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_is_not_what_it_says(served: Served, corpus: Path, tmp_path: Path, lie: str) -> None:
    served.changes, words = LIES[lie]
    with pytest.raises(KdcacheError, match=words) as caught:
        dump(options(served, corpus, tmp_path / "c"))
    assert served.address in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "c").glob("commits/*"))


def test_more_entries_than_it_allows(served: Served, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"k is 64, above .* \(it allows 20\); start it with --max-logprobs 64, or"):
        dump(options(served, corpus, tmp_path / "c", k=64))
    assert not (tmp_path / "c").exists()


def test_a_server_whose_tokenizer_cannot_be_asked(served: Served, corpus: Path, tmp_path: Path) -> None:
    served.changes = {"tokenize": None}
    dump(options(served, corpus, tmp_path / "c", limit_docs=20))
    assert open_cache(tmp_path / "c").commits[0].compute["tokenizer_compared"] is False


def test_one_of_several_models(served: Served, corpus: Path, tmp_path: Path) -> None:
    served.models = ["one", "two"]
    with pytest.raises(ConfigError, match=r"has 2 models \(one, two\); name one by engine_set model=NAME"):
        dump(options(served, corpus, tmp_path / "c"))
    with pytest.raises(ConfigError, match="has no model three, but one, two"):
        dump(options(served, corpus, tmp_path / "c", engine_set=("model=three",)))
    dump(options(served, corpus, tmp_path / "c", limit_docs=20, engine_set=("model=two",)))
    assert open_cache(tmp_path / "c").commits[0].compute["served_model"] == "two"
    with pytest.raises(ModelError, match="is not the one that made"):
        check_faithfulness(
            tmp_path / "c", served.address, rows=1, engine="server", engine_options={"engine_set": ("model=one",)}
        )


def test_another_tokenizer_is_named(served: Served, corpus: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other", 300)
    with pytest.raises(ModelError, match=r"has another tokenizer than .*other"):
        dump(options(served, corpus, tmp_path / "c", tokenizer=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/v1", "is not the address of a server"),
        ("http://", "is not the address of a server"),
        ("http://host:port/v1", "is not the address of a server"),
        ("http://me:secret@host/v1", "give the server's key in the variable KDCACHE_SERVER_KEY"),
        ("teacher", "is not the address of a server"),
    ],
)
def test_what_is_no_address(corpus: Path, tmp_path: Path, address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        dump(dump_options(address, corpus, tmp_path / "c", engine="server", device="auto", temperatures="1"))  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_no_server_is_one_sentence_and_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        done = kdcache(
            "dump-teacher", "--teacher", address, "--corpus", corpus, "--out", tmp_path / "c", "--engine", "server",
            "--engine-set", "retries=1",
        )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == f"error: the server {address} does not answer: connection refused"


def test_an_api_that_is_another(served: Served, corpus: Path, tmp_path: Path) -> None:
    served.changes = {"models": b"<html>hello</html>"}
    with pytest.raises(ModelError, match=r"does not list models .* such as http://host:8000/v1"):
        dump(options(served, corpus, tmp_path / "c"))


def test_exact_numbers_are_not_taken_for_rounded_ones() -> None:
    values = np.log(np.random.default_rng(0).dirichlet(np.ones(50), 20))
    completions.require_exact(values, "http://host")
    completions.require_exact(values.astype(np.float32).astype(float), "http://host")
    completions.require_exact(np.zeros((4, 8)), "http://host")  # nothing can be said
    with pytest.raises(EngineError, match="rounds log-probabilities to 2 decimals"):
        completions.require_exact(values.round(2), "http://host")


def test_its_settings_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/engines.md").read_text()
    assert all(f"`{name}`" in text for name in ServerEngine.settings)
