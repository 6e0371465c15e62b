"""An end by SIGTERM or SIGHUP before which a verb takes away what it has made, as it does after Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class _CutOff(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def tidied() -> Iterator[None]:
    """For a block that tidies up whatever exception ends it: these signals are one, and end this process when the block has
    ended.  Those that come meanwhile, and those that were ignored before, are ignored."""
    taken = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]

    def cut_off(number: int, _: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise _CutOff(number)

    try:
        for number in taken:
            signal.signal(number, cut_off)
        yield
    except _CutOff as cut:
        signal.signal(cut.number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [cut.number])
        os.kill(os.getpid(), cut.number)
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
