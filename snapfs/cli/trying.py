"""``snapfs run --from``: a workspace for one command, and what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import suppress

from snapfs import names
from snapfs.cli import table, verb
from snapfs.cli.adopting import DRAFT, Adoption
from snapfs.cli.cutoff import tidied
from snapfs.cli.ending import end_all, once_empty
from snapfs.cli.inside import WAYS, work_inside
from snapfs.cli.place import find_tree
from snapfs.cli.prepare import make
from snapfs.cli.refusal import BUSY, TAKEN, USAGE, Refusal
from snapfs.cli.source import Source
from snapfs.labels import SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snapfs.cli.grammar import Given
    from snapfs.cli.place import MountedTree

_PASSED_ON = (signal.SIGTERM, signal.SIGHUP)  # to the command; what a terminal sends reaches it anyway
_IGNORED = (signal.SIGINT, signal.SIGQUIT)


def run_from(given: Given, chosen: Sequence[str]) -> int:
    """Run a command in a workspace of its own, show what changed, and keep, apply or discard it: its exit status.  Raises
    Refusal."""
    if len(chosen) > 1:
        raise Refusal(f"--{chosen[0]} and --{chosen[1]} can't go together", USAGE)
    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("run in")
    with tidied():
        workspace = _Workspace(place, given.value("from") or "", apply="apply" in chosen)
        try:
            status = workspace.run(given)
            if status is None:
                return workspace.failed
            changes = list(place.compared(place.directory("active", workspace.key), "changes content", ()))
            for line in changes:
                print(table.printable(line), file=sys.stderr)
            if not changes and not chosen:
                table.complain("nothing changed")
            return workspace.settle(chosen[0] if chosen else _asked(workspace) if changes else "discard") or status
        except BaseException:
            workspace.give_up(chosen)
            raise


def _asked(workspace: _Workspace) -> str:
    """Which of WAYS the user chooses; keep, where there is no terminal to ask at."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "keep"
    ways = [way for way in WAYS if way != "apply" or workspace.source]
    while True:
        print(f"{', '.join(ways[:-1])} or {ways[-1]}? ", end="", file=sys.stderr, flush=True)
        try:
            answer = sys.stdin.readline()
        except KeyboardInterrupt:
            answer = ""
        if not answer:
            print(file=sys.stderr)
            return "keep"
        found = [way for way in ways if answer.strip() and way.startswith(answer.strip().lower())]
        if found:
            return found[0]


class _Workspace:
    """An active snapshot for one command; ``key``.  ``source`` is the directory whose copy it began as, "" for none; ``over``
    the same, if the copy was made for this.  ``failed`` is the exit status where the command could not be begun."""

    def __init__(self, place: MountedTree, word: str, *, apply: bool) -> None:
        self.failed = 1
        self._has_begun = self._is_settled = False
        self.over: str | None = None
        self._place = place
        self._base = ""
        if place.is_directory(word):
            self._adopt(word)
        else:
            name = place.key(word)
            self._prepare(name, place.kind_of(name), apply=apply)
        self._number = self._number_of("active", self.key)

    def _number_of(self, kind: str, key: str) -> int:
        number: int = json.loads(self._place.read(f"{self._place.directory(kind, key)}/info.json"))["id"]
        return number

    def _prepare(self, name: str, kind: str | None, *, apply: bool) -> None:
        place = self._place
        if kind is None:
            raise place.wrong_parent(name)
        if kind != "committed":
            its = place.word_of(name)
            advice = f"{place.command('run', its)} …, or {place.command('checkpoint', its)} first"
            if os.path.isdir(name):
                advice += f"; the directory is {names.word(f'./{name}')}"
            raise Refusal(f'"{name}" is {kind}, and --from wants what stays as it is: {advice}', USAGE)
        labels = json.loads(place.read(f"{place.directory('committed', name)}/info.json"))["labels"]
        source = labels.get(SOURCE, "")
        self.source = names.path_of_text(source)
        if apply and not source:
            raise Refusal(f'"{name}" has no label {SOURCE}, so there is no directory to apply to: use --keep, and snapfs apply')
        given = [(SOURCE, source)] if source else []
        self.key = _first_free(name, lambda key: make(place, "active", key, name, given))

    def _adopt(self, directory: str) -> None:
        place = self._place
        options = place.options()
        with Source(directory) as source:
            source.refuse_misplaced(place, options)

            def adopt(key: str) -> None:
                adoption = Adoption(place, options, source, key)
                adoption.refuse_taken()
                with adoption.committed(move=False):
                    adoption.made([])
                self._base = adoption.base

            self.key = _first_free(_name_of(source), adopt)
            self.source = self.over = source.path
        self._base_number = self._number_of("committed", self._base)

    def run(self, given: Given) -> int | None:
        """The exit status of the command; None where it could not be begun: the workspace is gone."""
        heard, told = os.pipe()
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, (*_PASSED_ON, *_IGNORED))  # until it is settled what each does
        child = os.fork()
        if child == 0:
            for number in (*_PASSED_ON, *_IGNORED):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_PASSED_ON, *_IGNORED))
            self._become(given, told)
        self._has_begun = True
        os.close(told)
        before = {number: signal.signal(number, lambda number, _: _pass_on(child, number)) for number in _PASSED_ON}
        before |= {number: signal.signal(number, signal.SIG_IGN) for number in _IGNORED}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_PASSED_ON, *_IGNORED))
        try:
            has_failed = os.read(heard, 1) != b""
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            os.close(heard)
            for number, handler in before.items():
                signal.signal(number, handler)
        if has_failed:
            self.failed = status
            self._remove()
            return None
        return status if status >= 0 else 128 - status

    def _become(self, given: Given, told: int) -> None:
        """Go on as the command; whatever comes in its way is told to the parent."""
        status = 1
        try:
            work_inside(self._place, self.key, given.arguments, given, self.over)
        except Refusal as refused:
            table.complain(refused)
            status = refused.status
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(told, b"x")
            sys.stderr.flush()
            os._exit(status)

    def settle(self, way: str) -> int:
        """Do what is to become of it, which is one of WAYS: 0, or the exit status where it is kept instead."""
        place = self._place
        status = 0
        if way == "apply":
            try:
                status = verb("apply").run(["--at", place.path, "--", self.key])
            except Refusal as refused:
                table.complain(refused)
                status = refused.status
        if way == "keep" or status:
            self._tell()
            return status
        end_all(place, self.key)
        self._remove()
        return 0

    def give_up(self, chosen: Sequence[str]) -> None:
        """Remove what nobody wants, for this ends before it was settled; else tell that it is kept."""
        if not self._is_settled:
            if not self._has_begun or "discard" in chosen:
                with suppress(Refusal):
                    end_all(self._place, self.key)
                    self._remove()
                    return
            self._tell()

    def _tell(self) -> None:
        """Say where it is, and what can be done with it."""
        place, its = self._place, self._place.word_for(self.key, self._number)
        remove = place.command("rm", its)
        if self._base:
            remove = place.command("rm -r", place.word_for(self._base, self._base_number))
        self._is_settled = True
        table.complain(f'kept as "{self.key}": {place.command("diff", its)}, {place.command("apply", its)}, {remove}')

    def _remove(self) -> None:
        """Remove it, and the copy that it began as.  Raises Refusal."""

        def remove() -> str:
            self._place.remove("active", self.key, self._number)
            return ""

        try:
            remove()
        except Refusal as refused:
            if refused.status != BUSY:
                raise
            once_empty(self._place, self.key, remove)  # the namespace of what has ended may take a while to end
        self._is_settled = True
        if self._base:
            self._place.remove("committed", self._base, self._base_number)


def _name_of(source: Source) -> str:
    """What the workspace is called after; the directory may have a name that no key can have."""
    try:
        return source.key()
    except Refusal:
        return "directory"


def _first_free(name: str, make: Callable[[str], object]) -> str:
    """The first of NAME-run-1, NAME-run-2 … that ``make`` does not find taken."""
    number = 1
    while True:
        key = names.with_suffix(name, f"-run-{number}{DRAFT}").removesuffix(DRAFT)  # while it is made
        try:
            make(key)
        except Refusal as refused:
            if refused.status != TAKEN:
                raise
            number += 1
        else:
            return key


def _pass_on(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)
