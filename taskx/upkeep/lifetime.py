"""The life of a queue: how it is started, drained and stopped, also where nobody stops it."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from typing import Any

from taskx.common.config import Config
from taskx.core.checks import check_number
from taskx.core.errors import CancelReason, ConfigurationError, QueueStopped, RepositoryError
from taskx.executing.runner import inside_executor
from taskx.moving import Services
from taskx.running.state import State
from taskx.upkeep.node import EXTRA, LocalNode

#: Seconds that a queue which nobody stopped is given at interpreter exit to hand its tasks back.
EXIT_TIMEOUT = 5.0
# Half of what the system can wait for: deadlines and extra time come on top.
_LONGEST_STOP = threading.TIMEOUT_MAX / 2


class Lifetime:
    """Starts and stops a queue.

    Args:
        services: what the queue works with.
        config: how it works.
        state: how far it is, as its parts see it.
        queue: the queue, which hooks are told of.
    """

    def __init__(self, services: Services, config: Config, state: State, queue: Any) -> None:
        self._services = services
        self._config = config
        self._state = state
        self._queue = queue
        self._changing, self._starting = threading.Lock(), threading.Lock()
        #: The node; None as long as the queue has not been started.
        self.node: LocalNode | None = None
        _lives.add(self)

    def forget(self) -> None:
        """In a forked child: stop nothing at its exit that is the parent's."""
        _lives.discard(self)

    @property
    def name(self) -> str:
        """How far it is, in a word or two."""
        return "stopped" if self._state.stopped else "started" if self.node else "not started"

    @property
    def healthy(self) -> bool:
        """Whether the queue can do its work."""
        try:
            self._services.repository.ensure_there()
        except RepositoryError:
            return False
        return self.node is None or self.node.engine.stuck.healthy

    def start(self) -> None:
        """Start the workers; a second call does nothing.

        Raises:
            QueueStopped: the queue was stopped.
            RepositoryError: the repository cannot be used.
            RuntimeError: the system has no more threads.
        """
        with self._starting:
            if self._state.stopped:
                raise QueueStopped("a stopped queue cannot be started again; make another one")
            if self.node is not None:
                self.node.engine.begun.set()  # an interrupt may have struck the start before it did
                return
            node = LocalNode(self._services, self._config, self._ended)
            try:
                node.join()
                node.begin()
                # The workers wait: what an executor submits or cancels finds its node.
                if not self._publish(node):
                    raise QueueStopped("the queue was stopped while it started; nothing was run")
            except BaseException:  # an interrupt, too: it can be started again
                self.node = self._state.engine = None
                node.withdraw()
                raise
            if (hooks := self._services.hooks).queue_started:
                hooks.tell(hooks.queue_started, lambda: self._queue)
            node.go()

    def _publish(self, node: LocalNode) -> bool:
        """Make a node that has begun visible to other threads; return False if the queue was stopped."""
        with self._changing:
            if not self._state.stopped:
                self.node, self._state.engine = node, node.engine
            return not self._state.stopped

    def _ended(self) -> None:
        """The last executor has returned, and its outcome is written."""
        if (hooks := self._services.hooks).queue_stopped:
            hooks.tell(hooks.queue_stopped, lambda: self._queue)

    def drain(self, timeout: float | None) -> bool:
        """Wait until nothing is left to run; False if ``timeout`` seconds passed before.

        Raises:
            ConfigurationError: it would wait for itself, or for nothing.
            QueueStopped: the queue was stopped.
        """
        if inside_executor() or self._services.hooks.inside:
            raise ConfigurationError("drain() inside an executor or a hook would wait for itself")
        if self._state.stopped:
            raise QueueStopped("the queue was stopped; nothing is run any more")
        if self.node is None:
            raise ConfigurationError("drain() waits for the workers of a started queue: start() it")
        return self.node.drain(None if timeout is None else check_number(timeout, "timeout"))

    def stop(self, timeout: float, *, cancel: bool) -> list[str]:
        """Take nothing more, wait for the workers and hooks; returns the ids that still run."""
        seconds = min(check_number(timeout, "timeout"), _LONGEST_STOP)
        deadline = time.monotonic() + seconds
        # Held for moments only, and not while a start waits for the repository.
        with self._changing:
            self._state.stopped = True
        still = [] if self.node is None else self.node.stop(seconds, cancel=cancel)
        self.wait_for_hooks(max(0.0, deadline + EXTRA - time.monotonic()))
        return still

    def tell_to_stop(self) -> None:
        """Take nothing more, and tell running tasks to stop; waits for nothing."""
        self._state.stopped = True
        if self.node is not None:
            self.node.engine.stopping = True
            self.node.engine.fire_all(CancelReason.STOP)

    def wait_for_hooks(self, timeout: float) -> None:
        """Wait until hooks have been told everything, and complain if they have not."""
        hooks = self._services.hooks
        if not (hooks.quiet or hooks.inside or hooks.wait(timeout)):
            self._services.log.warning(
                "stopped with %d event(s) not told to hooks yet", len(hooks.waiting)
            )


_lives: weakref.WeakSet[Lifetime] = weakref.WeakSet()


def stop_forgotten() -> None:
    """Stop the queues that nobody stopped, as the interpreter exits."""
    deadline = time.monotonic() + EXIT_TIMEOUT
    running = {life for life in list(_lives) if life.name == "started"}
    for life in running:  # first all of them: they end at the same time, not one after the other
        life.tell_to_stop()
    for life in list(_lives):
        left = max(0.0, deadline - time.monotonic())
        if life in running:
            life.stop(left, cancel=True)
        else:
            life.wait_for_hooks(left)


atexit.register(stop_forgotten)
