"""What a base depends on, as a digest: the name under which it is found again by other processes, and by later runs.

Of a function these are its source, and that of each function and class that it names, as far as they are not a library's; the
plain values among the globals that it names, its defaults, and what it has closed over; the version of Python and of the
libraries that it names; and what the files and directories hold that its caller names.  Of a directory it is its path, and, for
later runs, names, modes, sizes and times of all that is in it.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import hashlib
import inspect
import os
import pathlib
import stat
import sys
import sysconfig
import types
import uuid
from collections.abc import Callable, Iterable, Iterator

_PLAIN = (type(None), bool, int, float, complex, str, bytes, pathlib.PurePath, decimal.Decimal, uuid.UUID)
_PLAIN_TOO = (datetime.date, datetime.time, datetime.timedelta, datetime.timezone, enum.Enum, range, type(...))

_LIBRARIES = tuple(
    os.path.realpath(path) + "/"
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


class Unknown(Exception):
    """What a function depends on can't be told: it has closed over something that is no plain value."""


def of_function(fill: Callable[..., object], depends: Iterable[str | os.PathLike[str]]) -> str:
    """The digest of what ``fill`` makes; raises Unknown, and OSError where one of the files ``depends`` is missing."""
    parts = _Parts()
    parts.add("snapfs 1", str(os.geteuid()), sys.version.split()[0])
    parts.value("fill", fill)
    for path in depends:
        parts.add("file", os.fspath(path))
        for line in _contents(os.fspath(path)):
            parts.add(line)
    return parts.digest()


def of_directory(path: str, *, contents: bool) -> str:
    """The digest of the directory ``path``, and with ``contents`` of the state in which it is.  Raises OSError."""
    parts = _Parts()
    parts.add("snapfs 1", str(os.geteuid()), path)
    if contents:
        for line in _states(path):
            parts.add(line)
    return parts.digest()


class _Parts:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, object] = {}  # by id: they are kept, or another could get the id

    def add(self, *texts: str) -> None:
        for text in texts:
            encoded = text.encode(errors="surrogateescape")
            self._hash.update(b"%d:" % len(encoded) + encoded)

    def digest(self) -> str:
        return self._hash.hexdigest()[:16]

    def value(self, name: str, value: object, *, named: bool = False) -> None:
        """Add ``value``.  One that is no plain value raises Unknown, unless the source only names it (``named``)."""
        self.add(name, type(value).__qualname__)
        if isinstance(value, _PLAIN + _PLAIN_TOO):
            self.add(repr(value))
        elif isinstance(value, types.ModuleType):
            self.module(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self.add(value.__qualname__)
        elif id(value) in self._seen:
            self.add("again")
        else:
            self._seen[id(value)] = value
            self.thing(name, value, named)

    def thing(self, name: str, value: object, named: bool) -> None:
        if isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, types.MethodType):
            self.value("function", value.__func__)
            self.value("self", value.__self__, named=named)
        elif isinstance(value, functools.partial):
            self.value("function", value.func)
            self.value("args", value.args, named=named)
            self.value("keywords", value.keywords, named=named)
        elif isinstance(value, list | tuple):
            for item in value:
                self.value("item", item, named=named)
        elif isinstance(value, dict):
            for key, item in value.items():
                self.value("key", key, named=named)
                self.value("item", item, named=named)
        elif isinstance(value, set | frozenset):
            self.add(*sorted(map(repr, value)))
        elif isinstance(value, type):
            self.class_(value)
        elif isinstance(wrapped := getattr(value, "__wrapped__", None), types.FunctionType):  # functools.cache
            self.value("wrapped", wrapped, named=named)
        elif not named:
            raise Unknown(name)

    def function(self, function: types.FunctionType) -> None:
        self.add(function.__module__ or "", function.__qualname__)
        if self.source(function):
            self.named_by(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.value(name, cell.cell_contents)
            except ValueError:  # it is empty
                self.add(name)
        self.value("defaults", function.__defaults__)
        self.value("keywords", function.__kwdefaults__)
        if wrapped := getattr(function, "__wrapped__", None):
            self.value("wrapped", wrapped)

    def named_by(self, function: types.FunctionType) -> None:
        """Add what the names in the code of ``function`` stand for, in its own module and in those that it names."""
        names = sorted(set(_names(function.__code__)))
        scopes, met = [function.__globals__], {id(function.__globals__)}
        while scopes:
            scope = scopes.pop()
            for name in names:
                value = scope.get(name)
                other = scope is not function.__globals__  # a method of some object may be called as a value there
                if name not in scope or (other and not isinstance(value, types.FunctionType | types.ModuleType | type)):
                    continue
                self.value(name, value, named=True)
                if isinstance(value, types.ModuleType) and not _is_library(value) and id(vars(value)) not in met:
                    met.add(id(vars(value)))
                    scopes.append(vars(value))

    def class_(self, value: type) -> None:
        """Add the source of a class, and of those that it is made of, and what its methods name."""
        if not self.source(value):
            return
        for base in value.__bases__:
            self.value("base", base, named=True)
        for attribute in vars(value).values():
            for method in (
                attribute,
                *(getattr(attribute, name, None) for name in ("__func__", "fget", "fset", "__wrapped__")),
            ):
                if isinstance(method, types.FunctionType) and method.__module__ == value.__module__:
                    self.named_by(method)

    def source(self, thing: type | types.FunctionType) -> bool:
        """Add the source of ``thing``, or, of a library's, its name and version: False then."""
        module = sys.modules.get(thing.__module__)
        if module is not None and _is_library(module):
            self.add(thing.__qualname__)
            self.module(module)
            return False
        try:
            self.add(inspect.getsource(thing))
        except (OSError, TypeError):
            if isinstance(thing, type):
                raise Unknown(thing.__qualname__) from None
            self.code(thing.__code__)
        else:
            if isinstance(thing, types.FunctionType) and thing.__name__ == "<lambda>":  # there may be others on its line
                self.code(thing.__code__)
        return True

    def code(self, code: types.CodeType) -> None:
        self.add(code.co_code.hex(), *code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.code(constant)
            else:
                self.value("constant", constant)

    def module(self, module: types.ModuleType) -> None:
        top = sys.modules.get(module.__name__.partition(".")[0], module)
        self.add(module.__name__, str(getattr(top, "__version__", "")))
        if not _is_library(module) and (file := getattr(module, "__file__", None)):
            for line in _contents(file):
                self.add(line)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that ``code`` and the functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_library(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or os.path.realpath(file).startswith(_LIBRARIES)


def _walk(path: str) -> Iterator[str]:
    """``path`` and all that is in it, in order."""
    yield path
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for name in sorted(os.listdir(path)):
            yield from _walk(f"{path}/{name}")


def _contents(path: str) -> Iterator[str]:
    for found in _walk(path):
        mode = os.stat(found).st_mode if found == path else os.lstat(found).st_mode
        yield f"{found[len(path) :]} {mode:o}"
        if stat.S_ISREG(mode):
            with open(found, "rb") as file:
                yield hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(mode):
            yield os.readlink(found)


def _states(path: str) -> Iterator[str]:
    for found in _walk(path):
        status = os.lstat(found)
        time = "" if stat.S_ISDIR(status.st_mode) else f" {status.st_size} {status.st_mtime_ns}"
        yield f"{found[len(path) :]} {status.st_mode:o}{time}"
        if stat.S_ISLNK(status.st_mode):
            yield os.readlink(found)
