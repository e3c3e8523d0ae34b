"""The commands of `kdcache`: their options, their calls into the library, and how their results are shown."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kdcache.generation.options import GenerateOptions
from kdcache.options import option
from kdcache.recipes.config import DistilOptions
from kdcache.student.config import TrainOptions
from kdcache.student.from_teacher.config import MakeStudentOptions
from kdcache.teacher.config import CheckOptions, DumpOptions, EngineOptions, PlanOptions
from kdcache_cli import interop_commands as interop
from kdcache_cli.doctor_command import DoctorOptions, doctor
from kdcache_cli.frame import OPTIONS_OF, Output, command, run_app
from kdcache_cli.inspect_commands import ExploreOptions, InspectOptions, explore, inspect_shard
from kdcache_cli.plot_command import PlotOptions, plot

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Run a teacher once, cache a small sparse target for every token, distil any number of students.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        import kdcache

        print(kdcache.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="print the version"),
) -> None:
    """Run a teacher once, cache a small sparse target for every token, distil any number of students."""


@command(app, "dump-teacher", DumpOptions)
def dump_teacher(options: DumpOptions, output: Output) -> None:
    """Run the teacher over a corpus once and write its targets into a cache."""
    from kdcache.teacher.launch import launch
    from kdcache_cli import tables

    with output.progress("dump", "documents") as bar:
        summary = launch(options, lambda done, total, positions: bar(done, total, f"{positions:,} positions"))

    def show(console: Console) -> None:
        shards = summary["shards"]
        state = "complete" if summary["complete"] else f"{shards['planned'] - shards['committed']} shards missing"
        if options.create_only:
            console.print(f"{summary['cache']}: {shards['planned']} shards planned, {shards['committed']} committed")
            return
        counted = "" if summary["complete"] else "of this worker's shards: "
        console.print(
            f"{summary['cache']}: {state}, {shards['committed']} of {shards['planned']} shards "
            f"({shards['by_this_worker']} by this worker)\n"
            f"{counted}{summary['documents']:,} documents, {summary['rows']:,} rows, "
            f"{tables.count_of_labels(summary)}, {summary['entries']:,} entries\n"
            f"{summary['bytes']:,} bytes, {summary['bytes_per_position']:.1f} per position; "
            f"{summary['seconds']:.1f} s, {summary['positions_per_second']:,.0f} positions/s"
        )
        for line in tables.of_documents(summary):
            console.print(line, markup=False, highlight=False)
        if summary["entropy_quantiles"]:
            console.print(f"entropy of the teacher in nats: {tables.quantiles(summary['entropy_quantiles'])}")
        if summary["reused"]["positions"]:
            reused = summary["reused"]
            console.print(f"copied {reused['positions']:,} positions of {reused['documents']:,} documents")
        if summary["waited_seconds"] > 0.05 * summary["seconds"]:
            console.print(f"the teacher waited {summary['waited_seconds']:.1f} s for encoding and writing")

    if summary:
        output.result(summary, show)


@command(app, "check-data", CheckOptions)
def check_data(options: CheckOptions, output: Output) -> None:
    """Show what a corpus becomes: what is supervised, what is left out and why. The teacher is not run."""
    from kdcache.teacher.check_data import check_data as check

    with output.progress("check", "documents") as bar:
        found = check(options, bar)

    def show(console: Console) -> None:
        from kdcache_cli.tables import print_checked

        print_checked(console, found)

    output.result(found, show)
    output.advise(found["advice"])


@command(app, "plan", PlanOptions)
def plan(options: PlanOptions, output: Output) -> None:
    """Measure a few batches, and say what a dump will take: disk, hours, money, memory. No cache is written."""
    from kdcache.planning.plan import plan as make_plan

    with output.progress("plan", "stages") as bar:
        found = make_plan(options, bar)

    def show(console: Console) -> None:
        from kdcache_cli.plan_table import print_plan

        print_plan(console, found)

    output.result(found, show)


@command(app, "generate", GenerateOptions)
def generate(options: GenerateOptions, output: Output) -> None:
    """Have a model write a corpus: behind prompts, or from nothing."""
    from kdcache.generation.generate import generate as write_corpus

    with output.progress("generate", "completions") as bar:
        summary = write_corpus(options, lambda done, total, tokens: bar(done, total, f"{tokens:,} tokens"))

    def show(console: Console) -> None:
        shards = summary["shards"]
        state = "complete" if summary["complete"] else f"{shards['planned'] - shards['written']} shards missing"
        console.print(
            f"{summary['corpus']}: {state}, {shards['written']} of {shards['planned']} shards "
            f"({shards['by_this_worker']} by this worker)\n"
            f"this run: {summary['completions']:,} completions, {summary['ended']:,} of them ended by a stop token, "
            f"{summary['tokens']:,} tokens; {summary['seconds']:.1f} s, {summary['tokens_per_second']:,.0f} tokens/s",
            markup=False,
        )
        if summary["dropped"]:
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary["dropped"].items())
            console.print(f"prompts left out: {dropped}", markup=False)

    output.result(summary, show)


@command(app, "make-student", MakeStudentOptions)
def make_student(options: MakeStudentOptions, output: Output) -> None:
    """Cut a student out of a teacher: some of its layers, heads, neurons, channels, experts."""
    from kdcache.student.from_teacher.make import make_student as make

    with output.progress("make", "") as bar:
        summary = make(options, bar)

    def show(console: Console) -> None:
        from kdcache_cli.student_table import print_made

        print_made(console, summary)

    output.result(summary, show)
    output.advise(summary["advice"])


@command(app, "train-student", TrainOptions)
def train_student(options: TrainOptions, output: Output) -> None:
    """Train a student from a cache; the teacher is not needed."""
    from kdcache.student.launch import launch

    with output.progress("train", "steps") as bar:
        summary = launch(
            options,
            lambda done, total, latest: bar(done, total, _latest(latest)),
            lambda done, total: bar(done, total, "rows read for --where"),
            output.advise,
        )

    def show(console: Console) -> None:
        from kdcache_cli.figures import figures_table

        after = summary["heldout"]["after"]
        each = {f"after, {name}": figures for name, figures in after.get("caches", {}).items()}
        each |= {f"after, {teacher['cache']}": teacher for teacher in after.get("teachers", ())}
        console.print(figures_table({"before": summary["heldout"]["before"], "after": after, **each}))
        console.print(
            f"{summary['out']}: {summary['steps']:,} steps, {summary['positions']:,} positions, "
            f"{summary['seconds']:.1f} s, {summary['positions_per_second']:,.0f} positions/s, "
            f"{summary['data_wait_share']:.1%} of the training time spent waiting for rows"
        )
        if summary.get("curves") is None:
            console.print("no curves.png: matplotlib is not installed (pip install 'kdcache[plots]')", markup=False)

    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun, one summary for all ranks
        output.result(summary, show)


def _latest(figures: dict[str, float]) -> str:
    """The last figures of a training in one line; metrics.jsonl has all of them."""
    names = ("loss", "kl", "nll", "heldout kl", "heldout nll", "learning_rate")
    return "  ".join(f"{name.replace('_', ' ')} {figures[name]:.4g}" for name in names if name in figures)


command(app, "inspect-shard", InspectOptions, positional=("cache",))(inspect_shard)
command(app, "explore", ExploreOptions, positional=("cache",))(explore)
command(app, "plot", PlotOptions, positional=("what", "sources"))(plot)


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Options of `status`."""

    cache: str = option("folder or URL of the cache")
    watch: bool = option("look again and again, until the cache is complete", False)
    every: float = option("seconds between two looks of --watch", 5.0)


@command(app, "status", StatusOptions, positional=("cache",))
def status(options: StatusOptions, output: Output) -> None:
    """Show how far a dump is, who works on it, how fast, and what failed."""
    from kdcache.report.status import StatusReader, watch
    from kdcache_cli.status_table import status_view, watch_in

    if not options.watch:
        found = StatusReader(options.cache).look()
        output.result(found, lambda console: console.print(status_view(found)))
    elif output.json:
        *_, last = watch(options.cache, options.every)
        output.result(last, lambda _: None)
    else:
        watch_in(output.console, watch(options.cache, options.every))


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EngineOptions):
    """Options of `evaluate`."""

    cache: str = option("folder or URL of the cache")
    student: str | None = option("checkpoint folder or hub name", None)
    compare: list[str] | None = option("several students instead, side by side: --compare A B C", None)
    align: bool = option(
        "each student has its own tokenizer: align it and the cache's over the bytes of the text", False
    )
    teacher: str | None = option(
        "run the teacher of the cache too, for the dense KL, the acceptance rate and its own ECE", None
    )
    prompt: str | None = option("show the most likely next tokens after this text instead", None)
    top: int = option("how many tokens --prompt shows", 10)
    heldout: float | None = option("measure only the rows that train-student holds out with this --heldout", None)
    rows: int | None = option("measure only this many rows, evenly spread over the cache", None)
    batch_rows: int = option("rows per forward pass", 8)
    device: str = option("auto, cpu, cuda or mps", "auto")
    local_copy: str | None = option("folder for local copies of what is read from a URL", None)
    local_limit: str = option("maximum size of all local copies together", "20GB")
    out: str | None = option("new JSON file for the configuration, the versions and the figures", None)


@command(app, "evaluate", EvaluateOptions)
def evaluate_students(options: EvaluateOptions, output: Output) -> None:
    """Measure one student or several on the rows of a cache, or show their most likely next tokens."""
    from kdcache.errors import ConfigError

    if (options.student is None) == (not options.compare):
        raise ConfigError("evaluate needs either one --student or several as --compare A B C")
    if options.prompt is not None and options.align:
        raise ConfigError("--prompt is in the cache's tokens, so it excludes --align")
    if options.prompt is not None and (options.heldout is not None or options.rows is not None):
        raise ConfigError("--prompt measures no rows, so it excludes --heldout and --rows")
    from kdcache.report.evaluate import write_evaluation
    from kdcache.store.atomic_files import require_new

    if options.out is not None:
        require_new(options.out)
    value, show = (_ask_students if options.prompt is not None else _measure_students)(options, output)
    if options.out is not None:
        write_evaluation(options.out, dataclasses.asdict(options), value)
    output.result(value, show)


def _measure_students(options: EvaluateOptions, output: Output) -> tuple[dict[str, Any], Callable[[Console], None]]:
    from kdcache.report.evaluate import compare, evaluate
    from kdcache_cli.figures import print_comparison, print_figures

    others = ("student", "compare", "prompt", "top", "out", *options.engine_options)
    given = {k: v for k, v in vars(options).items() if k not in others} | {"engine_options": options.engine_options}
    with output.progress("evaluate", "rows") as bar:
        if options.student is None:
            both = compare(options.compare or [], **given, on_progress=bar)
            return both, lambda console: print_comparison(console, both["students"])
        figures = evaluate(options.student, **given, on_progress=bar)
        return figures, lambda console: print_figures(console, str(options.student), figures)


def _ask_students(options: EvaluateOptions, output: Output) -> tuple[dict[str, Any], Callable[[Console], None]]:
    from kdcache.report.prompt import next_tokens
    from kdcache_cli.figures import print_next_tokens

    students = [options.student] if options.student is not None else options.compare or []
    with output.progress("search", "rows") as bar:
        answer = next_tokens(
            students, options.cache, options.prompt or "", options.teacher, options.top, options.device,
            options.local_copy, options.local_limit, options.engine, options.engine_options, bar,
        )  # fmt: skip
    return answer, lambda console: print_next_tokens(console, answer)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(EngineOptions):
    """Options of `verify`."""

    cache: str = option("folder or URL of the cache")
    teacher: str | None = option("run the teacher of the cache again over some rows, and compare", None)
    rows: int = option("how many rows the teacher runs over again", 32)
    seed: int = option("seed of the random selection of these rows", 0)
    device: str = option("auto, cpu, cuda, cuda:1 or mps", "auto")
    dtype: str = option("auto, float32, bfloat16 or float16", "auto")


@command(app, "verify", VerifyOptions, positional=("cache",))
def verify(options: VerifyOptions, output: Output) -> None:
    """Re-hash and decode everything in a cache, and report every problem."""
    from kdcache.verify import verify_cache

    with output.progress("verify", "shards") as bar:
        report = verify_cache(options.cache, bar)
    value: dict[str, Any] = {"ok": report.ok, **vars(report)}
    if options.teacher is not None and report.ok:
        from kdcache.report.faithfulness import check_faithfulness

        with output.progress("teacher", "rows") as bar:
            found = check_faithfulness(
                options.cache,
                options.teacher,
                options.rows,
                options.seed,
                options.device,
                options.dtype,
                options.engine,
                options.engine_options,
                bar,
            )
        value["faithfulness"] = found
        if not found["agrees"]:
            report.add(None, "shards", "its targets are not those of this teacher")
            value["ok"] = False

    def show(console: Console) -> None:
        for problem in report.problems:
            console.print(f"{problem['object']}: {problem['what']}", markup=False)
        state = "ok" if report.ok else f"{len(report.problems)} problem(s)"
        console.print(f"{state}: {report.shards} shards, {report.objects} objects, {report.bytes:,} bytes")
        if report.content_sha256:
            console.print(f"content {report.content_sha256}")
        if "faithfulness" in value:
            from kdcache_cli.tables import faithfulness_table

            console.print(faithfulness_table(value["faithfulness"]))

    output.result(value, show)
    if not report.ok:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `convert`."""

    cache: str = option("folder or URL of the cache")
    out: str = option("folder or URL of the new cache; created, or resumed if it is the same conversion")
    store: str | None = option("arrow, zarr, or the store of a plug-in (default: that of the cache)", None)
    k: int | None = option("keep this many entries per position, or this many of the stored draws", None)
    precision: str | None = option(
        "store the values as float32, float16, or 4 to 16 bits (default: as in the cache)", None
    )
    worker: str | None = option("I/N: this process is worker I of N (default: from SLURM or torchrun, else 0/1)", None)


@command(app, "convert", ConvertOptions, positional=("cache",))
def convert_cache(options: ConvertOptions, output: Output) -> None:
    """Write a cache again in another store, at another place, or with fewer entries; no teacher is needed."""
    from kdcache.convert import convert

    with output.progress("convert", "shards") as bar:
        summary = convert(**vars(options), on_progress=bar)

    def show(console: Console) -> None:
        shards = summary["shards"]
        console.print(
            f"{summary['cache']}: {shards['committed']} of {shards['planned']} shards "
            f"({shards['by_this_worker']} by this worker), {summary['positions']:,} positions, "
            f"{summary['entries']:,} entries\n"
            f"{summary['bytes']:,} bytes, {summary['bytes_per_position']:.1f} per position"
        )

    output.result(summary, show)


command(app, "export", interop.ExportOptions, positional=("cache",))(interop.export_cache)
command(app, "import", interop.ImportOptions, positional=("source",))(interop.import_cache)
command(app, "audit", interop.AuditOptions, positional=("cache",))(interop.audit_cache)
command(app, "doctor", DoctorOptions)(doctor)

_BAD_INPUT = 2
_KDCACHE = (sys.executable, "-m", "kdcache_cli")
STAGES = (
    "check-data", "make-student", "generate", "dump-teacher", "convert", "verify", "train-student", "evaluate",
)  # fmt: skip
"""Commands that a stage of a recipe may be."""


@command(app, "distil", DistilOptions, positional=("recipe",))
def distil(options: DistilOptions, output: Output) -> None:
    """Run a recipe: a chain of commands, or rounds of it. Stages whose results are there are skipped."""
    from kdcache.errors import StageError
    from kdcache.recipes.recipe import read_recipe
    from kdcache.recipes.run import RecipeRun
    from kdcache_cli.recipe_table import print_listed, print_run

    out = Path(options.out)
    commands = {name: OPTIONS_OF[name] for name in STAGES}
    flags = [*(["--log-json"] if output.log_json else []), *(["--quiet"] if output.quiet else [])]
    stages = read_recipe(Path(options.recipe), options.set, out, commands)
    run = RecipeRun(stages, out, _KDCACHE, flags, heard=output.log_json)
    if options.list:
        run.write_options()
        listed = [
            {
                "name": stage.name, "needs": list(stage.needs), "stands": run.stands(stage),
                "command": ["kdcache", *run.command(stage)],
            }
            for stage in run.stages
        ]  # fmt: skip
        output.result({"out": options.out, "stages": listed}, lambda console: print_listed(console, listed))
        return
    try:
        done = run.run(options.stage, lambda number, total, name: output.note(f"stage {number + 1} of {total}: {name}"))
    except StageError as error:
        sys.stderr.write(error.output if error.code != _BAD_INPUT else "")
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.code) from None
    found = {stage["name"]: run.result(stage["name"]) for stage in done if stage["command"] == "evaluate"}
    value = {"out": options.out, "stages": done, "evaluations": found}
    output.result(value, lambda console: print_run(console, done, found))


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `demo`."""

    out: str = option("folder for everything that the demo writes; must be new or empty", "kdcache-demo")
    budget: float = option("minutes for the whole demo; each stage gets a share of them", 7.0)
    seed: int = option("seed of the order of the corpus, random weights and the order of rows", 0)
    fetch: bool = option("fetch a pre-trained teacher with pip (93 MB, once); without it one is trained here", True)


@command(app, "demo", DemoOptions)
def demo(options: DemoOptions, output: Output) -> None:
    """Dump a pre-trained teacher, inspect its cache, distil 6 of its 30 layers: no GPU, a few minutes."""
    from kdcache.demo.story import play

    with output.progress("demo", "") as bar:
        summary = play(
            options.out, options.budget * 60, options.seed, bar, fetch=options.fetch, on_advice=output.advise
        )

    def show(console: Console) -> None:
        from kdcache_cli.tables import print_demo

        print_demo(console, summary)

    output.result(summary, show)


def run() -> None:
    """Entry point of the `kdcache` script."""
    run_app(app)
