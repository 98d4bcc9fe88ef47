"""Places: where new tasks wait for a worker from the moment at which they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from taskx.tasks.writes import Insert


class Place(ABC):
    """The place of new tasks: a waiting worker, slots in the buffer, or the repository alone.

    A place is reserved, its writes store the tasks, and it is filled. After an error it is released.

    Attributes:
        writes: the writes that store the tasks, as they are once the place is reserved.
    """

    writes: Sequence[Insert]

    @abstractmethod
    def fill(self) -> None:
        """Have the tasks run: they are stored now."""

    def release(self, error: BaseException | None) -> None:  # noqa: B027
        """Give back what is reserved; by default nothing is. It can be repeated.

        The tasks were not stored, or ``error`` tells how that ended.
        """
