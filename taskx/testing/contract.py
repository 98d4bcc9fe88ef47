"""The base of the contracts. Run them with pytest, whose fixtures they ask for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import SkipTest, TestCase

#: How many threads race, and how often.
THREADS, ROUNDS = 4, 50


class Contract:
    """What the tests of a contract are written with."""

    #: True if it keeps every field of a task, False if only the thirteen of the original TaskX.
    keeps_every_field: bool = True

    raises = TestCase().assertRaises

    def skip_if(self, condition: object, reason: str = "") -> None:
        """Skip the running test if a condition holds; without a reason, the condition is the reason."""
        if condition:
            raise SkipTest(reason or str(condition))

    def race(self, attempt: Callable[[int, int], bool], rounds: int) -> list[list[bool]]:
        """Have threads try the same at once, and return by round what each of them came to.

        ``attempt`` is called with the numbers of the thread and of the round.
        """
        barrier = threading.Barrier(THREADS)

        def run(thread: int, number: int) -> bool:
            barrier.wait()
            return attempt(thread, number)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                numbers = range(THREADS)
                return [[*pool.map(run, numbers, [n] * THREADS)] for n in range(rounds)]
        finally:
            sys.setswitchinterval(interval)

    def assert_one_wins(self, attempt: Callable[[int, int], bool]) -> None:
        """Assert that of racing attempts one succeeds in each round."""
        assert [sum(won) for won in self.race(attempt, ROUNDS)] == [1] * ROUNDS
