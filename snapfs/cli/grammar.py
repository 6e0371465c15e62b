"""What the verbs take: declared in one place for reading the command line, for --help and for completion."""

from __future__ import annotations

import sys

from snapfs.cli import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMAND = "CMD…"  # the last argument: all words from there on are another command's

NAMES = {"KEY": "active view", "NAME": "active view committed", "PARENT": "committed", "SOURCE": "active committed"}
"""Which kinds of snapshot complete an argument that is called so."""


class Option:
    """``--name`` or ``-n``, with a value where it has a ``metavar``; ``many``: it may be repeated; ``instead``: there is no
    such argument where it is given."""

    def __init__(
        self, name: str, text: str, metavar: str = "", short: str = "", *, many: bool = False, instead: str = ""
    ) -> None:
        self.name = name
        self.text = text
        self.metavar = metavar
        self.short = short
        self.many = many
        self.instead = instead

    def words(self) -> str:
        """How it is written: ``-p, --parent PARENT``."""
        return (f"{self.short}, " if self.short else "") + f"--{self.name}" + f" {self.metavar}" * bool(self.metavar)

    def meaning(self) -> str:
        """What it does, in a line."""
        return self.text + "; may be repeated" * self.many


AT = Option("at", "the tree: where it is mounted, or any directory in it", "DIR")
JSON = Option("json", "for programs")


class Given:
    """What was given: the arguments in order, how many of them stood before ``--`` (None: there was none), and the options by
    name."""

    def __init__(self) -> None:
        self.arguments: list[str] = []
        self.before: int | None = None
        self.values: dict[str, list[str]] = {}

    def has(self, name: str) -> bool:
        return name in self.values

    def value(self, name: str) -> str | None:
        """The value that was given last."""
        return self.values[name][-1] if name in self.values else None

    def all(self, name: str) -> list[str]:
        return self.values.get(name, [])


class WrongUsage(Exception):
    """The sentence says what is wrong."""


class Verb:
    """One verb: ``arguments`` as in ``"KEY NAME"``, ``"NAME…"`` (one or more), ``"[NAME…]"``; ``call`` does it, on the tree
    that ``--at`` names, where it works ``at`` one."""

    def __init__(
        self,
        name: str,
        arguments: str,
        options: Sequence[Option],
        text: str,
        examples: str,
        call: Callable[[Given], int],
        *,
        at: bool = True,
    ) -> None:
        self.name = name
        self.arguments = arguments.split()
        self.options = (*options, AT) if at else tuple(options)
        self.text = text
        self.examples = examples
        self.call = call

    def run(self, words: Sequence[str]) -> int:
        """Read ``words`` and do it; the exit status."""
        try:
            given = self.parse(words)
        except WrongUsage as wrong:
            print(
                f"snapfs {self.name}: {table.printable(str(wrong))}\n{self.usage()}; snapfs {self.name} --help tells more",
                file=sys.stderr,
            )
            return 2
        if given.has("help"):
            print(self.help(), end="")
            return 0
        return self.call(given)

    def parse(self, words: Sequence[str]) -> Given:
        """Raises WrongUsage."""
        given, rest, arguments = Given(), list(words), list(self.arguments)
        while rest:
            word = rest.pop(0)
            if word == "--":
                given.before = len(given.arguments)
                given.arguments += rest
                break
            if not word.startswith("-") or word == "-":
                given.arguments.append(word)
                if arguments[-1:] == [COMMAND] and len(given.arguments) == len(arguments):
                    given.arguments += rest  # the command's own options among them
                    break
                continue
            if word in ("--help", "-h"):
                given.values["help"] = [""]
                return given
            name, equals, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
            option = next((o for o in self.options if name in (f"--{o.name}", o.short)), None)
            if option is None:
                raise WrongUsage(f"there is no option {name}; a name that begins so goes after --")
            if not option.metavar:
                if equals and word.startswith("--"):
                    raise WrongUsage(f"{name} takes no value")
                if equals:
                    rest.insert(0, f"-{value}")  # -rf
                value = ""
            elif not equals:
                if not rest:
                    raise WrongUsage(f"{name} wants {option.metavar}")
                value = rest.pop(0)
            given.values.setdefault(option.name, []).append(value)
            if option.instead in arguments:
                arguments.remove(option.instead)
        least = sum(not argument.startswith("[") for argument in arguments)
        most = None if any("…" in argument for argument in arguments) else len(arguments)
        if len(given.arguments) < least:
            raise WrongUsage(f"{arguments[len(given.arguments)]} is missing")
        if most is not None and len(given.arguments) > most:
            raise WrongUsage(f'"{given.arguments[most]}" is too much')
        return given

    def usage(self) -> str:
        return " ".join(["usage: snapfs", self.name, *(["[OPTION…]"] if self.options else []), *self.arguments])

    def help(self) -> str:
        lines = [self.usage(), "", self.text]
        if self.options:
            lines += ["", "options:"]
        for option in self.options:
            lines.append(f"  {option.words():<24}{option.meaning()}")
        lines += ["", "examples:", *(f"  {example}" for example in self.examples.strip().splitlines())]
        return "\n".join(lines) + "\n"
