"""The brake on guesses of passwords: an address that sent wrong ones waits before its next try."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable

import attrs

from taskx.tasks.clock import Clock

#: Wrong passwords after which an address waits.
FREE = 5
#: Seconds of the first wait and of the longest one. Each wrong password doubles the wait.
SHORTEST, LONGEST = 1, 60
#: Addresses that are remembered. The one that was quiet for the longest time is forgotten first.
MOST_ADDRESSES = 10_000


@attrs.define
class _Tries:
    wrong: int = 0
    wait: int = 0
    until: float = -math.inf


class Brake:
    """Counts wrong passwords by address. Nothing sleeps: a try that comes too early is refused.

    The right password is refused, too, while its address waits. A refused try does not count, so a browser
    that sends many requests at once with one wrong password waits no longer than for one.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tries: OrderedDict[str, _Tries] = OrderedDict()

    def check(self, address: str, right: Callable[[], bool]) -> tuple[bool, int]:
        """Try a password.

        Args:
            address: the address that it came from.
            right: compares the password; is not called while the address waits.

        Returns:
            True if the password is right, and the whole seconds that the address has to wait; 0 if the
            password was tried.
        """
        now = self._clock.monotonic()
        with self._lock:  # one try at a time: of a hundred that come at once, 95 are refused
            tries = self._tries.get(address, _Tries())
            if now < tries.until:
                return False, math.ceil(tries.until - now)
            if right():
                self._tries.pop(address, None)
                return True, 0
            tries.wrong += 1
            if tries.wrong >= FREE:
                tries.wait = min(2 * tries.wait, LONGEST) or SHORTEST
                tries.until = now + tries.wait
            self._tries[address] = tries
            self._tries.move_to_end(address)
            if len(self._tries) > MOST_ADDRESSES:
                self._tries.popitem(last=False)
            return False, 0
