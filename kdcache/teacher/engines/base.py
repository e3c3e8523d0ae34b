"""The protocol of an engine, which runs a teacher, and the registry of engines by name.

An engine is given packed rows. For their labelled slots, in order, it gives one of three things:

    HiddenStates   the final hidden states, and the head that turns them into logits
    Logits         the logits themselves
    SparseTargets  ready entries, from an engine that selects by itself or is given only the top k

Everything after that is done once for all engines, by `OpenedTeacher`: tiles of the head, the selection, the checks,
the search for the document whose logits are bad, and the writing. What an engine cannot know it says in `knows`, and
`require_answerable` refuses a request that needs more, before anything runs.

A new engine is one class and one call:

    class MyEngine(Engine):
        name = "mine"

        def __init__(self, spec, folder, rows): ...           # load the teacher
        def run(self, batch, request): return EngineOutput(positions=Logits(...))

    register_engine(MyEngine)

Importing this costs nothing: torch is not loaded.

Shapes: N labelled slots of a batch, S slots of a batch, n of them, D hidden, V the vocabulary of the head (padding
included).
"""

from __future__ import annotations

import dataclasses
import importlib
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kdcache.errors import ConfigError, EngineError
from kdcache.options import parse_settings
from kdcache.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from kdcache.known import Known
    from kdcache.position_filter import PositionFilter
    from kdcache.rows import RowSpec
    from kdcache.selection import Selection
    from kdcache.store.manifest import Manifest
    from kdcache.targets import SparseTargets
    from kdcache.teacher.engines.batch import Batch

HIDDEN = "hidden:-1"
"""The extra array that engines of hidden states offer: what the head is given, for each token."""

_MOST_LISTED = 6
"""Names of extras that a message lists."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Which teacher is run, by which engine, and how.

    Attributes:
        model: folder, .gguf file or hub name; of a served teacher, the URL of its server.
        engine: name of a registered engine.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        device_map: `auto` spreads the teacher over several GPUs.
        dtype: `auto` (float32 on a CPU, the checkpoint's elsewhere), `float32`, `bfloat16` or `float16`.
        batch_rows: rows a forward pass.
        tile_head: whether the output head runs over tiles of positions.
        attn_implementation: attention of the teacher, by the engine's name for it; None for the engine's choice.
        tensor_parallel: GPUs (or processes) that hold one teacher together, each a part of every layer.
        tokenizer: folder or hub name of the tokenizer, for an engine that is given no model folder.
        engine_python: the Python that an engine runs its teacher in, where it does so in another environment.
        engine_set: settings of the engine, each `NAME=VALUE`; see `Engine.settings`.
    """

    model: str
    engine: str = "transformers"
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    batch_rows: int = 8
    tile_head: bool = True
    attn_implementation: str | None = None
    tensor_parallel: int = 1
    tokenizer: str | None = None
    engine_python: str | None = None
    engine_set: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TeacherFiles:
    """What is known of a teacher before it is loaded.

    Attributes:
        folder: local folder (or .gguf file) of its tokenizer, and of the model itself where the engine loads it.
        context: positions that it was made for; None if unknown.
        sha256: its fingerprint: equal for equal teachers. Called when it is needed, as weights may have to be hashed.
    """

    folder: Path
    context: int | None
    sha256: Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class TargetRequest:
    """What is asked of a teacher for each labelled slot.

    Attributes:
        selection: which entries are kept.
        temperatures: the T whose partition and tail are kept.
        seed: decides, with shard, row and slot, what a sampling selection draws.
        extras: names of further arrays, one vector a token.
    """

    selection: Selection
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0
    extras: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """What a cache asks of its teacher: not what the corpus brings."""
        from kdcache.extras import WRITER_LOGP

        return cls(
            selection=manifest.rule, temperatures=manifest.temperatures, seed=manifest.seed,
            extras=tuple(name for name in manifest.extras if name != WRITER_LOGP),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineKnowledge:
    """What an engine knows of the teacher's distribution at a slot.

    Attributes:
        whole_vocabulary: whether it gives every logit (or selects from them); otherwise only the most likely tokens.
        temperatures: at which T; None for every T.
        entropy: whether the entropy of the whole distribution is known.
        label_logprob: whether the log-probability of the true next token is known.
    """

    whole_vocabulary: bool = True
    temperatures: tuple[float, ...] | None = None
    entropy: bool = True
    label_logprob: bool = True

    def known(self, selection: Selection, temperatures: tuple[float, ...]) -> Known:
        """What the targets of a selection know that this engine makes."""
        found = selection.known(temperatures)
        found = dataclasses.replace(
            found, entropy=found.entropy and self.entropy, label_logprob=found.label_logprob and self.label_logprob
        )
        return found if self.whole_vocabulary or not found.tails else dataclasses.replace(found, tail_sum="remainder")


@dataclass(frozen=True)
class HiddenStates:
    """Final hidden states of the labelled slots.

    Attributes:
        states: `[N, D]`, what the head is given.
        head: turns `[n, D]` into logits `[n, V]`.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.states)

    def logits(self, part: slice) -> Tensor:
        """`[n, V]` the logits of some of the positions."""
        return self.head(self.states[part])


@dataclass(frozen=True)
class Logits:
    """Logits of the labelled slots.

    Attributes:
        values: `[S, V]`, any floating dtype.
        index: `[N]` the row of `values` of each labelled slot; None if `values` is `[N, V]` already.
    """

    values: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values if self.index is None else self.index)

    def logits(self, part: slice) -> Tensor:
        """`[n, V]` the logits of some of the positions."""
        return self.values[part if self.index is None else self.index[part]]


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """What an engine gives for a batch.

    Attributes:
        positions: of its N labelled slots, in order. `SparseTargets` must be what the request asks for, on the CPU.
        finite: beside `SparseTargets`, `[N]` whether all logits of a slot were finite; None where they are known to be.
        extras: `[tokens, width]` for each name of the request, one vector for each token of the batch, row after row.
    """

    positions: HiddenStates | Logits | SparseTargets
    finite: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Engine(ABC):
    """Runs a teacher. Use it as a context manager, or call `close`.

    A subclass is built with (spec: TeacherSpec, folder: Path, rows: RowSpec): the teacher's options, the local folder
    of its files, and the shape of the rows that it will be given. It raises a `KdcacheError` for a teacher that it
    cannot run.

    Attributes:
        name: under which it is registered.
        knows: what it knows of the teacher's distribution. Asked of the class first, before a teacher is loaded; an
            engine that learns more of it when it opens sets it on itself, and is asked again.
        device: where its logits come out, for example `cpu` or `cuda:0`.
        parallel_ranks: whether `tensor_parallel` means so many ranks of torchrun, each with the engine; otherwise it is
            the engine's own matter.
        lookahead: batches that it is given before the first of them is waited for: 1 for a device that works by itself.
        padded_vocab_size: V of its head, which tiles are sized by; None for the vocabulary of the rows.
        settings: what `engine_set` may set, by name, with the default, whose type is the setting's.
        own_python: whether it can run its teacher in the Python of `engine_python`.
    """

    name: ClassVar[str]
    knows: EngineKnowledge = EngineKnowledge()
    parallel_ranks: ClassVar[bool] = False
    device: Any = "cpu"
    lookahead: int = 0
    padded_vocab_size: int | None = None
    settings: ClassVar[Mapping[str, Any]] = {}
    own_python: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None: ...

    @abstractmethod
    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        """The teacher's output at the labelled slots of a batch.

        An engine may take the batch as padded rows (`batch.tokens`, `batch.position_ids`) or one piece at a time
        (`batch.pieces()`). One that selects by itself follows `request` and `batch.keys`. It need not wait for its
        device.
        """

    def logits(self, batch: Batch) -> HiddenStates | Logits:
        """The logits of the labelled slots, or what they come of; an engine that selects in `run` may give them here.

        Raises:
            EngineError: it gives ready entries only.
        """
        from kdcache.selection import Selection

        given = self.run(batch, TargetRequest(selection=Selection())).positions
        if isinstance(given, HiddenStates | Logits):
            return given
        raise EngineError(f"the engine {self.name} gives entries, and no logits of the whole vocabulary")

    def prepare(self, request: TargetRequest) -> None:  # noqa: B027 - most engines know all when they are open
        """Called once before the first batch, with what will be asked: refuse what only the open teacher knows.

        Raises:
            KdcacheError: the teacher cannot give it.
        """

    @classmethod
    def teacher_files(cls, spec: TeacherSpec) -> TeacherFiles:
        """Where the tokenizer of a teacher is, and what is known of it before it is loaded.

        Raises:
            KdcacheError: there is no such teacher.
        """
        from kdcache.pretrained import context_length, fingerprint, model_folder, read_config

        cls.settings_of(spec)
        require_defaults(cls.name, spec, tokenizer="that of the teacher's folder is taken")
        if not cls.own_python:
            require_defaults(cls.name, spec, engine_python="it runs in this Python")
        folder = model_folder(spec.model, "teacher")
        return TeacherFiles(
            folder=folder, context=context_length(read_config(folder)), sha256=lambda: fingerprint(folder)
        )

    @classmethod
    def settings_of(cls, spec: TeacherSpec) -> dict[str, Any]:
        """Every setting of the engine: what `engine_set` says, and the defaults of the others.

        Raises:
            ConfigError: a setting that the engine does not have, or a value of another type.
        """
        given = parse_settings("engine_set", spec.engine_set, {name: type(v) for name, v in cls.settings.items()})
        return {**cls.settings, **given}

    @classmethod
    def extra_widths(cls, folder: Path) -> dict[str, int]:  # noqa: ARG003 - for engines that offer some
        """Width of each extra array that it can give for a teacher, by name, before the teacher is loaded."""
        return {}

    def describe(self) -> dict[str, Any]:
        """How the numbers are made, for the commit: equal numbers are promised for equal values only."""
        return {"machine": platform.machine()}

    def close(self) -> None:  # noqa: B027 - an engine may hold nothing
        """Give back what it holds; called once, also after an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


_ENGINES: Registry[str | type[Engine]] = Registry("engine")
"""By name: the class, or where it is, so that an engine of this package is imported only when it is used."""

_ENGINES.register("transformers", "kdcache.teacher.engines.transformers:TransformersEngine")
_ENGINES.register("vllm", "kdcache.teacher.engines.vllm:VllmEngine")
_ENGINES.register("server", "kdcache.teacher.engines.server:ServerEngine")


def register_engine(engine: type[Engine]) -> type[Engine]:
    """Make an engine known under its `name`; usable as a decorator.

    Raises:
        ConfigError: the name is taken, or cannot be a name.
    """
    _ENGINES.register(getattr(engine, "name", ""), engine)
    return engine


def require_engine(name: str) -> None:
    """Refuse a name under which no engine is registered.

    Raises:
        ConfigError: naming those that are.
    """
    _ENGINES.find(name)


def find_engine(name: str) -> type[Engine]:
    """The engine of a name.

    Raises:
        ConfigError: there is none.
    """
    found = _ENGINES.find(name)
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, type)
    return found


def ranks_of(spec: TeacherSpec) -> int:
    """How many ranks of torchrun hold this teacher together.

    Raises:
        ConfigError: no such engine.
    """
    return spec.tensor_parallel if spec.tensor_parallel > 1 and find_engine(spec.engine).parallel_ranks else 1


def require_defaults(engine: str, spec: TeacherSpec, **options: str) -> None:
    """Refuse options that an engine takes no notice of.

    Args:
        engine: its name.
        spec: the options.
        options: names of such, each with what stands in its place.

    Raises:
        ConfigError: naming one that was given.
    """
    plain = TeacherSpec(model=spec.model)
    for name, instead in options.items():
        if getattr(spec, name) != getattr(plain, name):
            raise ConfigError(f"{name} is not for the engine {engine}: {instead}")


def require_answerable(
    engine: type[Engine] | Engine, request: TargetRequest, positions: PositionFilter | None = None
) -> None:
    """Refuse a request that needs more than an engine knows.

    Args:
        engine: its class, before a teacher is loaded, or the engine itself.
        request: what is asked.
        positions: which labelled slots are to carry a target.

    Raises:
        ConfigError: naming the engine, and what it does not know.
    """
    knows, selection = engine.knows, request.selection

    def refuse(what: str, why: str) -> None:
        raise ConfigError(f"{what} needs {why}, which the engine {engine.name} does not know")

    if not knows.whole_vocabulary and selection.needs_vocabulary:
        forced = ", with force_label," if selection.labelled else ""
        refuse(f"the selection {selection.kind}{forced}", "the whole vocabulary")
    unknown = [t for t in request.temperatures if knows.temperatures is not None and t not in knows.temperatures]
    if unknown:
        refuse(f"the temperature {unknown[0]:g}", "the partition at that temperature")
    if positions is not None and positions.above is not None and not knows.entropy:
        refuse(f"positions {positions.rule}", "the teacher's entropy")


def require_extras(engine: type[Engine], folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """The width of each extra array that is asked for.

    Raises:
        ConfigError: one is named twice, or the engine does not offer it; the message lists those that it does.
    """
    if not names:
        return {}
    offered = engine.extra_widths(folder)
    for name in names:
        if name not in offered:
            raise ConfigError(
                f"extra is {name}, but the engine {engine.name} offers {_listed(list(offered)) or 'no extra'}"
            )
    if len(set(names)) != len(names):
        raise ConfigError(f"extra names one array twice: {', '.join(names)}")
    return {name: offered[name] for name in names}


def _listed(names: list[str]) -> str:
    """Names with commas; of many the first and the last."""
    return ", ".join(names if len(names) <= _MOST_LISTED else [*names[:3], "...", names[-1]])
