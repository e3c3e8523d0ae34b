"""How a plan is shown in a terminal: for whoever pays for the dump, so in words and units."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdcache.teacher.config import PlanOptions
from kdcache_cli.frame import in_options


def print_plan(console: Console, plan: dict[str, Any]) -> None:
    """The corpus, bytes for each selection, time and money, training, memory, and what will not fit."""

    def say(line: str, style: str = "") -> None:
        console.print(Text(line, style=style), soft_wrap=True)

    sample = plan["sampled"]
    share = "all of it was read" if sample["share"] == 1 else f"from {sample['share']:.2%} of it"
    say("The corpus", "bold")
    say(
        f"  {plan['documents']:,} documents, {plan['characters']:,} characters, in {plan['shards']:,} shards\n"
        f"  {plan['rows']:,} rows of {plan['seq_len']:,} slots, {plan['tokens']:,} tokens, {plan['positions']:,} "
        f"positions with a target ({share})"
    )
    if sample["dropped"]:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sample["dropped"].items())
        say(f"  left out, of {sample['documents']:,} documents read: {counts}")
    say("\nDisk", "bold")
    console.print(_selections(plan))
    say("\nTime and money", "bold")
    for each in plan["machines"]:
        price = "" if each["price"] is None else f", price {each['price']:,.2f}"
        machines = "1 machine" if each["machines"] == 1 else f"{each['machines']:,} machines"
        say(
            f"  {machines} like this one: {duration(each['seconds'])}, {each['teacher_hours']:.3g} teacher hours{price}"
        )
    seconds = plan["seconds"]
    words = {"start": "start", "pilot": "pilot", "documents": "reading text", "teacher": "teacher", "shards": "commits"}
    say("  of one machine's time: " + ", ".join(f"{word} {duration(seconds[name])}" for name, word in words.items()))
    if plan["training"]:
        say("\nTraining from the cache, or with the teacher inside the training loop", "bold")
        say(_training(plan["training"], plan["bytes"]))
    say("\nMemory", "bold")
    memory, training = plan["memory"]["dump"], plan["memory"]["training"]
    say(f"  dump: {size(memory['peak_bytes'])} ({memory['kind']}); logits at once {size(memory['logits_bytes'])}")
    if training:
        say(f"  training: {size(training['peak_bytes'])} ({training['kind']})")
    if plan["problems"]:
        say("\nWill not fit", "bold")
        names = [field.name for field in dataclasses.fields(PlanOptions)]
        for problem in plan["problems"]:
            say(f"  {in_options(problem, names)}")


def _selections(plan: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("  selection")
    table.add_column("bytes per position", justify="right")
    table.add_column("in all", justify="right")
    table.add_column("")
    without = "without the extras" if plan["extras"] else ""
    temperatures = ", ".join(f"{t:g}" for t in plan["temperatures"])
    for each in plan["selections"]:
        known = each["bytes"] is not None
        note = f"the one asked for, T = {temperatures}" if each["chosen"] else each["problem"] or without
        table.add_row(
            Text("  " + each["name"]),
            f"{each['bytes_per_position']:.1f}" if known else "",
            size(each["bytes"]) if known else "",
            Text(note),
        )
    return table


def _training(training: dict[str, Any], disk: int) -> str:
    students = "1 student" if training["students"] == 1 else f"{training['students']:,} students"
    verdict = "pays" if training["pays"] else "does not pay"
    at = training["break_even_passes"]
    later = "never does: reading it takes as long as the teacher" if at is None else f"does from {at:.2f} passes on"
    return (
        f"  {students} for {training['epochs']:g} epochs each: {duration(training['cached_seconds'])} with the cache "
        f"(its dump included), {duration(training['live_seconds'])} with the teacher in the loop\n"
        f"  the cache {verdict}; it {later} (students times epochs), and takes {size(disk)} of disk"
    )


def size(count: float) -> str:
    """Bytes in the unit that a person would use."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:,.3g} PB"


def duration(seconds: float) -> str:
    """A time in the unit that a person would use."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} minutes"
    if seconds < 96 * 3600:
        return f"{seconds / 3600:.3g} hours"
    return f"{seconds / 86400:,.3g} days"
