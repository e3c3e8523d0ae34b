"""How summaries, rows, positions and the demo are shown in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdcache.explorer.token_texts import readable
from kdcache_cli.figures import bar, figures_table, print_next_tokens

_BAD_RECORDS = 5
"""Bad records that a summary shows."""


def summary_table(summary: dict[str, Any]) -> Table:
    """What a cache or a shard holds."""
    table = Table(box=None, show_header=False, pad_edge=False)
    where = f"{summary['cache']}" + ("" if summary["shard"] is None else f", shard {summary['shard']}")
    shards = summary["shards"]
    state = "complete" if summary["complete"] else "incomplete"
    selection = summary["selection"]
    rule = " ".join([selection["kind"], *(f"{name}={value}" for name, value in selection.items() if name != "kind")])
    temperatures, extras = ", ".join(f"{t:g}" for t in summary["temperatures"]), summary["extras"]
    for name, value in (
        ("cache", f"{where} ({state}, {shards['committed']} of {shards['planned']} shards)"),
        ("teacher", str(summary["teacher"])),
        ("corpus", str(summary["corpus"])),
        *(("written by", line) for line in _written_by(summary["generated"])),
        ("target", f"{rule}, T = {temperatures}, precision {summary['precision']}"),
        ("documents", f"{summary['documents']:,}"),
        *(("", line) for line in of_documents(summary)),
        ("rows", f"{summary['rows']:,} of {summary['seq_len']} slots, {summary['tokens']:,} tokens"),
        ("positions", f"{count_of_labels(summary)} ({summary['position_choice']})"),
        ("entries", _entries(summary)),
        ("bytes", f"{summary['bytes']:,}, {summary['bytes_per_position']:.1f} per position"),
        ("kept mass", _kept_mass(summary)),
        ("entropy", _mean_nats(summary["mean_entropy"])),
        (
            "entropy of all labels",
            quantiles(summary["entropy_quantiles"]) if summary["entropy_quantiles"] else "unknown",
        ),
        ("teacher nll", _mean_nats(summary["teacher_nll"])),
        *(
            ("extra", f"{x['name']}: {x['width']} per {x['per']}, {x['precision']}, {x['bytes']:,} bytes")
            for x in extras
        ),
        *_teacher_context(summary["teacher_context"]),
    ):
        table.add_row(Text(name, style="bold"), Text(readable(value)))
    return table


def _written_by(generated: Any) -> list[str]:
    """Who wrote a corpus that was generated, and how."""
    if not isinstance(generated, dict):
        return []
    told = [f"{name} {generated[name]}" for name in ("temperature", "top_p", "seed") if name in generated]
    return [", ".join([str(generated.get("writer")), *told])]


def _teacher_context(context: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the teacher reads that its student does not."""
    if context is None:
        return []
    system = "" if context["system"] is None else f"; it is told {_short(context['system'])!r}"
    return [("teacher context", f"the teacher alone reads more, at most {context['seq_len']:,} tokens a piece{system}")]


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


_SHOWN = 1500
"""Characters of an example that a terminal shows."""


def print_checked(console: Console, found: dict[str, Any]) -> None:
    """What a corpus becomes, and its first documents with what is supervised marked."""
    table = Table(box=None, show_header=False, pad_edge=False)
    lengths = found["lengths"]
    forms = ", ".join(f"{count:,} {form}" for form, count in found["forms"].items()) or "none"
    for name, value in (
        ("corpus", f"{found['corpus']} ({found['form']}: {', '.join(found['columns'])})"),
        ("documents", f"{found['documents']:,}, of which are used: {forms}"),
        *(("", line) for line in of_documents(found)),
        ("rows", f"{found['rows']:,}, {found['tokens']:,} tokens"),
        ("supervised", f"{found['labels']:,} tokens carry a target, {found['supervised_share']:.1%}"),
        ("tokens a document", ", ".join(f"{name} {value:,}" for name, value in lengths.items()) or "none"),
        *_teacher_context(found["teacher_context"]),
    ):
        table.add_row(Text(name, style="bold"), Text(readable(value)))
    console.print(table)
    for example in found["examples"]:
        console.print(Text(f"\ndocument {example['document']:,}, supervised between » and «", style="bold"))
        if example["teacher"] is not None:
            told = Text("the teacher alone reads ", style="bold")
            told.append(repr(_short(example["teacher"]["text"], _SHOWN)), style="dim")
            console.print(told.append(f", in place of {example['teacher']['replaces']!r}"), soft_wrap=True)
        text, left = Text(), _SHOWN
        for part in example["parts"]:
            shown = readable(part["text"][: max(0, left)])
            left -= len(part["text"])
            text.append(f"»{shown}«" if part["supervised"] else shown, style="green" if part["supervised"] else "dim")
        console.print(text.append("..." if left < 0 else ""), soft_wrap=True)


def of_documents(summary: dict[str, Any]) -> list[str]:
    """What became of the documents beside whole rows: a line for each thing that happened to any."""
    dropped, bad, shown = summary["dropped"], summary["bad"], summary["bad_records"][:_BAD_RECORDS]
    lines = []
    if dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        lines.append(f"{_documents(sum(dropped.values()))} left out: {reasons}")
    lines += [f"  document {record['document']:,}: {record['reason']}" for record in shown]
    if bad > len(shown):
        where = " (bad_records.jsonl in the cache lists them)" if summary["complete"] else ""
        lines.append(f"  and {_documents(bad - len(shown))} more that cannot be used{where}")
    if summary["cut"]:
        lines.append(f"{_documents(summary['cut'])} cut into pieces, longer than a row")
    if summary["truncated"]:
        lines.append(f"{_documents(summary['truncated'])} truncated to the first row")
    if summary["eos_labels"] == 0 and summary["labels"]:
        lines.append("no end of a document is taught: no label is the end of sequence; see --eos")
    return lines


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def count_of_labels(summary: dict[str, Any]) -> str:
    """The number of positions with a target and, if it differs, the number of labels."""
    positions, labels = summary["positions"], summary["labels"]
    if positions == labels:
        return f"{positions:,} positions"
    return f"{positions:,} positions of {labels:,} labels ({positions / labels:.1%})"


def quantiles(found: dict[str, float]) -> str:
    """Quantiles in one line."""
    return ", ".join(f"{float(level):.0%} below {value:.3g}" for level, value in found.items())


def _entries(summary: dict[str, Any]) -> str:
    least, most = summary["entries_per_position"]["least"], summary["entries_per_position"]["most"]
    each = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return f"{summary['entries']:,}, {each} per position"


def _mean_nats(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f} nats on average"


def _kept_mass(summary: dict[str, Any]) -> str:
    if summary["mean_tail"] is None:
        return "none: the entries are an unbiased sample of the whole distribution"
    return f"{summary['mean_kept_mass']:.6f} on average, tail {summary['mean_tail']:.2g}"


def print_row(console: Console, row: dict[str, Any]) -> None:
    """A row as text; each token coloured by the probability that the teacher gave it."""
    console.print(f"shard {row['shard']}, row {row['row']}: {row['pieces']} piece(s), {len(row['tokens'])} tokens")
    console.print(
        "colour and number: the probability that the teacher gave the token, given what precedes it\n", style="dim"
    )
    for read in row["teacher_read"]:
        told = f"before token {read['replaced']} of piece {read['piece']} the teacher alone read "
        console.print(Text(told, style="bold").append(repr(_short(read["text"])), style="dim"), soft_wrap=True)
    piece = None
    line = Text()
    for token in row["tokens"]:
        if token["piece"] != piece:
            piece = token["piece"]
            line.append(f"\n\n[piece {piece}, document {token['document']}] ", style="bold")
        p = None if token["logprob"] is None else 2.718281828459045 ** token["logprob"]
        line.append(readable(token["text"]), style=_colour(p))
        if p is not None:
            line.append(f"{{{p:.2f}}}" if p >= 0.005 else "{<.01}", style="dim")
    console.print(line)


def _colour(p: float | None) -> str:
    if p is None:
        return "dim"
    return "green" if p >= 0.5 else "yellow" if p >= 0.1 else "red"


def print_position(console: Console, at: dict[str, Any]) -> None:
    """One position: its entries, with a bar for each."""
    console.print(f"shard {at['shard']}, row {at['row']}, position {at['position']}, document {at['document']}")
    if at["teacher_read"] is not None:
        console.print(Text.assemble(("told     ", "bold"), repr(_short(at["teacher_read"]["text"]))))
    console.print(Text.assemble(("context  ", "bold"), repr(at["context"])))
    if at["no_target"] is not None:
        if at["label"] is not None:
            console.print(Text.assemble(("next     ", "bold"), f"{at['label']['text']!r} (id {at['label']['id']})"))
        console.print(f"no target here: {at['no_target']}", highlight=False)
        return
    label = at["label"]
    logprob = _figure(label["logprob"], 4) or "unknown"
    console.print(Text.assemble(("next     ", "bold"), f"{label['text']!r} (id {label['id']}, log p {logprob})"))
    entropy = "unknown" if at["entropy"] is None else f"{at['entropy']:.4f} nats"
    console.print(Text.assemble(("entropy  ", "bold"), entropy))
    table = Table("id", "text", "log p", f"p (T = {at['temperature']:g})", "weight", "", box=None, pad_edge=False)
    for entry in at["entries"]:
        style = "bold green" if entry["id"] == label["id"] else ""
        table.add_row(
            str(entry["id"]), Text(repr(entry["text"])), _figure(entry["logprob"], 4), _figure(entry["probability"], 6),
            f"{entry['weight']:.6f}", bar(entry["weight"]), style=style,
        )  # fmt: skip
    hidden = at["kept"] - len(at["entries"])
    if at["tail"] is None:
        console.print(table)
        console.print(
            f"{hidden} more entries; they are sampled: their weights estimate the whole distribution", style="dim"
        )
        return
    if hidden:
        rest = 1 - at["tail"] - sum(entry["probability"] for entry in at["entries"])
        table.add_row("", f"{hidden} more", "", f"{max(rest, 0.0):.6f}", "", bar(max(rest, 0.0)), style="dim")
    table.add_row("", "tail", "", f"{at['tail']:.6f}", "", bar(at["tail"]), style="dim")
    console.print(table)


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_demo(console: Console, summary: dict[str, Any]) -> None:
    """What the demo made and found: its cache, its students, what they say, and how long each stage took."""
    students = summary["students"]
    columns = {"before": students["before"], "distilled": students["distilled"], "labels alone": students["labels"]}
    console.print(Text(summary["about"]), soft_wrap=True)
    console.print(Text("\nthe cache", style="bold"))
    console.print(summary_table(summary["inspect"]["summary"]))
    console.print(Text("\none position of it", style="bold"))
    print_position(console, summary["inspect"]["position"])
    console.print(Text(f"\nthe students after {summary['steps']} steps, on rows held out", style="bold"))
    console.print(figures_table(columns))
    console.print(Text("\nwhat comes next", style="bold"))
    print_next_tokens(console, summary["prompt"])
    table = Table("stage", "seconds", "steps", box=None, pad_edge=False)
    for stage in summary["stages"]:
        steps = stage.get("steps")
        table.add_row(stage["name"], f"{stage['seconds']:.1f}", "" if steps is None else f"{steps:,}")
    console.print()
    console.print(table)
    console.print(Text(f"\n{summary['verdict']}\nplot: {summary['plot']}\nfolder: {summary['out']}"), soft_wrap=True)


def faithfulness_table(found: dict[str, Any]) -> Table:
    """Differences between the stored targets and a new run of the teacher, and between two such runs (the control)."""
    title = f"teacher run again over {found['rows']} rows, {found['positions']:,} positions"
    table = Table("", "stored: mean", "worst", "control: mean", "worst", title=title, box=None, pad_edge=False)
    for name in ("total_variation", "entropy", "label_logprob", "choice"):
        if name in found["stored"]:
            cells = [found[who][name][what] for who in ("stored", "control") for what in ("mean", "worst")]
            label = "position filter" if name == "choice" else name.replace("_", " ")
            table.add_row(label, *(f"{cell:.2g}" for cell in cells))
    return table
