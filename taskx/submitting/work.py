"""The unit of work of a call: through what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import attrs

from taskx.core.model import Task
from taskx.core.writes import Write
from taskx.storage.base import Repository


class Door(Protocol):
    """Commits moves, as :class:`taskx.moving.Moves` does, or applies them inside a transaction."""

    @property
    def entered(self) -> bool: ...

    def commit(
        self,
        writes: Sequence[Write],
        tasks: Mapping[str, Task] | None = None,
        *,
        whole: bool = False,
    ) -> Sequence[bool]: ...

    def process_if_unattended(self) -> None: ...


def _at_once(call: Callable[[], object]) -> None:
    call()


@attrs.frozen(eq=False)
class Work:
    """What a call reads, and the door for its moves: the queue's, or those of a transaction of the caller.

    Attributes:
        repository: the repository, as the transaction sees it.
        moves: the door.
        after: calls a function after the commit: at once if each commit is a transaction of its own.
        inside: True inside a transaction of the caller: what is not committed must be in no memory.
    """

    repository: Repository
    moves: Door
    after: Callable[[Callable[[], object]], object] = _at_once
    inside: bool = False
