"""How much of something may be taken in a time: by all, or by each of several users."""

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


class Shares:
    """Something of which each user may take so much as ``of_user`` says (at once, and again each second), and all of them
    together what ``of_all`` says."""

    def __init__(self, of_user: tuple[float, float], of_all: tuple[float, float], clock: Callable[[], float]) -> None:
        self._of_user = of_user
        self._all = Allowance(*of_all, clock)
        self._users: dict[int, Allowance] = {}
        self._clock = clock

    def left(self, user: int) -> float:
        """How much ``user`` may take now."""
        own = self._users.get(user)
        return min(self._of_user[0] if own is None else own.left, self._all.left)

    def take(self, user: int, amount: float) -> None:
        """Take ``amount`` for ``user``, as ``Allowance.take``; nothing is remembered of those who have taken nothing lately."""
        for other in [other for other, allowance in self._users.items() if allowance.is_full]:
            del self._users[other]
        self._users.setdefault(user, Allowance(*self._of_user, self._clock)).take(amount)
        self._all.take(amount)
