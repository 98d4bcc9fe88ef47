"""The registry: which types a queue runs, and which it only accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskx.core.errors import ConfigurationError, UnknownTaskType
from taskx.core.options import Options
from taskx.core.payload import DEFAULT_MAX_SIZE
from taskx.core.rate import Limit
from taskx.executing.executors import Executor, Registered, TaskExecutor, entry_of
from taskx.executing.middleware import Layer, wrapped


class Registry:
    """The types that a queue runs or, where they were only declared, accepts.

    ``require`` refuses what the repository cannot do, given in words.
    """

    def __init__(
        self,
        middleware: Sequence[Layer] = (),
        require: Callable[[str], object] = lambda what: None,
        max_payload_size: int = DEFAULT_MAX_SIZE,
    ) -> None:
        self._middleware = middleware
        self._require = require
        self.max_payload_size = max_payload_size
        #: What is known of each type that it runs.
        self.registered: dict[str, Registered] = {}
        #: The limits of those types that have any.
        self.limits: dict[str, Limit] = {}
        self._declared: set[str] = set()

    @property
    def types(self) -> tuple[str, ...]:
        """The types that it runs."""
        return tuple(self.registered)

    @property
    def isolated(self) -> frozenset[str]:
        """The types that it runs in child processes."""
        return frozenset(
            type for type, entry in self.registered.items() if entry.options.isolation is not None
        )

    def runs(self, type: str) -> bool:
        """Whether this queue has an executor for the type."""
        return type in self.registered

    def register(self, executor: TaskExecutor | Executor[Any, Any], options: Options) -> None:
        """Add an executor; options given here win over its own.

        ``ConfigurationError`` if its type is taken, it is none, or a child process could not find it.
        """
        entry = entry_of(executor, options)
        if entry.type in self.registered:
            raise ConfigurationError(
                f"type {entry.type!r} has an executor already: make a new queue, or choose another type"
            )
        if entry.log_level is not None:
            self._require("logs (capture_log)")
        if entry.options.limit_scope == "global":
            self._require('limits of all nodes (limit_scope="global")')
        limit = entry.options.limit
        function, takes_context = entry.function, entry.takes_context
        if entry.options.isolation is not None:
            # Not every program starts processes.
            from taskx.executing.process.isolation import Isolated

            function, takes_context = Isolated(executor, entry, self.max_payload_size), True
        if self._middleware:
            function = wrapped(function, self._middleware, takes_context=takes_context)
            takes_context = True
        if limit is not None:  # first: as soon as it is registered, its tasks are taken
            self.limits[entry.type] = limit
        self.registered[entry.type] = entry._replace(function=function, takes_context=takes_context)

    def declare(self, type: str) -> None:
        """Accept a type whose executor lives in another process."""
        self._declared.add(type)

    def get(self, type: str) -> Registered | None:
        """The executor of a type, None if it is only declared; UnknownTaskType if it is neither."""
        entry = self.registered.get(type)
        if entry is None and type not in self._declared:
            known = ", ".join(sorted({*self.registered, *self._declared})) or "none"
            raise UnknownTaskType(
                f"no executor is registered for type {type!r} (known: {known}); register one, or "
                "declare() the type if it runs in another process"
            )
        return entry
