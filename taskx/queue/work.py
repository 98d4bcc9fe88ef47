"""Units of work: each call of a queue reads and writes through one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from taskx.node.moving import Moves
from taskx.stores.base import Repository
from taskx.tasks.model import Task
from taskx.tasks.writes import Write


class Inside:
    """The door inside a transaction: it applies moves at once. ``tasks`` collects their tasks."""

    entered = False

    def __init__(self, repository: Repository, tasks: dict[str, Task]) -> None:
        self._repository = repository
        self._tasks = tasks

    def commit(
        self,
        writes: Sequence[Write],
        tasks: Mapping[str, Task] | None = None,
        *,
        whole: bool = False,
    ) -> Sequence[bool]:
        """Apply moves."""
        self._tasks.update(tasks or {})
        return self._repository.apply(writes, all_or_nothing=whole)

    def process_if_unattended(self) -> None:
        """Do nothing yet."""


@attrs.frozen(eq=False)
class Work:
    """The unit of work of a call: the repository that it reads, and the door for its moves.

    They are those of the queue, or belong to a transaction of the caller.

    Attributes:
        repository: the repository, as the transaction sees it.
        moves: the door.
        later: the functions to call after the commit; None if each commit is a transaction of its own.
    """

    repository: Repository
    moves: Moves | Inside
    later: list[Callable[[], object]] | None = None

    @property
    def inside(self) -> bool:
        """True inside a transaction of the caller: what is not committed must be in no memory."""
        return self.later is not None

    def after(self, call: Callable[[], object]) -> None:
        """Call a function after the commit: at once if each commit is a transaction of its own."""
        if self.later is None:
            call()
        else:
            self.later.append(call)
