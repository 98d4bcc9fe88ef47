"""Expiry: cancel tasks that have not started by their ``expires_at``, a few at a time.

A start refuses such a task by itself. This finds the tasks that nothing starts: their type has no executor
or is paused, or they wait for their time, their parents, their turn or a limit.
"""

from __future__ import annotations

import time

from taskx.core import lifecycle
from taskx.moving import Services


class Expiry:
    """Cancels the tasks of a repository that have expired."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def next(self) -> int | None:
        """Return the next ``expires_at`` of a pending task, in milliseconds; None if none can expire."""
        return next((at for _, at in self._services.repository.due(None, 1, "expires_at")), None)

    def step(self, until: float) -> bool:
        """Cancel batches until a time on the monotonic clock; return True if more is left.

        Raises:
            RepositoryError: the repository failed; the next call tries again.
        """
        while more := self._expire_some():
            if time.monotonic() >= until:
                break
        return more

    def _expire_some(self) -> bool:
        """Cancel a batch; return True if there may be more, which no other node is cancelling now."""
        now, batch = self._services.clock.now_ms(), self._services.timing.batch
        ids = [task_id for task_id, _ in self._services.repository.due(now, batch, "expires_at")]
        found = self._services.repository.get_many(ids) if ids else {}
        expired = [task for task in found.values() if lifecycle.has_expired(task, now)]
        writes = [write for task in expired for write in lifecycle.expire(task, now)]
        # All nodes try the same tasks at the same time. The node that cancels most of them goes on.
        done = sum(self._services.moves.commit(writes, found)) if writes else 0
        return len(ids) == batch and 2 * done >= batch
