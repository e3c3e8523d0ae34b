"""Generated corpora: what a cache holds of each document is what a slow reference says, or one sentence says why not.

The reference reads no file and no template. A document is drawn as what it says (`made_corpora`), each template comes
with a function that writes the same by hand, a token is a byte, and the rules for rows are written down once more.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache import KdcacheError, open_cache
from kdcache.rows import IGNORE
from kdcache.teacher.check_data import check_data
from kdcache.teacher.config import CheckOptions, DumpConfig
from kdcache.teacher.dump import dump
from tests.corpus.made_corpora import VOCABULARY, Bad, Document, Ids, Made, Pair, Said, Talk, corpora
from tests.making import make_model

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

Texts = list[tuple[str, bool]]
"""Texts one behind the other, and whether each is taught."""


def make_bytes_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids are the special tokens, and four more than each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves; the others follow
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]
    backend = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate([*SPECIAL, *letters])}, merges=[]))
    backend.add_special_tokens(list(SPECIAL))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def tokens_of(texts: Texts) -> list[tuple[int, bool]]:
    """Ids, and whether each is taught."""
    found = []
    for text, taught in texts:
        for piece in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text):
            ids = [SPECIAL.index(piece)] if piece in SPECIAL else [4 + byte for byte in piece.encode()]
            found += [(token, taught) for token in ids]
    return found


# Templates, and what each of them makes of a talk.

CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + (c.function.arguments if "
    "c.function.arguments is string else c.function.arguments | tojson) + '</call>' }}{% endfor %}"
)
THOUGHT = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
TOOLS = "{% if tools %}{{ '<tools>' + (tools | tojson) + '</tools>' }}{% endif %}"
HEAD = "{{ '<|im_start|>' + m.role + '\n' }}"
INVITE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BODY = THOUGHT + "{{ m.content or '' }}" + CALLS
CHATML = TOOLS + "{% for m in messages %}" + HEAD + BODY + "{{ '<|im_end|>\n' }}{% endfor %}" + INVITE
LAST_THOUGHT = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
MARKED = (
    TOOLS + "{% for m in messages %}" + HEAD + "{% if m.role == 'assistant' %}{% generation %}" + BODY
    + "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    + INVITE
)  # fmt: skip
BRACKETS = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)


def taught_of(talk: Talk) -> list[bool]:
    return [
        said.role == "assistant" and said.taught is not False and n >= talk.first for n, said in enumerate(talk.said)
    ]


def full_body(said: Said) -> str:
    calls = "".join(f"<call>{name} {given}</call>" for name, given in said.calls)
    return (f"<think>{said.thought}</think>" if said.thought else "") + said.words + calls


def chatml(talk: Talk, taught: list[bool] | None = None, before_last: str = "") -> Texts:
    found: Texts = [(f"<tools>{talk.tools}</tools>", False)] if talk.tools else []
    for n, (said, teach) in enumerate(zip(talk.said, taught or taught_of(talk), strict=True)):
        before = before_last if n == len(talk.said) - 1 and said.role == "assistant" else ""
        body = before + full_body(said) + "<|im_end|>"
        found += [(f"<|im_start|>{said.role}\n", False), (body, teach), ("\n", False)]
    return found


def last_thought(talk: Talk) -> list[Texts]:
    """A text for each answer, which is its last message."""
    return [
        chatml(Talk(talk.said[: n + 1], talk.tools), [False] * n + [True], before_last="<think></think>")
        if n < len(talk.said) - 1 or talk.said[n].role == "assistant"
        else []
        for n, teach in enumerate(taught_of(talk))
        if teach
    ]


def brackets(talk: Talk, strip: bool = False) -> list[Texts] | set[str]:
    lacks = {"tool call not shown"} if any(said.calls for said in talk.said) else set()
    if any(said.thought and teach for said, teach in zip(talk.said, taught_of(talk), strict=True)):
        lacks.add("reasoning not shown")
    if talk.tools:
        lacks = {"tools not shown"}
    found: Texts = []
    for said, teach in zip(talk.said, taught_of(talk), strict=True):
        words = said.words.strip() if strip else said.words
        found += [(f"[{said.role}] ", False), (words + "</s>", teach)]
    return lacks or [found]


def alternating(talk: Talk) -> list[Texts] | set[str]:
    if any((said.role == "user") != (n % 2 == 0) for n, said in enumerate(talk.said)):
        return {"refused by the chat template"}
    return brackets(talk, strip=True)


TEMPLATES: dict[str, tuple[str, Callable[[Talk], list[Texts] | set[str]]]] = {
    "chatml": (CHATML, lambda talk: [chatml(talk)]),
    "parts": (CHATML.replace("{{ m.content or '' }}", "{% for p in m.content or [] %}{{ p.text }}{% endfor %}"),
              lambda talk: [chatml(talk)]),
    "last thought": (CHATML.replace(HEAD, HEAD + LAST_THOUGHT), last_thought),
    "marked": (MARKED, lambda talk: [chatml(talk)]),
    "brackets": (BRACKETS, brackets),
    "alternating": (ALTERNATE + BRACKETS.replace("m.content", "(m.content | trim)"), alternating),
}  # fmt: skip


# What becomes of a document.


@dataclass(frozen=True)
class Rules:
    """Options of a dump, by their names."""

    template: str
    seq_len: int
    eos: str
    pack: str
    overlong: str
    min_chars: int
    docs_per_shard: int

    @property
    def options(self) -> dict[str, Any]:
        """Those that an option of its own says."""
        return {name: value for name, value in vars(self).items() if name not in ("template", "docs_per_shard")}


RULES = st.builds(
    Rules, template=st.sampled_from(list(TEMPLATES)), seq_len=st.sampled_from([600, 600, 24, 90, 600]),
    eos=st.sampled_from(["auto", "always", "never"]), pack=st.sampled_from(["best-fit", "none"]),
    overlong=st.sampled_from(["auto", "auto", "cut", "truncate", "drop"]), min_chars=st.sampled_from([0, 0, 4]),
    docs_per_shard=st.integers(1, 5),
)  # fmt: skip


def closed(tokens: list[tuple[int, bool]], eos: str) -> list[tuple[int, bool]]:
    """Ids with one BOS, and with one EOS where the rule says so."""
    begun = tokens if tokens and tokens[0][0] == 0 else [(0, False), *tokens]
    ends = eos != "always" or (tokens and tokens[-1][0] == 1)
    return begun if ends else [*begun, (1, True)]


def sequences_of(document: Document, rules: Rules) -> tuple[list[list[tuple[int, bool]]], bool] | set[str]:
    """The sequences of a document, and whether they are of no use in pieces; or why there are none."""
    says = document.says
    if isinstance(says, Bad):
        return {says.reason}
    if says is None:
        return {"null"}
    if isinstance(says, Ids):
        return [list(zip(says.ids, says.counts or [True] * len(says.ids), strict=True))], says.counts is not None
    text = says if isinstance(says, str) else (
        says.prompt + says.completion if isinstance(says, Pair) else "\n".join(said.words for said in says.said)
    )  # fmt: skip
    if len(text) < rules.min_chars:
        return {"min-chars"}
    if isinstance(says, str):
        return [closed(tokens_of([(says, True)]), rules.eos)], False
    if isinstance(says, Pair):
        return [closed(tokens_of([(says.prompt, False), (says.completion, True)]), rules.eos)], True
    if not any(taught_of(says)):
        return {"no answer"}
    shown = TEMPLATES[rules.template][1](says)
    return shown if isinstance(shown, set) else ([tokens_of(texts) for texts in shown], True)


Piece = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids, and the label of each: the next one, or -100."""


@dataclass
class Expected:
    """What a cache should hold.

    Attributes:
        pieces: of each document, how often each piece.
        dropped: why each document that is left out may be said to be.
        bad: those of them that cannot be used.
    """

    pieces: dict[int, Counter[Piece]] = field(default_factory=dict)
    dropped: dict[int, set[str]] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)
    cut: int = 0
    truncated: int = 0

    @property
    def has_label(self) -> bool:
        """Whether there is anything to teach."""
        return any(label != IGNORE for pieces in self.pieces.values() for _, labels in pieces for label in labels)


def expected_of(made: Made, rules: Rules) -> Expected:
    """What a cache of a corpus should hold."""
    found = Expected()
    for number, document in enumerate(made.documents):
        sequences = sequences_of(document, rules)
        if isinstance(sequences, set):
            found.dropped[number] = sequences
            if not sequences & {"null", "min-chars"}:
                found.bad.add(number)
            continue
        pieces, fates = [], []
        for sequence in sequences[0]:
            kept, fate = fitted(sequence, rules, sequences[1])
            pieces += kept
            fates.append(fate)
        if not pieces:
            found.dropped[number] = {"overlong" if "overlong" in fates else "too-short"}
            continue
        found.cut += "cut" in fates
        found.truncated += "truncated" in fates or "overlong" in fates
        found.pieces[number] = Counter(
            (tuple(token for token, _ in piece),
             (*(token if taught else IGNORE for token, taught in piece[1:]), IGNORE))
            for piece in pieces
        )  # fmt: skip
    return found


def fitted(sequence: list[tuple[int, bool]], rules: Rules, whole: bool) -> tuple[list[list[tuple[int, bool]]], str]:
    """The pieces of a sequence that is put into rows, and its fate."""
    most, overlong = rules.seq_len, rules.overlong
    if overlong == "auto":
        overlong = "truncate" if whole else "cut"
    if len(sequence) < 2:
        return [], "too-short"
    if len(sequence) <= most:
        return [sequence], "kept"
    if overlong == "cut":
        pieces = [sequence[start : start + most] for start in range(0, len(sequence), most)]
        return [piece for piece in pieces if len(piece) > 1], "cut"
    if overlong == "truncate" and any(taught for _, taught in sequence[1:most]):
        return [sequence[:most]], "truncated"
    return [], "overlong"


# What became of it.


def pieces_of(folder: Path) -> dict[int, Counter[Piece]]:
    """The pieces of each document that a cache holds."""
    cache = open_cache(str(folder))
    found: dict[int, Counter[Piece]] = {}
    for packed, targets in cache.read_rows(range(len(cache))):
        labels = packed.labels(len(packed.tokens))
        assert (labels != IGNORE).sum() == len(targets.count)
        at = 0
        for number, length in zip(packed.piece_documents.tolist(), packed.piece_lengths.tolist(), strict=True):
            piece = tuple(packed.tokens[at : at + length].tolist()), tuple(labels[at : at + length].tolist())
            found.setdefault(number, Counter())[piece] += 1
            at += length
    return found


def objects_of(folder: Path) -> dict[str, bytes]:
    """The data of each shard."""
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher for each template."""
    folder = tmp_path_factory.mktemp("teachers")
    make_bytes_tokenizer(folder)
    make_model(
        folder, vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=1024,
    )  # fmt: skip
    for name, (template, _) in TEMPLATES.items():
        (folder / f"{name}.jinja").write_text(template)
    return {name: str(folder) for name in TEMPLATES}


def config(teachers: dict[str, str], corpus: Path, out: Path, rules: Rules, **more: Any) -> DumpConfig:
    return DumpConfig(
        teacher=teachers[rules.template], corpus=str(corpus), out=str(out), k=1, device="cpu", batch_rows=4,
        docs_per_shard=rules.docs_per_shard, chat_template=f"{teachers[rules.template]}/{rules.template}.jinja",
        **rules.options, **more,
    )  # fmt: skip


def check(made: Made, rules: Rules, teachers: dict[str, str]) -> None:
    if made.form == "token_ids":
        rules = replace(rules, min_chars=0)  # tokens have no characters
    expected = expected_of(made, rules)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = made.write(folder)
        options = config(teachers, corpus, folder / "one", rules)
        if not expected.has_label:
            with pytest.raises(KdcacheError) as refused:
                dump(options)
            assert "\n" not in str(refused.value)
            return
        summary = dump(options)
        assert pieces_of(folder / "one") == expected.pieces
        commits = open_cache(str(folder / "one")).commits
        bad = {b["document"]: b["reason"] for commit in commits.values() for b in commit.bad_records}
        assert set(bad) == expected.bad
        for number, reason in bad.items():
            assert reason.partition(": ")[0] in expected.dropped[number], reason
        assert sum(summary["dropped"].values()) == len(expected.dropped)
        for reason, count in summary["dropped"].items():
            may = [number for number, reasons in expected.dropped.items() if reason in reasons]
            assert count <= len(may), (reason, summary["dropped"])
        assert (summary["cut"], summary["truncated"]) == (expected.cut, expected.truncated)
        told = check_data(CheckOptions(
            teacher=options.teacher, corpus=options.corpus, chat_template=options.chat_template, **rules.options
        ))  # fmt: skip
        assert told["dropped"] == summary["dropped"] and told["documents"] == len(made.documents)
        if len(commits) > 1:
            for worker in ("1/2", "0/2"):
                dump(config(teachers, corpus, folder / "two", rules, worker=worker))
            assert objects_of(folder / "one") == objects_of(folder / "two")
        if expected.bad:
            with pytest.raises(KdcacheError):
                dump(config(teachers, corpus, folder / "stop", rules, on_bad_record="stop"))


MADE = settings(
    derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip


@settings(MADE, max_examples=10)
@given(made=corpora(), rules=RULES)
def test_a_cache_holds_what_a_slow_reference_says(made: Made, rules: Rules, teachers: dict[str, str]) -> None:
    check(made, rules, teachers)


@pytest.mark.long
@settings(MADE, max_examples=30)
@given(made=corpora(), rules=RULES)
def test_30_caches_hold_what_a_slow_reference_says(made: Made, rules: Rules, teachers: dict[str, str]) -> None:
    check(made, rules, teachers)


COMMANDS = [
    (b'{"text": "One day."}\n{"text": 5}\nhe said\n{"text": "\xff"}\n', 0),
    (b'{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]}\n', 0),
    (b'{"text": 5}\n\n{"text": null}\n', 2),
    (b'{"frage": "Wer?"}\n', 2),
    (b"\xff\xfe\x00", 2),
    (b"[]", 2),
    (b"", 2),
    (b'{"messages": [{"role": "user", "content": "Who?"}]}\n', 2),
    (b'{"input_ids": [5, 6, 7], "token_weights": [1, 1, 1]}\n', 2),
    (b'{"input_ids": [260, 6, 7]}\n', 2),
]


@pytest.mark.parametrize("content", range(len(COMMANDS)))
def test_the_command_line_says_one_sentence(teachers: dict[str, str], tmp_path: Path, content: int) -> None:
    """Of a dump and of a check alike: whatever stands in a file, it is taken or refused, without a traceback."""
    data, code = COMMANDS[content]
    (tmp_path / "made.jsonl").write_bytes(data)
    folder = teachers["chatml"]
    told = ["--teacher", folder, "--corpus", tmp_path / "made.jsonl", "--chat-template", f"{folder}/chatml.jinja"]
    for command in (["check-data"], ["dump-teacher", "--out", tmp_path / "c", "--k", "1", "--device", "cpu"]):
        done = CliRunner().invoke(app, [str(argument) for argument in [*command, *told, "--json"]])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        # a check has something to say of documents that are all bad
        assert done.exit_code in ((code,) if command[0] == "dump-teacher" else (0, code)), (command, done.output)
        assert "Traceback" not in done.output
        if done.exit_code:
            assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def nested(levels: int, kind: str = "[") -> str:
    return "[" * levels + "]" * levels if kind == "[" else '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [99, 500, 990, 1020, 100_000])
def test_records_that_are_nested_deeply(teachers: dict[str, str], tmp_path: Path, levels: int) -> None:
    """However deeply, nothing but one record is left out, and nothing runs out of stack."""
    good = '{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."'
    call = '{"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", '
    call += '"tool_calls": [{"function": {"name": "f", '
    lines = [
        f'{{"messages": [{good}}}]}}',
        f'{{"messages": {nested(levels)}}}',
        json.dumps({"messages": nested(levels)}),
        call + f'"arguments": {nested(levels, "{")}}}}}]}}]}}',
        call + f'"arguments": {json.dumps(nested(levels, "{"))}}}}}]}}]}}',
        f'{{"messages": [{good}, "more": {nested(levels)}}}]}}',
        f'{{"messages": [{good}}}], "tools": [{{"a": {nested(levels)}}}]}}',
    ]
    (tmp_path / "deep.jsonl").write_text("\n".join(lines))
    told = check_data(CheckOptions(
        teacher=teachers["chatml"], corpus=str(tmp_path / "deep.jsonl"), seq_len=900, overlong="cut",
        chat_template=f"{teachers['chatml']}/chatml.jinja",
    ))  # fmt: skip
    assert told["documents"] == len(lines) and told["forms"]["chat"] >= 1
    reasons = {bad["reason"].partition(": ")[0] for bad in told["bad_records"]}
    assert reasons <= {"nested too deeply", "not JSON", "not a message", "wrong type", "refused by the chat template"}
