"""How much of something may be taken in a time."""

from __future__ import annotations

from collections.abc import Callable


class Allowance:
    """Something of which ``most`` may be taken at once, and ``again`` more each second."""

    def __init__(self, most: float, again: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._again = again
        self._clock = clock
        self._left, self._when = most, clock()

    @property
    def left(self) -> float:
        """How much may be taken now."""
        now = self._clock()
        self._left, self._when = min(self._most, self._left + (now - self._when) * self._again), now
        return self._left

    @property
    def is_full(self) -> bool:
        """Whether it is as if nothing had been taken."""
        return self.left >= self._most

    def take(self, amount: float) -> None:
        """Take ``amount``, of what is left; a negative one is given back."""
        self._left = self.left - amount
