"""Kinds: what a selection is, and the registry of those that exist.

A kind is one class: a frozen dataclass whose fields are its settings, and whose methods say all that is particular to
it. Everything else (select, narrow, the manifest, the codecs, the losses, the command line) asks the kind and never
compares its name. docs/selection.md shows how a new one is written.

`Selection(kind="ipps", k=12)` makes an instance of the class registered as `ipps`, checked when built.

Shapes: n positions, V vocabulary, K width of the targets, n_T temperatures.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from kdcache.entry_form import EntryForm
from kdcache.errors import ConfigError
from kdcache.known import Known
from kdcache.options import TYPES, parse_value, split_settings
from kdcache.registry import Registry
from kdcache.selection.entries import Entries
from kdcache.selection.scan import Scan
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor

COMMON_SETTINGS: dict[str, Any] = {
    "k": 64, "min_k": 1, "top_p": None, "draws": None, "tau": None, "adaptive": False, "force_label": False,
    "sample_temperature": 1.0, "proposal_power": 1.0,
}  # fmt: skip
"""Settings that several kinds know by one name, and the values at which a kind that lacks one takes no notice."""

Uniforms = Callable[[float, int | None], "Tensor"]
"""Fresh random numbers for narrowing: the size narrowed to, and draws a position or None, to `[n]` or `[n, draws]`."""

_KINDS: Registry[type[Selection]] = Registry("kind")

_MISSING = dataclasses.MISSING


def setting(
    default: Any = _MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    always: bool = False,
) -> Any:
    """A field of a kind, checked when the selection is built: its type by the annotation, its value by these bounds.

    Args:
        default: of the setting; without one it must be given.
        least, most: bounds that the value may reach.
        above: a bound that it must exceed.
        always: name it in a manifest even where it has its default.
    """
    bounds = {"least": least, "above": above, "most": most}
    return dataclasses.field(default=default, metadata={**bounds, "always": always})


class _Kind(type):
    """The class of kinds: `Selection(...)` makes the registered kind that it names."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:
        if cls is not Selection:
            return super().__call__(*values, **settings)
        given = dict(zip(("kind", *COMMON_SETTINGS), values, strict=False)) | settings
        found = find_kind(given.pop("kind", "topk"))
        own = {field.name: field for field in _fields(found)}
        for name in [name for name in given if name not in own]:
            value = given.pop(name)
            if name not in COMMON_SETTINGS or value != COMMON_SETTINGS[name]:
                raise ConfigError(f"{name} is {value}, but kind {found.kind} has no such setting")
        for name, field in own.items():
            if field.default is _MISSING and given.get(name) is None:
                raise ConfigError(f"{name} is not given, but kind {found.kind} needs it")
        return found(**given)


class Selection(metaclass=_Kind):
    """The rule that picks entries; docs/selection.md says what each kind is good for.

    Calling it makes a selection of the kind that is named, with the settings of that kind:

        topk    the k largest: k, force_label
        topp    the smallest set with mass top_p: k (the most), min_k (the fewest), top_p, force_label
        sample  draws with replacement: draws, force_label, sample_temperature, proposal_power
        ipps    unbiased, with the least variance for exactly k entries: k, force_label, sample_temperature;
                adaptive, tau (the threshold that all positions of a cache share) and min_k
        full    every token of the vocabulary, the reference

    or of a kind that was registered from outside. Settings are keywords; what a kind leaves out has its default.

    Raises:
        ConfigError: an unknown kind, a setting out of range, or one that the kind does not have.
    """

    kind: ClassVar[str]
    """The name that it is registered by."""

    precision: ClassVar[str] = "6"
    """How values are stored unless something else is asked for: bits a value, `float16` or `float32`."""

    pilot_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that a pilot finds, see `fit`."""

    if TYPE_CHECKING:

        def __init__(self, kind: str = "topk", **settings: Any) -> None: ...

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in _fields(type(self)):
            value = _of_type(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            if value is not None:
                _require_inside(field.name, value, field.metadata)
        self.check()

    def check(self) -> None:
        """Refuse settings that do not go together; types and bounds are checked already.

        Raises:
            ConfigError: naming the setting.
        """

    # What targets of this kind are.

    @property
    def form(self) -> EntryForm:
        """What a codec must know of the entries."""
        raise NotImplementedError

    @property
    def sampled(self) -> bool:
        """Whether weights are unbiased estimates; else entries keep the teacher's probabilities and have a tail."""
        return self.form.sampled

    @property
    def needs_vocabulary(self) -> bool:
        """Whether entries depend on more than the largest log-probabilities, which are all that some engines give."""
        return True

    @property
    def labelled(self) -> bool:
        """Whether the true next token is always among the entries: the setting `force_label`."""
        return bool(getattr(self, "force_label", False))

    @property
    def target_temperature(self) -> float:
        """T of the p_T that weights estimate: the setting `sample_temperature`."""
        return float(getattr(self, "sample_temperature", 1.0))

    def known(self, temperatures: Sequence[float]) -> Known:
        """What targets know that were selected from whole logits."""
        stored = tuple(temperatures)
        if self.sampled:
            return Known(partitions=stored)
        return Known(partitions=stored, tails=stored, tail_sum="complement")

    def width(self, vocab_size: int) -> int:
        """K, the most entries that a position may have over a vocabulary.

        Raises:
            ConfigError: more than the vocabulary has.
        """
        raise NotImplementedError

    # How entries are made of logits.

    def head(self, vocab_size: int) -> int:
        """How many of a position's largest logits the scan must rank."""
        return self.width(vocab_size)

    @property
    def drawn_temperature(self) -> float:
        """T of the distribution whose block masses the scan gives, to draw from."""
        return self.target_temperature

    @property
    def random_shape(self) -> tuple[int, ...] | None:
        """Random numbers that a position takes: None for none, () for one, (D,) for D in a row."""
        return None

    def entries(self, x: Tensor, tile: Scan, temperatures: tuple[float, ...], uniform: Tensor | None) -> SparseTargets:
        """The targets of a tile of positions.

        Args:
            x: `[n, V]` logits.
            tile: their scan, with a head of `head(V)`.
            temperatures: T of the partitions and tails to give.
            uniform: `[n, *random_shape]` float64 in [0, 1).
        """
        raise NotImplementedError

    # What must be known before the first shard.

    @property
    def needs_pilot(self) -> bool:
        """Whether a setting is still to be found from the first positions of a corpus."""
        return False

    def fit(self, logits: Iterable[Tensor]) -> Self:
        """The same selection with its `pilot_settings`, found from tiles `[n, V]` of a pilot's logits."""
        return self

    # How fewer entries are made of entries.

    def fewer(self, k: int) -> Selection:
        """The selection for k entries, or k draws, of targets of this one.

        Raises:
            ConfigError: this kind cannot be narrowed.
        """
        raise ConfigError(f"entries of kind {self.kind} cannot be made fewer")

    def made_from(self, old: Selection) -> bool:
        """Whether targets of this kind can be made of another's."""
        return type(old) is type(self)

    def limits(self, old: Selection, width: int) -> dict[str, float]:
        """The most that each setting may be when made from targets of an old selection, `width` entries wide.

        Raises:
            ConfigError: a setting that cannot be had from the old one at all.
        """
        return {}

    def narrow(self, targets: SparseTargets, entries: Entries, old: Selection, uniforms: Uniforms) -> SparseTargets:
        """Lower the number of entries; everything was checked.

        Args:
            targets: `[n]` positions of the old selection.
            entries: theirs, in order of id.
            old: the selection that made them.
            uniforms: gives random numbers.
        """
        raise ConfigError(f"entries of kind {self.kind} cannot be made fewer")

    # As plain values.

    def to_fields(self) -> dict[str, Any]:
        """Kind and settings as plain values, those left out that have their default.

        `Selection(**fields)` is the same selection. A default is part of the format and never changes.
        """
        values = {field: getattr(self, field.name) for field in _fields(type(self))}
        shown = {f.name: v for f, v in values.items() if v != f.default or f.metadata.get("always")}
        return {"kind": self.kind, **shown}

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> Selection:
        """The selection of a manifest; a setting that is absent has its default.

        Raises:
            ConfigError: an unknown kind or setting, or a value of another type or out of range.
        """
        found = find_kind(fields.get("kind"))
        unknown = sorted(set(fields) - {"kind", *(field.name for field in _fields(found))})
        if unknown:
            raise ConfigError(f"kind {found.kind} has no setting {unknown[0][:40]}")
        return Selection(**fields)

    @staticmethod
    def from_options(kind: str, options: Mapping[str, Any], texts: Sequence[str] = ()) -> Selection:
        """The selection of a command line.

        Args:
            kind: its name.
            options: settings by name; those that are None or False were not given.
            texts: further ones, each `NAME=VALUE`.

        Raises:
            ConfigError: see the class; or a text that is none, or names a setting twice.
        """
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        hints = _hints(find_kind(kind))
        for name, text in split_settings("set", texts).items():
            if name in given:
                raise ConfigError(f"set names {name}, which is given already")
            given[name] = parse_value(name, text, _alternatives(hints.get(name, str)))
        return Selection(kind=kind, **given)

    def same_but_for_pilot(self, other: Selection) -> bool:
        """Whether two selections differ at most in what a pilot finds, where that is still to be found."""
        if type(self) is not type(other):
            return False
        loose = self.pilot_settings if self.needs_pilot or other.needs_pilot else ()
        names = [field.name for field in _fields(type(self)) if field.name not in loose]
        return all(getattr(self, name) == getattr(other, name) for name in names)


K = TypeVar("K", bound=type[Selection])


def register_kind(kind: K) -> K:
    """Make a kind known by its name; a decorator of its class.

    Raises:
        ConfigError: a class that is no dataclass with a name, or lacks a method, or a name that is taken.
    """
    name = getattr(kind, "kind", None)
    if not isinstance(name, str) or not name.isidentifier() or not dataclasses.is_dataclass(kind):
        raise ConfigError(f"{kind.__name__} is no kind of selection: it must be a dataclass with a name in `kind`")
    for method in ("form", "width", "entries"):
        if getattr(kind, method) is getattr(Selection, method):
            raise ConfigError(f"kind {name} does not define {method}")
    _KINDS.register(name, kind)
    return kind


def kind_names() -> tuple[str, ...]:
    """The kinds that are registered now, in the order in which they were."""
    return _KINDS.names()


def find_kind(name: object) -> type[Selection]:
    """The class of a kind.

    Raises:
        ConfigError: there is none of this name.
    """
    return _KINDS.find(name)


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Refuse temperatures that are missing, repeated, or outside 0.01 to 100."""
    if not temperatures or len(set(temperatures)) != len(temperatures):
        raise ConfigError(f"temperatures must be named once each, got {list(temperatures)}")
    for t in temperatures:
        if not 0.01 <= t <= 100:
            raise ConfigError(f"temperature {t:g} is outside 0.01 to 100")


def _fields(kind: type[Selection]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cast(Any, kind))


@functools.cache
def _hints(kind: type[Selection]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _alternatives(hint: Any) -> set[type]:
    return set(typing.get_args(hint)) or {hint}


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """A value of the type that a setting has; a whole number may stand for a number."""
    types = _alternatives(hint)
    if type(value) is int and float in types and int not in types:
        value = float(value)
    if type(value) not in types or (type(value) is float and not math.isfinite(value)):
        wanted = " or ".join(TYPES[each] for each in TYPES if each in types)
        raise ConfigError(f"{name} is {str(value)[:40]}, but must be {wanted}")
    return value


def _require_inside(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    least, above, most = bounds.get("least"), bounds.get("above"), bounds.get("most")
    if (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most):
        return
    words = [f"at least {least:g}" if least is not None else "", f"above {above:g}" if above is not None else ""]
    words.append(f"at most {most:g}" if most is not None else "")
    shown = f"{value:g}" if isinstance(value, float) else value
    raise ConfigError(f"{name} is {shown}, but must be {' and '.join(filter(None, words))}")
