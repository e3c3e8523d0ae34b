"""What every command has in common.

A command is a dataclass of options and a function that takes it. This module makes the command line from the fields
and adds `--config`, `--json`, `--log-json`, `--quiet` and `--plugin`. A `KdcacheError` becomes one sentence on stderr
and exit code 2; any other exception keeps its traceback. SIGTERM and SIGUSR1 end a command as `kdcache.stopping` says.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import re
import sys
import tomllib
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import kdcache
from kdcache import stopping
from kdcache.errors import KdcacheError
from kdcache.plugins import load_plugins
from kdcache_cli.help_groups import EVERY, EXAMPLES, group_of, order_of

if typing.TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a command writes: results to stdout, everything else to stderr.

    Attributes:
        json: whether the result is one JSON object, advice included.
        quiet: whether nothing but errors and that object is printed.
        names: fields of the command's options.
        log_json: whether progress, notes and errors are JSON lines on stderr.
    """

    json: bool
    quiet: bool
    names: Sequence[str] = ()
    log_json: bool = False

    @property
    def console(self) -> Console:
        """The terminal, on stdout."""
        from rich.console import Console

        return Console(quiet=self.quiet, highlight=False)

    def result(self, value: dict[str, Any], show: Callable[[Console], None]) -> None:
        """Print the result: as one JSON object, or by `show`."""
        if self.json:
            print(json.dumps(value, allow_nan=False, default=str))
        else:
            show(self.console)

    def note(self, text: str) -> None:
        """A line about what begins now, on stderr and only on a terminal."""
        if self.log_json and not self.quiet:
            log_line({"note": text})
        elif not self.quiet and sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)

    def advise(self, advice: Sequence[str]) -> None:
        """Print advice on stderr; with --json it is in the object instead."""
        if not self.quiet and not self.json:
            for sentence in advice:
                self._note(sentence)

    def _note(self, sentence: str) -> None:
        text = in_options(sentence, self.names)
        if self.log_json:
            log_line({"note": text})
        else:
            print(f"note: {text}", file=sys.stderr)

    @contextmanager
    def warnings_as_notes(self) -> Iterator[None]:
        """Show what the library itself warns of as a note; other people's warnings as they are."""
        shown, library = warnings.showwarning, Path(kdcache.__file__).parent

        def show(message: Warning | str, category: type[Warning], filename: str, *more: Any) -> None:
            if not Path(filename).is_relative_to(library):
                shown(message, category, filename, *more)
            elif not self.quiet:
                self._note(str(message))

        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            warnings.showwarning = shown

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Callable[..., None]]:
        """How far something is; see `progress.py`. Yields a function of (done, total, note)."""
        from kdcache_cli.progress import no_progress, progress_bar, progress_lines

        if self.quiet or os.environ.get("RANK", "0") != "0":  # of several ranks the first speaks for all
            shown = no_progress()
        elif self.log_json:
            shown = progress_lines(what, unit, log_line)
        else:
            shown = progress_bar(what, unit) if sys.stderr.isatty() else no_progress()
        with shown as update:
            yield update


OPTIONS_OF: dict[str, type] = {}
"""The dataclass of the options of each command."""

ARGUMENTS_OF: dict[str, tuple[str, ...]] = {}
"""The fields of it that are arguments, in their order; all others are options."""


def command(app: typer.Typer, name: str, options: type, *, positional: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Register `function(options, output)` as a command whose options are the fields of a dataclass.

    Args:
        app: where to register it.
        name: the command's name.
        options: a keyword-only dataclass made with `kdcache.options.option`.
        positional: the fields that are arguments rather than options.
    """

    OPTIONS_OF[name], ARGUMENTS_OF[name] = options, positional
    names = [field.name for field in dataclasses.fields(options) if field.name not in positional]

    def register(function: Callable[[Any, Output], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            given.pop("config")
            output = Output(
                json=given.pop("json"), quiet=given.pop("quiet"), names=names, log_json=given.pop("log_json")
            )
            plugins = given.pop("plugin")
            with (
                _command_errors(functools.partial(in_options, names=names), output.log_json),
                output.warnings_as_notes(),
            ):
                load_plugins(plugins)  # before the options are checked: they may name what a plug-in registers
                function(options(**given), output)

        parameters = list(_parameters(name, options, positional))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # type: ignore[attr-defined]
        app.command(name, cls=_Command, epilog=f"Example: {EXAMPLES[name]}")(run)
        return run

    return register


class _Command(TyperCommand):
    """A command whose repeatable options also take several values at once: `--compare A B C`."""

    def get_help_option(self, ctx: Any) -> Any:
        found = super().get_help_option(ctx)
        if found is not None:
            found.rich_help_panel = EVERY  # type: ignore[attr-defined]
        return found

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        return super().parse_args(ctx, list(_one_at_a_time(args, several)))


def _one_at_a_time(words: list[str], several: set[str]) -> Iterator[str]:
    flag, waiting = "", False
    for word in words:
        if word.startswith("-") and not waiting:
            name, given, _ = word.partition("=")
            flag = name if name in several else ""
            waiting = bool(flag) and not given
        elif waiting:
            waiting = False
        elif flag:
            yield flag
        yield word


def _parameters(command: str, options: type, positional: tuple[str, ...]) -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(options)
    groups = {field.name: group_of(command, field.name) for field in dataclasses.fields(options)}

    def place(field: dataclasses.Field[Any]) -> tuple[int, bool]:
        return order_of(groups[field.name]), field.default is not dataclasses.MISSING  # what must be given first

    for field in sorted(dataclasses.fields(options), key=place):
        help_text = field.metadata["help"]
        if field.name in positional:
            kind = typer.Argument(help=help_text)
        else:
            flags = (flag_of(field.name),) if field.name.endswith("_") else ()  # typer makes the others itself
            kind = typer.Option(*flags, help=help_text, rich_help_panel=groups[field.name])
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        hint = hints[field.name]
        if typing.get_origin(hint) is tuple:  # an option that may be given again; typer knows it as a list
            hint = list[typing.get_args(hint)[0]]  # type: ignore[misc]
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, kind]
        )
    shared: tuple[tuple[str, Any, Any, str, dict[str, Any]], ...] = (
        (
            "config",
            Path | None,
            None,
            "TOML file of options; the command line wins",
            {"is_eager": True, "callback": _read_config},
        ),
        ("json", bool, False, "print one JSON object on stdout, and nothing else", {}),
        ("log_json", bool, False, "progress, notes and errors as JSON, a line each, on stderr, for machines", {}),
        ("quiet", bool, False, "print nothing but errors and --json: no progress, no advice", {}),
        ("plugin", list[str], [], "import this Python module or .py file first; may be repeated", {}),
    )
    for name, hint, default, help_text, more in shared:
        flags = () if hint is not bool else (flag_of(name),)
        annotation = Annotated[hint, typer.Option(*flags, help=help_text, rich_help_panel=EVERY, **more)]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a TOML file as defaults, so that options on the command line win."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as TOML: {error}") from None
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = {parameter.name: getattr(parameter, "multiple", False) for parameter in context.command.params}
    values = {f"{key}_" if f"{key}_" in known else key: value for key, value in values.items()}
    for key, value in values.items():
        if known.get(key):
            values[key] = [str(one) for one in value] if isinstance(value, list) else [value]
        elif isinstance(value, list):
            values[key] = ",".join(map(str, value))
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise typer.BadParameter(f"{path} sets {', '.join(unknown)}, which {context.info_name} does not have")
    context.default_map = {**(context.default_map or {}), **values}
    return path


_CTRL_C = 130


def run_app(app: typer.Typer) -> None:
    """Run the command line; a usage error is one sentence and exit code 2, like any other bad input."""
    usage_error = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(_CTRL_C)
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> None:
    """Exit; under torchrun, and after a signal, without the interpreter's teardown.

    A rank sometimes aborts in that teardown although its work is done, and torchrun then kills the others. A command
    that a signal had stopped was seen to wait forever for the lock of imports, which torch takes in the teardown: what
    is stopped inside an import may leave it taken.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or code == stopping.EXIT_CODE:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_VERBS = "is|are|has|needs|names|must|cannot|leaves|makes"


def in_options(message: str, names: Sequence[str]) -> str:
    """A message that names fields, with the options of the command line instead.

    A name with an underscore is taken for a field anywhere in the message. Any other name is taken for one only in
    `NAME=True`, in `NAME=False`, in `NAME="WORD"`, in `A and B exclude each other`, and where the message begins with
    it, or with it and its value, and a verb follows:

        min_k is 3, above k, which is 2      --min-k is 3, above k, which is 2
        steps and epochs exclude each other  --steps and --epochs exclude each other
        use tile_head=False                  use --no-tile-head
        use pack="none"                      use --pack none

    Args:
        message: of an error.
        names: fields of the command's options.
    """
    snakes = [name for name in names if "_" in name]
    if names:
        one = "|".join(map(re.escape, names))
        message = re.sub(rf"(?<![\w./'\"-])({one})=(True|False)\b", _switch, message)
        message = re.sub(rf"(?<![\w./'\"-])({one})=\"([\w-]+)\"", _worded, message)
        message = re.sub(rf"^({one}) and ({one})(?= exclude each other)", _both, message)
    for found, flagged in (
        (rf"^({'|'.join(map(re.escape, names))})(?= (\S+ )?({_VERBS})\b)", names),
        (rf"(?<![\w./'\"-])({'|'.join(map(re.escape, snakes))})(?![\w/'\"]|\.\w)", snakes),
    ):
        if flagged:
            message = re.sub(found, lambda match: flag_of(match[1]), message)
    return re.sub(r"^kind (?=\S+ is not one of)", "--select ", message) if "select" in names else message


def flag_of(name: str) -> str:
    """The option of a field. A field whose name would be a word of Python ends in an underscore: `as_` is --as."""
    return "--" + name.rstrip("_").replace("_", "-")


def _switch(match: re.Match[str]) -> str:
    return ("--" if match[2] == "True" else "--no-") + match[1].replace("_", "-")


def _worded(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')} {match[2]}"


def _both(match: re.Match[str]) -> str:
    return " and ".join("--" + name.replace("_", "-") for name in match.groups())


@contextmanager
def _command_errors(worded: Callable[[str], str], log_json: bool) -> Iterator[None]:
    """One sentence for bad input, a traceback for defects, and a clean end for signals."""
    _set_library_defaults()

    try:
        with stopping.handled():
            yield
    except KdcacheError as error:
        _say("error", worded(str(error)), log_json)
        raise typer.Exit(2) from None
    except (stopping.Stopped, KeyboardInterrupt) as how:
        _say("stopped", "what is finished is kept", log_json)
        raise typer.Exit(stopping.EXIT_CODE if isinstance(how, stopping.Stopped) else _CTRL_C) from None
    except BrokenPipeError:  # whoever read our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def log_line(value: dict[str, Any]) -> None:
    """Write a line for machines, on stderr."""
    print(json.dumps(value, default=str), file=sys.stderr, flush=True)


def _say(kind: str, text: str, log_json: bool) -> None:
    if log_json:
        log_line({kind: text})
    else:
        print(f"{kind}{';' if kind == 'stopped' else ':'} {text}", file=sys.stderr)


def _set_library_defaults() -> None:
    """Set, before the libraries are loaded, what they read from the environment.

    Their bars and advice stay out of our output. Idle OpenMP threads sleep instead of spinning: with
    two processes on two cores, spinning made both sixteen times slower (docs/decisions/0004).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library, level in (("TRANSFORMERS", "error"), ("DATASETS", "critical"), ("HF_HUB", "error")):
        os.environ.setdefault(f"{library}_VERBOSITY", level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bar over the tensors of a .gguf file
    # It warns whoever imports it of kernels that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
