"""A node that follows its controls: pauses, overridden or held limits, and the number of its workers."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from taskx.attempt.registry import Registry
from taskx.node.admission import Admission
from taskx.node.fetcher import Fetcher
from taskx.node.moving import Moves
from taskx.node.starter import Runs
from taskx.stores.controls import Controls, Declared, Overrides
from taskx.stores.liveness.base import Node
from taskx.tasks.bell import Agenda
from taskx.tasks.clock import Clock
from taskx.tasks.errors import RepositoryError
from taskx.tasks.findings import suggestion
from taskx.tasks.log import GuardedLogger
from taskx.tasks.rate import OF_TYPE

_NOTHING: tuple[Overrides, Declared] = (Overrides(), {})


class _Pool(Protocol):
    """The parts of a worker pool that follow the controls."""

    moves: Moves
    controls: Controls
    agenda: Agenda
    registry: Registry
    clock: Clock
    log: GuardedLogger
    node: Node
    runs: Runs
    admission: Admission
    fetcher: Fetcher

    def set_workers(self, number: int) -> None: ...
    def record(self) -> None: ...


class Tuning:
    """Makes a worker pool follow the controls of its repository.

    Args:
        pool: the worker pool.
        configured: the number of workers that the program has configured.
    """

    def __init__(self, pool: _Pool, configured: int) -> None:
        self._pool = pool
        self._configured = configured
        self._changing = threading.Lock()
        # The overrides and the declared limits that are in effect, and the limits that are held.
        self._followed = _NOTHING
        self._held: tuple[str, ...] = ()

    def refresh(self) -> None:
        """Read the controls again, and follow those that have changed.

        After a ``RepositoryError`` tasks of paused types may be left in the buffer; workers pass over them.
        """
        controls = self._pool.controls
        paused_changed = controls.refresh()
        if paused_changed:  # first, because the next call does not notice it again
            self._pool.fetcher.follow_pauses()
        overrides, declared = self._followed
        held = controls.held(self._pool.clock.now_ms()) if controls.holds else ()
        types = [name for name in {*held} ^ {*self._held} if name.startswith(OF_TYPE)]
        if types or controls.overrides is not overrides or controls.declared is not declared:
            self._follow_overrides()
        elif held != self._held:
            self._held = held
            self._pool.agenda.fetch_soon()  # a hold may have ended early

    def declare(self) -> None:
        """Store the limits that the program declares: those of the latest start hold for all nodes."""
        pool, registry = self._pool, self._pool.registry
        declared, controls = registry.declared, pool.controls
        if declared or controls.declared:
            others = [node.declared for node in pool.moves.repository.nodes() if node.lives]
            controls.declare(declared, {name for some in others for name in some})
            self.refresh()
        for type, names in registry.limited.copy().items():
            for name in names:
                if name not in registry.limits:
                    pool.log.warning(
                        "type %r names the limit %r, which no program declares, so it runs without it%s",
                        type,
                        name,
                        suggestion(name, registry.limits),
                    )

    def tend(self) -> None:
        """Maintain the limits that all nodes share, and those that are overridden."""
        self._pool.admission.tend()
        if (
            self._held or self._followed != _NOTHING
        ):  # a start may have been under way when they were set
            self._count_unadmitted()

    def _follow_overrides(self) -> None:
        pool = self._pool
        with self._changing:
            controls = self._pool.controls
            overrides, declared = controls.overrides, controls.declared
            held = controls.held(pool.clock.now_ms())
            pool.set_workers(overrides.workers_of(pool.node.id, self._configured))
            pool.registry.follow(overrides, declared, held)
            pool.admission.follow_limits()
            self._count_unadmitted()
            self._followed, self._held = (overrides, declared), held
        self._pool.agenda.fetch_soon()
        with suppress(RepositoryError):  # the housekeeper does both again
            pool.admission.tend()  # tells other nodes of slots that are taken
            pool.record()

    def _count_unadmitted(self) -> None:
        """Count the runs of limited types that began before their type was limited."""
        pool, limited = self._pool, self._pool.registry.limited
        for run in list(pool.runs.values()):
            if run.task.type in limited and run.state != "stuck":
                pool.admission.adopt(run.task.type, run.task.id, pool.runs)
