"""The interface of doors, through which the parts of a queue read and change its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from taskx.stores.base import Repository
from taskx.tasks.model import Task
from taskx.tasks.writes import Write


class Door(Protocol):
    """The door of a queue, or of a transaction of the caller: what is read and changed goes through it.

    Attributes:
        repository: what is read; the door of a transaction sees what that has written.
        now_ms: returns the time that moves store, in milliseconds.
        inside: True in a transaction of the caller: what is not committed must be in no memory.
        entered: True if the calling thread is in a commit.
    """

    @property
    def repository(self) -> Repository: ...
    @property
    def now_ms(self) -> Callable[[], int]: ...
    @property
    def inside(self) -> bool: ...
    @property
    def entered(self) -> bool: ...

    def commit(
        self,
        writes: Sequence[Write],
        tasks: Mapping[str, Task] | None = None,
        *,
        whole: bool = False,
    ) -> Sequence[bool]:
        """Commit moves, with the tasks that were read for them; return which of them took place."""

    def after(self, call: Callable[[], object]) -> None:
        """Call a function after the commit: at once if each commit is a transaction of its own."""

    def process_if_unattended(self) -> None:
        """Process dependents and turns, if no housekeeper does so soon."""
