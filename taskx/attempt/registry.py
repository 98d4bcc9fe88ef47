"""The registry: the types that a queue runs, with its middleware, and the types that it only accepts."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from taskx.attempt.context import Context
from taskx.attempt.executors import Executor, Registered, TaskExecutor, entry_of
from taskx.attempt.together import alone, layered
from taskx.stores.controls import Declared, Overrides, named_limit, overridden
from taskx.tasks.checks import check_plain
from taskx.tasks.creation import model_of
from taskx.tasks.errors import ConfigurationError, UnknownTaskType
from taskx.tasks.lifecycle import ANSWER, NO_WORK
from taskx.tasks.model import Task
from taskx.tasks.options import LimitOptions, Options
from taskx.tasks.payload import DEFAULT_MAX_SIZE
from taskx.tasks.rate import NO_LIMIT, OF_TYPE, Cost, Limit, is_key
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.values import Values

#: An item of ``Queue(..., middleware=[...])``: an instance of :class:`Middleware`, or a function.
Layer = Callable[[Context, Task, Callable[[], Any]], Any]


class Middleware:
    """Code around every call of an executor of a queue: ``Queue(..., middleware=[...])``.

    It is called on the worker's thread with the context and the task of the run (``ctx.task``). The first
    item is the outermost. A function with the same signature works, too.
    """

    def __call__(self, ctx: Context, task: Task, call_next: Callable[[], Any]) -> Any:
        """Do something before and after ``call_next()``, which calls the next middleware or the executor.

        The return value is the task's result, and an exception is the attempt's error, as if the executor
        had returned or raised it. So return the value of ``call_next()``.
        """
        return call_next()

    def submit(
        self, tasks: Sequence[Task], call_next: Callable[[Sequence[Task]], Sequence[str]]
    ) -> Sequence[str]:
        """Do something before and after ``call_next(tasks)``, which stores submitted tasks.

        Override it to see or change tasks when they are submitted, alone, many at once or in a flow. It is
        called on the thread that submits them. The tasks are the caller's: do not change them, but pass on
        copies. Tasks of schedules do not come here.

        Returns:
            the value of ``call_next``: the ids of the tasks, in the same order.
        """
        return call_next(tasks)

    def worker_ended(self) -> None:
        """Close what is kept for the calling thread, a worker's, which ends after this call.

        Exceptions are logged.
        """


class Registry:
    """The types that a queue runs, and the declared types that it only accepts.

    ``require(feature)`` raises ``ConfigurationError`` if the repository does not support the feature.
    ``first_use(type)`` is called before the first task of a declared type is stored. ``find(type)``
    registers the executor of a type that waits and has none here, if it can.
    """

    def __init__(
        self,
        middleware: Sequence[Layer] = (),
        require: Callable[[str], object] = lambda what: None,
        max_payload_size: int = DEFAULT_MAX_SIZE,
        first_use: Callable[[str], object] = lambda type: None,
        find: Callable[[str], object] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.middleware = middleware
        self._require = require
        self.max_payload_size = max_payload_size
        #: The entry of each type that the queue runs.
        self.registered: dict[str, Registered] = {}
        #: The row of a task without options of each type, for ``creation.copy_of``; a type of which more is
        #: needed to make one has none.
        self.models: dict[str, Mapping[str, Any]] = {}
        #: The JSON forms of params and results of the types whose executors annotate some.
        self.values: dict[str, Values] = {}
        #: The most tasks of a call, and the seconds that it waits for more, of the types with ``batch``.
        self.batches: dict[str, tuple[int, float]] = {}
        #: The limits that are in effect, by name.
        self.limits: dict[str, Limit] = {}
        #: The names of the limits of each type that has some.
        self.limited: dict[str, tuple[str, ...]] = {}
        #: True if a limit of keys has a rate.
        self.rates_keys = False
        #: The limits of keys by which these share the workers, by name.
        self.shares: Mapping[str, Limit] = {}
        #: The limits with a name that the program declares.
        self.declared: dict[str, LimitOptions] = {}
        self._stored: Declared = {}  # those that the repository knows
        self._overrides = Overrides()
        self._held: Collection[str] = ()  # names of limits
        self._declared: set[str] = set()
        self._used: set[str] = set()  # the declared types that tasks were submitted of
        self._first_use = first_use
        self._find = find
        self._timing = timing
        self._sought: set[str] = set()  # the types that ``find`` was asked for
        self._seeking = threading.RLock()  # reentrant: ``find`` may submit a task

    @property
    def types(self) -> tuple[str, ...]:
        """The types that the queue runs."""
        return (*self.registered,)

    @property
    def isolated(self) -> frozenset[str]:
        """The types that the queue runs in child processes."""
        return frozenset(
            type
            for type, entry in self.registered.copy().items()
            if entry.options.isolation is not None
        )

    @property
    def finds(self) -> bool:
        """True if the executors of unknown types can be found."""
        return self._find is not None

    def seek(self, types: Iterable[str]) -> bool:
        """Find the executors of types that have none here; return True if one was found.

        Each type is sought once.
        """
        with self._seeking:  # another thread may just be finding one of them
            new = [t for t in types if t not in self.registered and t not in self._sought]
            self._sought.update(new)
            for type in new:
                if self._find is not None:
                    self._find(type)
        return any(type in self.registered for type in new)

    def runs(self, type: str) -> bool:
        """Return True if this queue has an executor for the type."""
        return type in self.registered

    def register(self, executor: TaskExecutor | Executor[Any, Any], options: Options) -> None:
        """Add an executor; the options given here win over the executor's own.

        Raises ``ConfigurationError`` if its type is registered and must not be replaced, if it is not an
        executor, or if a child process could not import it.
        """
        entry = entry_of(executor, options)
        _refuse_answers(entry.type)
        if (before := self.registered.get(entry.type)) is not None:
            _check_replaced(before, entry)
        if entry.log_level is not None:
            self._require("logs (capture_log)")
        if entry.options.version is not None:
            self._require("versions of executors (version)")
        if entry.options.limit_scope == "global":
            self._require('limits of all nodes (limit_scope="global")')
        if entry.options.limit is not None:
            self._require("limits with a name")
        function, takes_context = entry.function, entry.takes_context
        if entry.options.isolation is not None:
            # Imported here, because most programs do not start child processes.
            from taskx.attempt.process.isolation import Isolated

            function = Isolated(executor, entry, self.max_payload_size, self._timing)
            takes_context = True
        if (together := entry.together) is not None:
            if self.middleware:
                together = layered(together, self.middleware)
                function = alone(together, entry.values)
            self.batches[entry.type] = (entry.options.batch or 1, entry.options.wait or 0.0)
            entry = entry._replace(together=together)
        elif self.middleware:
            function = _wrapped(function, self.middleware, takes_context=takes_context)
            takes_context = True
        self._limit(entry.type, entry.options)  # as soon as the type is registered, tasks may start
        if entry.values is not None:
            self.values[entry.type] = entry.values
        else:
            self.values.pop(entry.type, None)
        self.models.pop(entry.type, None)
        self.registered[entry.type] = entry._replace(function=function, takes_context=takes_context)
        if entry.model is not None:
            self.models[entry.type] = entry.model

    def follow(self, overrides: Overrides, declared: Declared, held: Collection[str] = ()) -> None:
        """Follow the overrides and the declared limits of the repository, instead of earlier ones.

        ``held`` are the limits that are held: a type without limits may be among them.
        """
        self._overrides, self._stored, self._held = overrides, declared, held
        self._name_limits()
        for type, entry in self.registered.copy().items():
            self._limit(type, entry.options)

    def limit(self, name: str, options: LimitOptions) -> None:
        """Declare a limit with a name."""
        self.declared[name] = options
        self._name_limits()

    def _name_limits(self) -> None:
        own, by_hand = {**self.declared, **self._stored}, self._overrides.limits
        for name in {*own, *by_hand, *self.limits}:
            if name.startswith(OF_TYPE):
                continue
            limit = named_limit(own.get(name, {}), by_hand.get(name, {}))
            if limit is not None:
                self.limits[name] = limit
            else:
                self.limits.pop(name, None)
        of_keys = {name: limit for name, limit in self.limits.copy().items() if is_key(name)}
        self.rates_keys = any(limit.rates for limit in of_keys.values())
        self.shares = {name: limit for name, limit in of_keys.items() if limit.share is not None}

    def _limit(self, type: str, own: Options) -> None:
        name, names = OF_TYPE + type, own.limit or ()
        limit = overridden(own, self._overrides.types.get(type, {}))
        if limit is None and name in self._held:
            limit = NO_LIMIT
        if limit is not None:
            self.limits[name], names = limit, (name, *names)
        else:
            self.limits.pop(name, None)
        if names:
            self.limited[type] = names
        else:
            self.limited.pop(type, None)

    @property
    def own_limits(self) -> dict[str, Limit | None]:
        """The limits of the executors whose limits are overridden."""
        return {
            type: self.registered[type].options.own_limit
            for type in self._overrides.types
            if type in self.registered
        }

    @property
    def declared_limits(self) -> dict[str, Limit]:
        """The limits with a name as the program declares them."""
        found = {name: named_limit(options, {}) for name, options in self.declared.copy().items()}
        return {name: limit for name, limit in found.items() if limit is not None}

    def names_to_hold(self, task: Task, asked: bool | str) -> Sequence[str]:
        """Return the limits that a ``Snooze`` of a task asks to hold.

        A key without a colon has one turn, which the task keeps: nothing is to be held.
        """
        if asked == "key":
            key = task.concurrency_key
            return [key] if key is not None and is_key(key) else ()
        if isinstance(asked, str):
            return [asked]
        return self.limited.get(task.type, (OF_TYPE + task.type,))

    def fill_of(self, name: str) -> float | None:
        """Return the seconds in which the rates of a limit fill up; None if the limit is not known."""
        limit = self.limits.get(name) or self.limit_of_key(name)
        return None if limit is None else limit.rates.seconds

    def limit_of_key(self, key: str) -> Limit | None:
        """Return the limit of a key: that with its name, or else with its longest beginning."""
        if not is_key(key):
            return None
        if (exact := self.limits.get(key)) is not None:
            return exact
        end = len(key)
        while (end := key.rfind(":", 0, end)) >= 0:
            if (limit := self.limits.get(key[: end + 1])) is not None:
                return limit
        return None

    def refuse_cost(self, type: str, key: str | None, cost: Cost) -> None:
        """Raise ``ConfigurationError`` if a cost is above the burst of a limit of the type or the key."""
        keyed = None if key is None else self.limit_of_key(key)
        if keyed is not None:
            self._refuse_cost(f"of key {key!r}", keyed, cost)
        for name in self.limited.get(type, ()):
            if (limit := self.limits.get(name)) is not None:
                self._refuse_cost(repr(name), limit, cost)

    def _refuse_cost(self, name: str, limit: Limit, cost: Cost) -> None:
        for unit, most in limit.rates.units.items():
            if cost.get(unit, 0) > most:
                raise ConfigurationError(
                    f"the cost of {cost[unit]} {unit} is above the burst of limit {name}, {most}: such a "
                    "task would never start; divide it, or raise the burst"
                )

    def declare(self, type: str) -> None:
        """Accept tasks of a type whose executor runs in another process."""
        _refuse_answers(type)
        self._declared.add(type)

    def get(self, type: str, *, used: bool = True) -> Registered | None:
        """Return the entry of a type, None if the type is only declared.

        ``used`` says that a task of the type will be stored.

        Raises ``UnknownTaskType`` if the type is neither registered nor declared.
        """
        entry = self.registered.get(type)
        if entry is None and type not in self._used:
            if type not in self._declared:
                if self.finds:
                    self.seek([type])
                    if (entry := self.registered.get(type)) is not None:
                        return entry
                raise UnknownTaskType(
                    f"no executor is registered for type {type!r} (known: {self.known}); register one, "
                    "or call declare() if the type runs in another process"
                )
            if used:
                self._used.add(type)
                self._first_use(type)
                self.models[type] = model_of(type)
        return entry

    def knows(self, type: str) -> bool:
        """Return True if the type is registered or declared."""
        return type in self.registered or type in self._declared

    @property
    def accepted(self) -> frozenset[str]:
        """The types that are registered or declared."""
        return frozenset((*self.registered, *self._declared))

    @property
    def known(self) -> str:
        """The types that are registered or declared, as text."""
        return ", ".join(sorted(self.accepted)) or "none"


def _refuse_answers(type: str) -> None:
    if type in NO_WORK:
        what = "answers, which people give" if type == ANSWER else "lists of children"
        raise ConfigurationError(f"the type {type!r} is that of {what}: choose another name")


def _check_replaced(before: Registered, entry: Registered) -> None:
    """Raise ``ConfigurationError`` if a type's executor must not be replaced by another one."""
    if not entry.options.replace:
        raise ConfigurationError(
            f"type {entry.type!r} already has an executor; give replace=True to replace it (in a notebook "
            "cell that runs again), or choose another type"
        )
    # Tasks that run now are counted by them.
    if before.options.isolation != entry.options.isolation or (
        before.options.own_limit != entry.options.own_limit
        or before.options.limit != entry.options.limit
    ):
        raise ConfigurationError(
            f"the new executor of type {entry.type!r} must have the isolation and the limits of the "
            "replaced one (max_concurrency, rate, burst, limit_scope, limit); to change them, make a new "
            "queue"
        )


def check_middleware(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Return the layers as a tuple.

    Raises ``ConfigurationError`` if a layer is not callable, is a class, or has an async method.
    """
    known = tuple(layers)
    for layer in known:
        if not callable(layer) or inspect.isclass(layer):
            raise ConfigurationError(
                "middleware must be instances of Middleware, or functions of (ctx, task, call_next), "
                f"not {layer!r}"
            )
        check_plain(layer, f"middleware {layer!r}")
        if isinstance(layer, Middleware):
            check_plain(layer.submit, f"submit() of middleware {layer!r}")
            check_plain(layer.worker_ended, f"worker_ended() of middleware {layer!r}")
    return known


def _wrapped(
    function: Callable[..., Any], layers: Sequence[Layer], *, takes_context: bool
) -> Callable[..., Any]:
    """Return a function that takes the context, and calls ``function`` inside the layers."""

    def call(ctx: Context, /, **_: Any) -> Any:
        params = ctx.task.params  # not a copy: a layer may change the params
        call_next = partial(_call, function, (ctx,) if takes_context else (), params)
        for layer in reversed(layers):
            call_next = partial(layer, ctx, ctx.task, call_next)
        return call_next()

    return call


def _call(function: Callable[..., Any], given: tuple[Context, ...], params: dict[str, Any]) -> Any:
    return function(*given, **params)
