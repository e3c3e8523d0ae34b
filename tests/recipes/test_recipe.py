"""Recipes: what waits for what, what references stand for, and one sentence for each mistake."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from kdcache_cli.frame import OPTIONS_OF
from kdcache_cli.main import STAGES

from kdcache.errors import ConfigError
from kdcache.recipes.options import check_options, to_toml
from kdcache.recipes.recipe import Stage, read_recipe

COMMANDS = {name: OPTIONS_OF[name] for name in STAGES}

CHAIN = """
[set]
teacher = "t"
steps = 10

[stages.learn]
command = "train-student"
cache = ["{dump}:2", "other"]
student = "{teacher}/config.json"
steps = "{steps}"
after = ["check"]

[stages.dump]
command = "dump-teacher"
teacher = "{teacher}"
corpus = "c.txt"
temperatures = [1, 2]
seq-len = 64

[stages.check]
command = "check-data"
teacher = "{teacher}"
corpus = "c.txt"
"""

ROUNDS = """
[set]
teacher = "t"

[stages.first]
command = "make-student"
teacher = "{teacher}"
layers = "every-2"

[rounds]
count = 2
first = { learn = "{first}" }

[rounds.stages.write]
command = "generate"
writer = "{previous.learn}"
prompts = "p.txt"
seed = "{round}"

[rounds.stages.score]
command = "dump-teacher"
teacher = "{teacher}"
corpus = "{write}"

[rounds.stages.learn]
command = "train-student"
cache = ["{every.score}"]
student = "{previous.learn}"
steps = 5

[stages.compare]
command = "evaluate"
compare = ["{every.learn}", "{first}"]
cache = "{score}"
"""


def read(tmp_path: Path, text: str, *settings: str) -> dict[str, Stage]:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return {stage.name: stage for stage in read_recipe(path, settings, Path("out"), COMMANDS)}


def test_stages_come_after_what_they_wait_for(tmp_path: Path) -> None:
    stages = read(tmp_path, CHAIN)
    assert list(stages) == ["dump", "check", "learn"]
    assert stages["learn"].needs == ("check", "dump")
    assert stages["learn"].options["cache"] == ["out/dump:2", "other"]
    assert stages["learn"].options["student"] == "t/config.json"
    assert stages["learn"].options["steps"] == 10
    assert stages["dump"].options == {"teacher": "t", "corpus": "c.txt", "temperatures": "1,2", "seq_len": 64}
    assert stages["dump"].leaves_folder and not stages["check"].leaves_folder
    chosen = {name: stage.chosen for name, stage in stages.items()}
    assert chosen == {"dump": {"out": "out/dump"}, "check": {}, "learn": {"out": "out/learn", "resume": True}}


def test_a_value_of_set_may_be_replaced(tmp_path: Path) -> None:
    before, after = read(tmp_path, CHAIN), read(tmp_path, CHAIN, "steps=20")
    assert after["learn"].options["steps"] == 20
    assert before["dump"].identity == after["dump"].identity
    assert before["learn"].identity != after["learn"].identity
    moved = read(tmp_path, CHAIN, "teacher=u")
    assert moved["learn"].identity != before["learn"].identity, "what it waits for has other options"


def test_rounds(tmp_path: Path) -> None:
    stages = read(tmp_path, ROUNDS)
    assert list(stages) == [
        "first", "round-1/write", "round-1/score", "round-1/learn", "round-2/write", "round-2/score", "round-2/learn",
        "compare",
    ]  # fmt: skip
    assert stages["round-1/write"].options["writer"] == "out/first"
    assert stages["round-2/write"].options["writer"] == "out/round-1/learn"
    assert [stages[f"round-{n}/write"].options["seed"] for n in (1, 2)] == [1, 2]
    assert stages["round-2/learn"].options["cache"] == ["out/round-1/score", "out/round-2/score"]
    assert stages["round-2/learn"].needs == ("round-1/learn", "round-1/score", "round-2/score")
    assert stages["compare"].options["compare"] == ["out/round-1/learn", "out/round-2/learn", "out/first"]
    assert stages["compare"].options["cache"] == "out/round-2/score"


def test_options_are_read_back(tmp_path: Path) -> None:
    given = {"text": 'a "quoted" line\n\\ü\u2028', "number": 1.5, "whole": 3, "yes": True, "several": ["a", "b"]}
    assert tomllib.loads(to_toml(given)) == given
    learn = read(tmp_path, CHAIN)["learn"]
    assert tomllib.loads(to_toml(learn.options)) == json.loads(json.dumps(learn.options))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages = 3", "stages is none of its tables"),
        ("[stage.a]\ncommand = 'verify'", "stage is none of its tables set, stages, rounds"),
        ("[set]\na = 1", "it has no stages"),
        ("[set]\na = {b = 1}\n[stages.x]", "set.a is neither text nor number nor list"),
        ("[stages.a]\ncommand = 'distil'", "stage a: 'distil' is none of check-data,"),
        ("[stages.a]\ncache = 'c'", "stage a: 'a' is none of check-data,"),
        ("[stages.A]\ncommand = 'verify'\ncache = 'c'", "a stage cannot be named A"),
        ("[stages.verify]\ncache = '{nothing}'", "{nothing} is no stage and no value of set"),
        ("[stages.verify]\ncache = 'c'\nspeed = 1", "stage verify (verify): it has no option speed"),
        ("[stages.verify]\ncache = 'c'\nrows = 'many'", "rows is many, but must be a whole number"),
        ("[stages.verify]\ncache = 'c'\nrows = 1.5", "rows is 1.5, but must be a whole number"),
        ("[stages.verify]", "stage verify (verify): it needs cache"),
        ("[stages.dump-teacher]\nteacher='t'\ncorpus='c'\nout='x'", "out is chosen by the recipe"),
        ("[stages.evaluate]\nstudent='s'\ncache='c'\nout='x'", "out is not for a stage"),
        ("[stages.train-student]\ncache='c'\nstudent='s'\nsteps=1\nresume=true", "resume is chosen by the recipe"),
        ("[stages.dump-teacher]\nteacher='t'\ncorpus='c'\nengine='x'", "stage dump-teacher (dump-teacher): "),
        ("[stages.verify]\ncache = 'c'\nafter = 'b'", "after must be a list of stages"),
        ("[set]\nb = 1\n[stages.verify]\ncache = 'c'\nafter = ['{b}']", "{{b}} is no stage"),
        ("[set]\nb = 1\n[stages.verify]\ncache = 'c'\nafter = ['b']", "after names b, which is no stage"),
        (
            "[stages.check-data]\nteacher='t'\ncorpus='c'\n[stages.verify]\ncache = '{check-data}'",
            "{check-data} is no folder: check-data leaves none; to wait for it, use after",
        ),
        (
            "[stages.a]\ncommand='convert'\ncache='{b}'\n[stages.b]\ncommand='convert'\ncache='{a}'",
            "the stages a, b wait for each other",
        ),
        ("[stages.a]\ncommand='convert'\ncache='{a}'", "the stages a wait for each other"),
        ("[rounds]\ncount = 0\n[rounds.stages.verify]\ncache = 'c'", "rounds.count is 0"),
        ("[rounds]\ncount = 1\ntimes = 3\n[rounds.stages.verify]\ncache = 'c'", "rounds has times"),
        ("[rounds]\ncount = 1\nfirst = {x = 'y'}\n[rounds.stages.verify]\ncache = 'c'", "rounds.first must be a table"),
        (
            "[rounds]\ncount = 1\n[rounds.stages.a]\ncommand='convert'\ncache='{previous.a}'",
            "{previous.a} has no meaning in the first round",
        ),
        (
            "[rounds]\ncount = 2\n[rounds.stages.a]\ncommand='convert'\ncache='c'\n"
            "[stages.verify]\ncache='{every.a}'",
            "{every.a} is several, so it must be an item of a list",
        ),
        ("[stages.a]\ncommand='verify'\ncache='c'\n[rounds]\ncount=1\n[rounds.stages.a]", "is in stages and in rounds"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'r.toml'}: ") and said in message and "\n" not in message


def test_no_such_value_of_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set names speed, which is none of steps, teacher"):
        read(tmp_path, CHAIN, "speed=3")
    with pytest.raises(ConfigError, match="steps is many, but must be a whole number"):
        read(tmp_path, CHAIN, "steps=many")


def test_text_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read(tmp_path, "[stages")
    with pytest.raises(ConfigError, match=r"nothing\.toml cannot be read: No such file"):
        read_recipe(tmp_path / "nothing.toml", (), Path("out"), COMMANDS)


def test_numbers_and_lists_as_options_take_them() -> None:
    found = check_options(COMMANDS["train-student"], {"cache": "c", "student": "s", "lr": 1, "steps": 3})
    assert found["cache"] == ["c"] and found["lr"] == 1.0 and isinstance(found["lr"], float)
