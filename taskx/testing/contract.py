"""The base of the contracts. Run the contracts with pytest: they use its fixtures."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import SkipTest, TestCase

#: The number of threads that race, and of rounds.
THREADS, ROUNDS = 4, 50


class Contract:
    """Base class of the contracts: helpers for their tests."""

    #: True if it keeps every field of a task, False if only the thirteen of the original TaskX.
    keeps_every_field: bool = True

    raises = TestCase().assertRaises

    def skip_if(self, condition: object, reason: str = "") -> None:
        """Skip the test if a condition is true; without a reason, the condition is the reason."""
        if condition:
            raise SkipTest(reason or str(condition))

    def race(self, attempt: Callable[[int, int], bool], rounds: int) -> list[list[bool]]:
        """Have several threads make the same attempt at the same time, in each round.

        ``attempt`` is called with the number of the thread and the number of the round.

        Returns:
            for each round, the results of the threads.
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
        """Assert that exactly one of the racing attempts succeeds in each round."""
        assert [sum(won) for won in self.race(attempt, ROUNDS)] == [1] * ROUNDS
