"""Pickled data: numbers, texts, lists, dicts and arrays out of a pickle, without running anything of it.

A pickle is a program for a small machine that may call any function. Here its instructions are read (`pickletools`
parses and executes nothing) and followed by a machine that knows values only: the few functions by which numpy and
torch write arrays are stood in for by functions of this module, and any other name is refused. Nothing is imported by
name and nothing is called that the pickle brings.

Cost: a Python step an instruction; arrays of many numbers are one.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from kdcache.errors import CorpusError

_MOST_STEPS = 50_000_000
_DTYPE = frozenset("biufc")

Function = Callable[..., Any]

_DAMAGE = (
    ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError, MemoryError, OverflowError,
)  # fmt: skip
"""What a pickle raises that no writer of data has made."""


class _Mark:
    """The place on the stack where a list, tuple or dict begins."""


class _Dtype:
    """A numpy dtype that is being rebuilt."""

    def __init__(self, name: Any, *_: Any) -> None:
        made = np.dtype(str(name)) if isinstance(name, str) else np.dtype("O")
        if made.kind not in _DTYPE:
            raise CorpusError(f"a pickled array of type {name!r} is refused: only numbers are read")
        self.dtype = made

    def set_state(self, state: Any) -> None:
        """Take the byte order, which stands second in the state."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A numpy array that is being rebuilt: first without content, then with its state."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def set_state(self, state: Any) -> None:
        """Take (version, shape, dtype, whether Fortran, bytes)."""
        _, shape, dtype, fortran, data = state
        self.array = _shaped(data, dtype, shape, "F" if fortran else "C")


def _shaped(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray | str):
        raise CorpusError("a pickled array has no plain bytes")
    raw = data.encode("latin-1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(raw, dtype.dtype).reshape(tuple(shape), order="F" if order == "F" else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> np.ndarray[Any, Any]:
    return _shaped(data, dtype, shape, order)


def _encode(text: Any, coding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or str(coding).replace("-", "") not in ("latin1", "utf8"):
        raise CorpusError("a pickled text is encoded in a way that no array is")
    return text.encode(str(coding))


def _bytes(data: Any = b"", *coding: Any) -> bytes:
    if isinstance(data, str):
        return _encode(data, *coding)
    if not isinstance(data, bytes | bytearray):  # of a number it would be so many zeros
        raise CorpusError("the pickle makes bytes of something that is none")
    return bytes(data)


NUMPY: dict[str, Function] = {
    "numpy.core.multiarray _reconstruct": _Array,
    "numpy._core.multiarray _reconstruct": _Array,
    "numpy.core.numeric _frombuffer": _from_buffer,
    "numpy._core.numeric _frombuffer": _from_buffer,
    "numpy dtype": _Dtype,
    "numpy ndarray": _Array,
    "_codecs encode": _encode,
    **{f"{module} {name}": _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
}
"""By name in a pickle: what stands in for the functions by which numpy writes an array."""


def read_pickle(data: bytes, functions: dict[str, Function], where: str, stored: Function | None = None) -> Any:
    """The value of a pickle.

    Args:
        data: the pickle.
        functions: what stands in for each name, `module name`, that it may use.
        where: the file, for messages.
        stored: gives what a persistent id stands for; None where there are none.

    Raises:
        CorpusError: it is damaged, or holds anything but data.
    """
    try:
        return _finished(_Machine(functions, stored).run(data), {})
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from None
    except _DAMAGE as error:
        raise CorpusError(f"{where} is damaged, or no data that was saved: {type(error).__name__}") from None


def _finished(value: Any, made: dict[int, Any]) -> Any:
    """A value with the arrays in it that were rebuilt. What stands in it many times is finished once."""
    if isinstance(value, _Array):
        if value.array is None:
            raise CorpusError("a pickled array has no content")
        return value.array
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in made:
        if isinstance(value, dict):
            made[id(value)] = {_finished(key, made): _finished(item, made) for key, item in value.items()}
        else:
            made[id(value)] = type(value)(_finished(item, made) for item in value)
    return made[id(value)]


class _Machine:
    """Follows the instructions of a pickle over a stack of values."""

    def __init__(self, functions: dict[str, Function], stored: Function | None) -> None:
        self._functions, self._stored = functions, stored
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """The value that is left when the program stops."""
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step > _MOST_STEPS:
                raise CorpusError("the pickle has more instructions than any data needs")
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _PUSHED:
                self._stack.append(_PUSHED[name]() if argument is None else argument)
            else:
                step_of = getattr(self, f"_{name.lower()}", None)
                if step_of is None:
                    raise CorpusError(f"the pickle has the instruction {name}, which no data needs")
                step_of(argument)
        raise CorpusError("the pickle does not end")

    def _from_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while not isinstance(self._stack[at], _Mark):
            at -= 1
            if at < 0:
                raise CorpusError("the pickle ends a list that never began")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _proto(self, _: Any) -> None: ...

    def _frame(self, _: Any) -> None: ...

    def _mark(self, _: Any) -> None:
        self._stack.append(_Mark())

    def _put(self, index: Any) -> None:
        self._memo[int(index)] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    _binget = _long_binget = _get

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._from_mark()))

    def _tuple1(self, _: Any) -> None:
        self._take(1)

    def _tuple2(self, _: Any) -> None:
        self._take(2)

    def _tuple3(self, _: Any) -> None:
        self._take(3)

    def _take(self, count: int) -> None:
        found = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(found)

    def _list(self, _: Any) -> None:
        self._stack.append(self._from_mark())

    def _dict(self, _: Any) -> None:
        pairs = self._from_mark()
        self._stack.append(dict(zip(pairs[::2], pairs[1::2], strict=True)))

    def _append(self, _: Any) -> None:
        value = self._stack.pop()
        self._container(list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._from_mark()
        self._container(list).extend(values)

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._container(dict)[key] = value

    def _setitems(self, _: Any) -> None:
        pairs = self._from_mark()
        self._container(dict).update(zip(pairs[::2], pairs[1::2], strict=True))

    def _container(self, kind: type) -> Any:
        found = self._stack[-1]
        if type(found) is not kind:
            raise CorpusError("the pickle fills something that is no list or dict")
        return found

    def _global(self, name: Any) -> None:
        if name not in self._functions:
            raise CorpusError(f"the pickle names {str(name)[:80]}, and only numbers and texts are read")
        self._stack.append(self._functions[name])

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    _newobj = _reduce

    def _call(self, function: Any, arguments: Any) -> Any:
        if not any(function is each for each in self._functions.values()) or type(arguments) is not tuple:
            raise CorpusError("the pickle calls something that is no function of an array")
        return function(*arguments)

    def _build(self, _: Any) -> None:
        state, value = self._stack.pop(), self._stack[-1]
        if not isinstance(value, _Array | _Dtype):
            raise CorpusError("the pickle sets the state of something that is no array")
        value.set_state(state)

    def _binpersid(self, _: Any) -> None:
        if self._stored is None:
            raise CorpusError("the pickle names data that lies elsewhere")
        self._stack.append(self._stored(self._stack.pop()))


_PUSHED: dict[str, Function] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE",
         "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING",
         "BINSTRING", "STRING"),
        str,
    ),
}  # fmt: skip
"""Instructions that push a value: their argument, or what this makes where they have none."""
