"""What a base depends on, as a digest: the name under which it is found again by other processes, and by later runs.

Of a function these are its source, and that of each function and class that it names, as far as they are not a library's; the
plain values among the globals that it names, its defaults, and what it has closed over; the version of Python and of the
libraries that it names; and what the files and directories hold that its caller names.  Of a directory it is its path, and, for
later runs, names, modes, sizes and times of all that is in it.

Two functions with one digest would be given one base, so values that differ must give different ones (``_Parts``).
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import errno
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
from typing import Any, NamedTuple

from snapfs.scan.copying import open_regular
from snapfs.scan.walk import Descriptors, Directory, Entering, path_of

_BY_REPR: frozenset[object] = frozenset(
    {type(None), bool, int, float, complex, str, bytes, decimal.Decimal, uuid.UUID, range, type(...)}
    | {datetime.date, datetime.timedelta, datetime.timezone}
    | {pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath, pathlib.WindowsPath}
)
_BY_ITEMS = frozenset({list, tuple, dict, set, frozenset, functools.partial})

# these, and what else is derived from plain values, by what makes another such value (__reduce_ex__)
_BY_PARTS = (bool, int, float, complex, str, bytes, decimal.Decimal, uuid.UUID, pathlib.PurePath, enum.Enum)
_BY_PARTS_TOO = (datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, list, tuple, dict, set, frozenset)

_Cache = type(functools.lru_cache(len))  # functools.cache gives one, too
_OF_A_METHOD = ("__func__", "fget", "fset", "fdel", "func", "__wrapped__")  # classmethod, property, cached_property …

_LIBRARIES = tuple(
    os.path.realpath(path) + "/"
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


class Unknown(Exception):
    """What a function depends on can't be told: it has closed over something that is no plain value; the text says what."""


def of_function(fill: Callable[..., object], depends: Iterable[str | os.PathLike[str]]) -> str:
    """The digest of what ``fill`` makes; raises Unknown, and OSError where one of the files ``depends`` is missing."""
    parts = _Parts()
    parts.add("snapfs 2", "function", str(os.geteuid()), sys.version.split()[0])
    try:
        parts.value("fill", fill)
    except RecursionError:
        raise Unknown("it has closed over values that are nested too deep") from None
    for path in depends:
        parts.file(os.fspath(path), os.fspath(path))
    return parts.digest()


def of_directory(path: str, *, contents: bool) -> str:
    """The digest of the directory ``path``, and with ``contents`` of the state in which it is.  Raises OSError."""
    parts = _Parts()
    parts.add("snapfs 2", "directory", str(os.geteuid()), path)
    if contents:
        for line in _states(path):
            parts.add(line)
    return parts.digest()


class _Parts:
    """What the digest is of, as one text, of which the parts can be told apart: each string has its length before it, and all
    that consists of others is in parentheses (``group``).

    Plain values that are equal give equal text, whether they are one object or several.  Functions and classes come once, and
    then as the number of the place where they came."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, tuple[object, int]] = {}  # by id: they are kept, or another could get the id
        self._open: dict[int, int] = {}  # the containers around the value that is added, by id: how many are around each
        self._whole: dict[tuple[int, bool], tuple[object, str]] = {}  # digests of containers without any of those
        self._references = 0  # to what is in _seen or _open

    def add(self, *texts: str) -> None:
        for text in texts:
            encoded = text.encode(errors="surrogateescape")
            self._hash.update(b"%d:" % len(encoded) + encoded)

    def digest(self) -> str:
        return self._hash.hexdigest()[:16]

    @contextlib.contextmanager
    def group(self, *texts: str) -> Iterator[None]:
        self._hash.update(b"(")
        self.add(*texts)
        yield
        self._hash.update(b")")

    def file(self, name: str, path: str) -> None:
        """Add what the file or directory ``path`` holds, of a link what it leads to."""
        with self.group("file", name):
            for line in _contents(path):
                self.add(line)

    def value(self, name: str, value: object, *, named: bool = False) -> None:
        """Add ``value``.  One that is no plain value raises Unknown, unless the source only names it (``named``)."""
        kind = type(value)
        with self.group(name, kind.__module__, kind.__qualname__):
            if kind in _BY_REPR:
                self.add(repr(value))
            elif kind in _BY_ITEMS or isinstance(value, _BY_PARTS + _BY_PARTS_TOO):
                self.container(name, value, named)
            elif isinstance(value, types.ModuleType):
                self.module(value)
            elif isinstance(value, types.BuiltinFunctionType):
                self.add(str(value.__module__), value.__qualname__)
                self.value("self", value.__self__, named=named)
            elif isinstance(value, types.MethodType):
                self.value("function", value.__func__)
                self.value("self", value.__self__, named=named)
            elif not self.again(value):
                self.thing(name, value, named)

    def again(self, value: object) -> bool:
        """Whether ``value`` has come before; if so, the number of that place is added."""
        self._references += 1
        if id(value) in self._seen:
            self.add("again", str(self._seen[id(value)][1]))
            return True
        self._seen[id(value)] = value, len(self._seen)
        return False

    def container(self, name: str, value: object, named: bool) -> None:
        """Add what consists of others: as the digest of these, for one may be in many places of another."""
        if id(value) in self._open:
            self._references += 1
            self.add("inside", str(self._open[id(value)]))
            return
        if (id(value), named) not in self._whole:
            self._open[id(value)] = len(self._open)
            references = self._references
            found = self.apart(lambda: self.items(name, value, named))
            del self._open[id(value)]
            if self._references != references:
                self.add(found)
                return
            self._whole[id(value), named] = value, found
        self.add(self._whole[id(value), named][1])

    def apart(self, add: Callable[[], None]) -> str:
        """The digest of what ``add`` adds."""
        around, self._hash = self._hash, hashlib.sha256()
        try:
            add()
            return self._hash.hexdigest()
        finally:
            self._hash = around

    def items(self, name: str, value: object, named: bool) -> None:
        """Add what ``value`` consists of."""
        if isinstance(value, functools.partial) and type(value) is functools.partial:
            self.value("function", value.func)
            self.value("args", value.args, named=named)
            self.value("keywords", value.keywords, named=named)
            self.value("attributes", vars(value), named=named)
        elif isinstance(value, list | tuple) and type(value) in _BY_ITEMS:
            for item in value:
                self.value("item", item, named=named)
        elif isinstance(value, dict) and type(value) is dict:
            for key, item in value.items():
                self.value("key", key, named=named)
                self.value("item", item, named=named)
        elif isinstance(value, set | frozenset) and type(value) in _BY_ITEMS:
            self.add(*sorted(self.member(item, named) for item in value))
        else:
            self.parts(name, value, named)

    def member(self, item: object, named: bool) -> str:
        """The digest of an item of a set, as if it was the first: the order of the others is another in each process."""
        seen, self._seen = self._seen, dict(self._seen)
        try:
            return self.apart(lambda: self.value("item", item, named=named))
        finally:
            self._seen = seen

    def parts(self, name: str, value: object, named: bool) -> None:
        """Add a value that is derived from a plain one: its class, and what copy and pickle make another of."""
        if (kind := type(value)) not in _BY_ITEMS:
            self.value("class", kind, named=True)
        try:
            made = value.__reduce_ex__(4)
        except Exception:
            made = None
        if not isinstance(made, str | tuple):
            if not named:
                raise Unknown(f"{name} is a {kind.__qualname__}, of which no copy can be made")
            return
        if isinstance(made, str):  # a name in its module
            self.add(made)
            return
        more: tuple[Any, ...] = (*made[1:], None, None, None)
        arguments, state, listed, keyed = more[:4]
        with self.group("arguments"):
            for argument in arguments[1:] if arguments and arguments[0] is kind else arguments:
                self.value("item", argument, named=named)
        self.value("state", state, named=named)
        with self.group("items"):
            for item in listed or ():
                self.value("item", item, named=named)
        with self.group("keys"):
            for pair in keyed or ():
                self.value("item", pair, named=named)

    def thing(self, name: str, value: object, named: bool) -> None:
        """Add what is told by its source."""
        if isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, type):
            self.class_(value)
        elif (named or isinstance(value, _Cache)) and isinstance(
            wrapped := getattr(value, "__wrapped__", None), types.FunctionType
        ):
            self.value("wrapped", wrapped, named=named)
        elif not named:
            raise Unknown(f"{name} is a {type(value).__qualname__}, and no plain value")

    def function(self, function: types.FunctionType, *, named: bool = False) -> None:
        """Add a function; ``named`` goes for what it has closed over, as for a value."""
        self.add(function.__module__ or "", function.__qualname__)
        if self.source(function):
            self.named_by(function)
        with self.group("closure"):
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                try:
                    contents = cell.cell_contents
                except ValueError:  # it is empty
                    self.add(name)
                else:
                    self.value(name, contents, named=named)
        self.value("defaults", function.__defaults__, named=named)
        self.value("keywords", function.__kwdefaults__, named=named)
        self.value("attributes", {key: value for key, value in vars(function).items() if key != "__wrapped__"}, named=True)
        if wrapped := getattr(function, "__wrapped__", None):
            self.value("wrapped", wrapped, named=named)

    def named_by(self, function: types.FunctionType) -> None:
        """Add what the names in the code of ``function`` stand for, in its own module and in those that it names."""
        with self.group("names"):
            self.names_in(function)

    def names_in(self, function: types.FunctionType) -> None:
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
        """Add a class: its source, those that it is made of, what its methods name, and its attributes: what it was made with
        may have been another."""
        if not self.source(value):
            return
        for base in value.__bases__:
            self.value("base", base, named=True)
        for name, attribute in sorted(vars(value).items()):
            functions = [
                each
                for each in (attribute, *(getattr(attribute, part, None) for part in _OF_A_METHOD))
                if isinstance(each, types.FunctionType)
            ]
            if not functions and name.startswith("__"):  # Python keeps something there, at any time
                continue
            with self.group("attribute", name):
                for each in functions:
                    if each.__module__ == value.__module__ and not self.again(each):
                        self.function(each, named=True)
                if not functions:
                    self.value("value", attribute, named=True)

    def source(self, thing: type | types.FunctionType) -> bool:
        """Add the source of ``thing``, or, of a library's, its name and version: False then."""
        module = sys.modules.get(thing.__module__)
        if module is not None and _is_library(module):
            self.add(thing.__qualname__)
            self.module(module)
            return False
        try:
            self.add("source", inspect.getsource(thing))
        except (OSError, TypeError):
            if isinstance(thing, types.FunctionType):
                self.code(thing.__code__)
        else:
            if isinstance(thing, types.FunctionType) and thing.__name__ == "<lambda>":  # there may be others on its line
                self.code(thing.__code__)
        return True

    def code(self, code: types.CodeType) -> None:
        with self.group("code", code.co_code.hex(), code.co_exceptiontable.hex(), str(code.co_flags)):
            self.add(str(code.co_argcount), str(code.co_posonlyargcount), str(code.co_kwonlyargcount))
            for names in (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars):
                with self.group("names", *names):
                    pass
            for constant in code.co_consts:
                if isinstance(constant, types.CodeType):
                    self.code(constant)
                else:
                    self.value("constant", constant)

    def module(self, module: types.ModuleType) -> None:
        top = sys.modules.get(module.__name__.partition(".")[0], module)
        self.add(module.__name__, str(getattr(top, "__version__", "")))
        if not _is_library(module) and (file := getattr(module, "__file__", None)):
            self.file("module", file)  # which may be elsewhere another time


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that ``code`` and the functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_library(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or os.path.realpath(file).startswith(_LIBRARIES)


class _Found(NamedTuple):
    """What is at ``path``, which begins with a slash, below the top ("" for that itself): ``name`` in the directory open as
    ``parent``; without one ``name`` is a path."""

    path: str
    status: os.stat_result
    name: str
    parent: int | None

    def read_link(self) -> str:
        return os.readlink(self.name, dir_fd=self.parent)

    def digest(self) -> str:
        """Of a regular file.  Raises OSError where it is one no more: to read a FIFO may take for ever."""
        fd = open_regular(self.name, self.parent)
        with open(fd, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(path: str) -> Iterator[_Found]:
    """``path`` and all that is in it, in order; each is valid until the next step.  However deep the directories are, they cost
    no more than a few descriptors.  Raises OSError."""
    status = os.lstat(path)
    yield _Found("", status, path, None)
    if not stat.S_ISDIR(status.st_mode):
        return
    with Entering() as descriptors:
        top = Directory(path)
        shown, way = "", [(top, iter(_listed(top, descriptors)), 0)]
        while way:
            directory, names, length = way[-1]
            shown = shown[:length]
            for name in names:
                parent = descriptors.get(directory)
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                yield _Found(f"{shown}/{name}", status, name, parent)
                if stat.S_ISDIR(status.st_mode):
                    shown, below = f"{shown}/{name}", Directory(name, directory)
                    way.append((below, iter(_listed(below, descriptors)), len(shown)))
                    break
            else:
                way.pop()
                descriptors.close(directory)


def _listed(directory: Directory, descriptors: Descriptors) -> list[str]:
    fd = descriptors.get(directory)
    if fd < 0:
        raise NotADirectoryError(errno.ENOTDIR, "It was a directory, and is none any more", path_of(directory))
    return sorted(os.listdir(fd))


def _contents(path: str) -> Iterator[str]:
    """What ``path`` holds, which may be a link to it; links in there are not followed.  Raises OSError."""
    for found in _walk(os.path.realpath(path, strict=True)):
        mode = found.status.st_mode
        yield f"{found.path} {mode:o}"
        if stat.S_ISREG(mode):
            yield found.digest()
        elif stat.S_ISLNK(mode):
            yield found.read_link()


def _states(path: str) -> Iterator[str]:
    for found in _walk(path):
        status = found.status
        time = "" if stat.S_ISDIR(status.st_mode) else f" {status.st_size} {status.st_mtime_ns}"
        yield f"{found.path} {status.st_mode:o}{time}"
        if stat.S_ISLNK(status.st_mode):
            yield found.read_link()
