"""Reading the few pickles that hold nothing but arrays, texts and numbers, without unpickling.

A pickle is a program: loading one runs whatever its author wrote. Here its instructions are only *read*, by
``pickletools.genops`` of the standard library, and a fixed handful of them is carried out on plain values. Nothing is
imported, and the three callables that numpy's arrays of bytes need are recognised by name and replaced by code of this
module. Anything else is refused.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

from loda.errors import ConfigError

_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NDARRAY, _DTYPE, _ENCODE = "numpy ndarray", "numpy dtype", "_codecs encode"
_NAMES = (*_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE)
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """One of the names above, standing for itself."""

    text: str


@dataclass
class _Bytes:
    """An array of bytes under construction; ``BUILD`` gives it its values."""

    values: np.ndarray | None = None


_MARK = object()
_BYTE_TYPE = object()


class _RefusedError(Exception):
    """An instruction that such a file has no need of."""


def read_plain_pickle(data: bytes, name: str) -> dict[str, Any]:
    """The dictionary in a pickle of texts, numbers, lists and uint8 arrays (protocol 2, as CIFAR's batches are).

    Args:
        data: the file's content.
        name: how messages call it.

    Returns:
        Values by key; arrays as uint8. Byte texts of Python 2 are given as ``str``, one character a byte.

    Raises:
        ConfigError: damaged, or it has an instruction that such a file doesn't need; nothing of it was executed.
    """
    position: int | None = 0
    machine = _Machine(len(data))
    try:
        for opcode, argument, position in pickletools.genops(data):  # noqa: B007 - the place is for the message
            machine.step(opcode.name, argument)
        found = machine.result()
    except _RefusedError as error:
        raise ConfigError(
            f"{name}: refused at byte {position}: {error}. A batch of CIFAR needs no such thing; the file is not what "
            "it seems to be: get it again from its source. Nothing in it was executed"
        ) from None
    except Exception as error:  # damaged files fail anywhere: short stack, wrong types, bad text
        raise ConfigError(f"{name}: not a CIFAR batch, or damaged ({type(error).__name__}: {error})") from None
    return found


class _Machine:
    """The stack and memo of a pickle, for plain values."""

    def __init__(self, most_bytes: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._left = most_bytes  # that calls may make of texts: more than there are takes the same text twice

    def _spend(self, text: Any) -> None:
        self._left -= len(text) if isinstance(text, str) else 0
        if self._left < 0:
            raise _RefusedError("more bytes than the file has")

    def step(self, code: str, argument: Any) -> None:
        """Carry out one instruction, or refuse it."""
        stack = self.stack
        if code in ("PROTO", "FRAME", "STOP"):
            return
        if code in _VALUES:
            stack.append(argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == "MARK":
            stack.append(_MARK)
        elif code == "EMPTY_DICT":
            stack.append({})
        elif code == "EMPTY_LIST":
            stack.append([])
        elif code == "EMPTY_TUPLE":
            stack.append(())
        elif code in _TUPLES:
            count = _TUPLES[code]
            stack[-count:] = [tuple(stack[-count:])]
        elif code == "TUPLE":
            stack.append(tuple(self._above_mark()))
        elif code in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif code in ("APPENDS", "APPEND"):
            items = self._above_mark() if code == "APPENDS" else [stack.pop()]
            _only(stack[-1], list).extend(items)
        elif code in ("SETITEMS", "SETITEM"):
            items = self._above_mark() if code == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            # Keys are texts and nothing else: hashing tuples of tuples of one tuple takes time without end.
            keys = [_only(key, str) for key in items[::2]]
            _only(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif code == "GLOBAL":
            if argument not in _NAMES:
                raise _RefusedError(f"it asks for {argument!r}")
            stack.append(_Name(argument))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            self._spend(arguments[0])
            stack.append(_call(function, arguments))
        elif code == "BUILD":
            state = stack.pop()
            if isinstance(state, tuple):
                self._spend(state[-1])
            _build(stack[-1], state)
        else:
            raise _RefusedError(f"instruction {code}")

    def _above_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack, and the mark."""
        place = max(index for index, value in enumerate(self.stack) if value is _MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def result(self) -> dict[str, Any]:
        """The one dictionary that is left."""
        (found,) = self.stack
        return {key: value.values if isinstance(value, _Bytes) else value for key, value in _only(found, dict).items()}


def _only(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _RefusedError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _call(function: Any, arguments: Any) -> Any:
    """The three calls that an array of bytes is made with, by our own code."""
    name = function.text if isinstance(function, _Name) else repr(type(function).__name__)
    if name in _RECONSTRUCT and arguments[0] == _Name(_NDARRAY):
        return _Bytes()
    if name == _DTYPE and arguments[0] == "u1":
        return _BYTE_TYPE
    if name == _ENCODE and arguments[1] == "latin1" and type(arguments[0]) is str:
        return arguments[0].encode("latin-1")
    raise _RefusedError(f"a call of {name}")


def _build(target: Any, state: Any) -> None:
    if target is _BYTE_TYPE:
        return  # byte order and the like: meaningless for single bytes
    if not isinstance(target, _Bytes):
        raise _RefusedError(f"state for a {type(target).__name__}")
    _version, shape, kind, fortran, raw = state
    if kind is not _BYTE_TYPE:
        raise _RefusedError("an array of something else than bytes")
    content = raw.encode("latin-1") if type(raw) is str else _only(raw, bytes)
    target.values = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")
