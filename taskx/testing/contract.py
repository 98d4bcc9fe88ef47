"""What the contracts have in common: they are written with pytest's fixtures, and need it to skip."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class Contract:
    """What the tests of a contract are written with."""

    def in_threads(self, work: Callable[[int], object], count: int = 4) -> list[object]:
        """What ``work`` returned or raised in each of some threads that begin together."""
        outcomes: list[object] = [None] * count
        barrier = threading.Barrier(count)

        def run(number: int) -> None:
            barrier.wait()
            try:
                outcomes[number] = work(number)
            except Exception as error:  # noqa: BLE001  (what was raised is the outcome)
                outcomes[number] = error

        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    @contextmanager
    def raises(self, expected: type[BaseException]) -> Iterator[None]:
        """Fail unless the block raises that error."""
        try:
            yield
        except expected:
            return
        raise AssertionError(f"{expected.__name__} was not raised")

    def skip(self, reason: str) -> NoReturn:
        """Skip the running test."""
        try:
            import pytest
        except ImportError:
            raise ImportError(
                "the contracts of taskx.testing are for pytest: pip install pytest"
            ) from None
        pytest.skip(reason)
