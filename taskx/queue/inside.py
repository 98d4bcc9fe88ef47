"""The door inside a transaction of the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from taskx.stores.base import Repository
from taskx.tasks.model import Task
from taskx.tasks.writes import Write


class Inside:
    """Applies moves at once, in a transaction of the caller: see :class:`Door`.

    Args:
        repository: the repository, as the transaction sees it.
        now_ms: returns the time.
        tasks: collects the tasks of moves.
        later: collects the functions to call after the commit.
    """

    entered = False
    inside = True

    def __init__(
        self,
        repository: Repository,
        now_ms: Callable[[], int],
        tasks: dict[str, Task],
        later: list[Callable[[], object]],
    ) -> None:
        self.repository = repository
        self.now_ms = now_ms
        self._tasks = tasks
        self.after = later.append

    def commit(
        self,
        writes: Sequence[Write],
        tasks: Mapping[str, Task] | None = None,
        *,
        whole: bool = False,
    ) -> Sequence[bool]:
        """Apply moves."""
        self._tasks.update(tasks or {})
        return self.repository.apply(writes, all_or_nothing=whole)

    def process_if_unattended(self) -> None:
        """Do nothing yet."""
