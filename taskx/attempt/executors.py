"""Executors: the code that runs a type of task, as a class or as a function."""

from __future__ import annotations

import gc
import inspect
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
    Set,
)
from contextlib import aclosing
from functools import update_wrapper
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    overload,
)

from taskx.attempt.context import Context
from taskx.attempt.current import awaited, current_context
from taskx.attempt.together import BatchContext, Together, alone
from taskx.tasks.checks import Duration, check_plain, is_async, is_async_generator
from taskx.tasks.creation import model_of
from taskx.tasks.errors import ConfigurationError, PayloadError
from taskx.tasks.model import Task, check_name, its_type
from taskx.tasks.options import (
    FALLBACKS,
    Options,
    PlainOptions,
    SubmitOptions,
    lifetime,
    log_level,
    options_of,
)
from taskx.tasks.submission import bound_options, of_submit, with_options
from taskx.tasks.values import ItemValues, Values, values_of

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

    from taskx.attempt.coroutines import Awaited
    from taskx.tasks.handles import TaskHandle

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class TaskExecutor(ABC):
    """An executor as a class: set ``type``, implement :meth:`execute`.

    Attributes:
        type: the type of task that it runs.
    """

    type: str

    @abstractmethod
    def execute(self, ctx: Context, task: Task) -> Any:
        """Run the task and return its result.

        ``task`` is this run's copy. Changes to it are not stored, except ``task.result``: it is the
        result if this method returns None. An exception fails the attempt.
        """


#: The name of a parameter that gets the result of the step before, in a flow.
PREVIOUS = "previous"


class _Queue(Protocol):
    @property
    def stopped(self) -> bool: ...
    def submit(self, task: Task, /, **options: Unpack[SubmitOptions]) -> TaskHandle[Any]: ...
    def register_executor(self, executor: Executor[Any, Any], /) -> None: ...


class Queues:
    """The queues that an executor is registered with.

    They are remembered by weak references: the executor is often an object of a module, which lives as
    long as the program. Only if there is a single queue does the executor keep it.
    """

    def __init__(self) -> None:
        #: The queue to submit to; None if there is none, or more than one.
        self.only: _Queue | None = None
        # In order. Changed without a lock, one operation at a time.
        self._known: dict[int, weakref.ref[_Queue]] = {}
        self._numbers = itertools.count()

    def _alive(self) -> list[_Queue]:
        return [queue for known in [*self._known.values()] if (queue := known()) is not None]

    def add(self, queue: _Queue) -> None:
        """Add a queue."""
        for key, known in self._known.copy().items():
            if known() in (None, queue):
                self._known.pop(key, None)
        self._known[next(self._numbers)] = weakref.ref(queue)
        while True:
            queues = self._alive()
            self.only = queues[0] if len(queues) == 1 else None
            if self._alive() == queues:  # else another thread has added one
                return

    def choose(self, type: str) -> _Queue:
        """Return the only queue that is not stopped; if all are stopped, the last one.

        Raises:
            ConfigurationError: there is no queue, or more than one.
        """
        queues = self._alive()
        if len(running := [queue for queue in queues if not queue.stopped]) > 1:
            del queues, running
            gc.collect()  # a queue that no code holds any more may not be collected yet
            queues = self._alive()
            running = [queue for queue in queues if not queue.stopped]
        if not queues:
            raise ConfigurationError(
                f"executor {type!r} is not registered with a queue; "
                "call queue.register_executor(…) first"
            )
        if len(running) > 1:
            raise ConfigurationError(
                f"executor {type!r} is registered with {len(running)} queues: "
                f"{', '.join(map(repr, running))}; write executor.on(queue).submit(…)"
            )
        return (running or queues)[-1]


class Executor(Generic[P, R]):
    """An executor made from a function. It can still be called as that function, and be submitted.

    Attributes:
        type: the type of task that it runs.
        function: the function itself.
        options: the options of its tasks.
    """

    #: True if the function takes the context before its params.
    _takes_context: bool

    def __init__(self, type: str, function: Callable[..., R], options: Options) -> None:
        # Before the attributes below, which win over those of the function.
        update_wrapper(self, function)  # type: ignore[arg-type]
        for name in getattr(function, "__dict__", ()):
            if hasattr(self.__class__, name):  # it would hide a method, such as ``submit``
                del vars(self)[name]
        self.type = type
        self.function = function
        self.options = options
        self._queues = Queues()
        own = list(inspect.signature(function).parameters.values())
        if self._takes_context and own[0].kind in (own[0].KEYWORD_ONLY, own[0].VAR_KEYWORD):
            raise ConfigurationError(
                f"executor {type!r}: parameter {own[0]} cannot take a positional argument; the context "
                "is passed as the first one"
            )
        # No param may have the context's name, not even through ``**kwargs``.
        self._reserved = {"ctx", own.pop(0).name} if self._takes_context else {"ctx"}
        self._check_kinds(own)
        self._signature = inspect.Signature(own)
        named = [p for p in own if p.kind is not p.VAR_KEYWORD]
        self._open = len(named) < len(own)
        self._known = frozenset(p.name for p in named)
        self._required = frozenset(p.name for p in named if p.default is p.empty)
        #: The param that ``task(value)`` gives the value; None if such a call may fail.
        self._only_param: str | None = None
        if named and named[0].kind is named[0].POSITIONAL_OR_KEYWORD:
            first = named[0].name
            self._only_param = first if self._required <= {first} else None
        #: The JSON forms of params and result; None if no annotation has one.
        self._values: Values | None = self._values_of(own)

    def __copy__(self) -> Executor[P, R]:
        """Return the executor as one that is registered with no queue."""
        made = object.__new__(type(self))
        vars(made).update(vars(self), _queues=Queues())
        return made

    def _values_of(self, own: Sequence[inspect.Parameter]) -> Values | None:
        return values_of(self.function, own)

    def _check_kinds(self, parameters: list[inspect.Parameter]) -> None:
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise ConfigurationError(
                    f"executor {self.type!r}: parameter {parameter} cannot take a keyword "
                    "argument; params are always passed as keyword arguments"
                )
            if parameter.name == "ctx":
                raise ConfigurationError(
                    f"executor {self.type!r}: ctx must be the first parameter; "
                    "a param of the task cannot be named ctx"
                )

    def __repr__(self) -> str:
        return f"<Executor {self.type!r}>"

    def _bind(self, queue: _Queue) -> None:
        """Note a queue that it is registered with: :meth:`submit` submits to it."""
        self._queues.add(queue)

    def using(self, **options: Unpack[SubmitOptions]) -> BoundExecutor[P, R]:
        """Return this executor bound with options of ``Queue.submit``, for ``submit`` and ``task``.

        Raises:
            TypeError: ``Queue.submit`` has no such option.
            ConfigurationError: an option is not valid.
        """
        return BoundExecutor(self, bound_options(self.type, {}, options))

    def on(self, queue: _Queue) -> BoundExecutor[P, R]:
        """Return this executor bound to a queue that runs or accepts its type.

        Raises:
            ConfigurationError: the argument is not a queue.
        """
        return BoundExecutor(self, {}).on(queue)

    def task(self, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Return a new task with these params as JSON, to change and submit.

        Raises:
            PayloadError: a param is missing or unknown, or does not fit its annotation.
        """
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            named: list[str] = [*self._signature.parameters][: len(args)]
            raise self._misfit({*named, *kwargs.keys()}, f": {error}") from None
        params: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                params.update(value)
            else:
                params[name] = value
        if self._values is not None:
            params = self._values.encode_params(params)
        return Task(type=self.type, params=params)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Submit a task with these params to the queue that the executor is registered with.

        A queue that was stopped does not count, unless there is no other.

        Raises:
            ConfigurationError: the executor is not registered with a queue, or with several.
            PayloadError: a param is missing or unknown, or is neither JSON nor fits its annotation.
            TaskxError: any error that ``Queue.submit`` raises.
        """
        queue = self._queues.only
        if queue is None:
            queue = self._choose_queue()
        return queue.submit(self.task(*args, **kwargs))

    def _choose_queue(self) -> _Queue:
        """Return the queue that :meth:`submit` submits to.

        Raises:
            ConfigurationError: the executor is not registered with a queue, or with several.
        """
        return self._queues.choose(self.type)

    def _task_with(self, params: Any = None) -> Task:
        """Return a new task with params as JSON, which ``submit`` checks.

        Raises:
            PayloadError: no params are given, and the function requires some; or a param does not fit its
                annotation.
        """
        if params is None and self._required:
            required = [name for name in self._signature.parameters if name in self._required]
            name = getattr(self, "__name__", "")
            call = f"{name if name.isidentifier() else 'executor'}.task({'=…, '.join(required)}=…)"
            raise PayloadError(
                "params", f"{self.type!r} requires {', '.join(required)}: write {call}"
            )
        if self._values is not None and isinstance(params, Mapping):
            params = self._values.encode_params(params)
        return Task(type=self.type, params={} if params is None else params)

    def _check_params(self, params: Mapping[str, Any]) -> None:
        """Raise ``PayloadError`` if the params do not fit the function."""
        given = params.keys()
        if self._required <= given and (
            given <= self._known or (self._open and self._reserved.isdisjoint(given))
        ):
            return
        raise self._misfit(given)

    def _misfit(self, given: Set[str], other: str = "") -> PayloadError:
        """Return the error for params that do not fit: it names all that are missing or unknown."""
        wrong = []
        if missing := sorted(self._required - given):
            wrong.append(f" requires {', '.join(missing)}")
        if extra := given & self._reserved if self._open else given - self._known:
            wrong.append(f" does not take {', '.join(sorted(map(repr, extra)))}")
        takes = [*self._signature.parameters]
        if self._open:
            takes[-1] = f"**{takes[-1]}"
        text = f"{self.type!r}{' and'.join(wrong) or other}; it takes {', '.join(takes) or 'no params'}"
        if "connection" in extra:
            text += "; write queue.submit(executor, {…}, connection=…)"
        if misplaced := sorted(extra & SubmitOptions.__optional_keys__):
            text += f"; options are given as using({'=…, '.join(misplaced)}=…).submit(…)"
        return PayloadError("params", text)


class BoundExecutor(Generic[P, R]):
    """An executor together with options for its submits, and with a queue if one was given.

    ``Executor.using`` and ``Executor.on`` make it. It does not change. ``Queue.submit``, ``map`` and
    ``schedule``, ``chain`` and ``group`` take it like an executor.

    Attributes:
        executor: the executor.
        options: the options of its submits.
        queue: the queue that :meth:`on` has bound it to, or None.
    """

    def __init__(
        self, executor: Executor[P, R], options: Mapping[str, Any], queue: _Queue | None = None
    ) -> None:
        self.executor = executor
        self.options = MappingProxyType(dict(options))
        self.queue = queue

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"<BoundExecutor {self.type!r}{f' with {options}' if options else ''}>"

    @property
    def type(self) -> str:
        """The type of task that it runs."""
        return self.executor.type

    def using(self, **options: Unpack[SubmitOptions]) -> BoundExecutor[P, R]:
        """Return a copy with further options; they win over the earlier ones.

        Raises:
            TypeError: ``Queue.submit`` has no such option.
            ConfigurationError: an option is not valid.
        """
        bound = bound_options(self.type, self.options, options)
        return BoundExecutor(self.executor, bound, self.queue)

    def on(self, queue: _Queue) -> BoundExecutor[P, R]:
        """Return a copy whose :meth:`submit` submits to this queue, which runs or accepts its type.

        Raises:
            ConfigurationError: the argument is not a queue.
        """
        if not callable(getattr(queue, "register_executor", None)):
            raise ConfigurationError(f"on() requires a Queue, not {queue!r}")
        return BoundExecutor(self.executor, self.options, queue)

    def task(self, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Return a new task with these params and the bound options, to change and submit.

        Raises:
            PayloadError: a param is missing or unknown.
            ConfigurationError: an option concerns only a submit: ``delay``, ``on_conflict``, or
                ``expires`` in seconds.
        """
        return self._set_on(self.executor.task(*args, **kwargs))

    def _task_with(self, params: Any = None) -> Task:
        """Return a new task with params that ``submit`` checks, and the bound options.

        Raises:
            PayloadError: no params are given, and the function requires some.
            ConfigurationError: an option concerns only a submit: ``delay``, ``on_conflict``, or
                ``expires`` in seconds.
        """
        return self._set_on(self.executor._task_with(params))

    def _set_on(self, task: Task) -> Task:
        if unfit := of_submit(self.options):
            raise ConfigurationError(
                f"a Task cannot hold {', '.join(unfit)}, which only a submit can have: call submit, or "
                "give run_at instead of delay and a datetime as expires"
            )
        return with_options(task, self.options, 0)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Submit a task with these params and the bound options.

        Raises:
            ConfigurationError: no queue was given with :meth:`on`, and the executor is not registered with
                a queue, or with several.
            PayloadError: a param is missing, unknown or not JSON.
            TaskxError: any error that ``Queue.submit`` raises.
        """
        queue = self.executor._choose_queue() if self.queue is None else self.queue
        return queue.submit(self.executor.task(*args, **kwargs), **self.options)


#: An executor that can stand for its task.
AnyExecutor = Executor[..., Any] | BoundExecutor[..., Any]


def executor_of(
    thing: Any, what: str, wanted: str = "a type, an executor or a Task", queue: object = None
) -> tuple[Executor[..., Any], Mapping[str, Any]]:
    """Return an executor, and the options that it is bound with.

    Raises ``ConfigurationError`` if the thing is no executor, since ``what`` requires what is ``wanted``,
    or if it is bound to another queue than this one.
    """
    if isinstance(thing, BoundExecutor):
        if queue is not None and thing.queue not in (None, queue):
            raise ConfigurationError(
                f"{what} got {thing!r}, which on() has bound to another queue: call its own submit, or "
                "leave on() out"
            )
        return thing.executor, thing.options
    if isinstance(thing, Executor):
        return thing, {}
    hint = its_type(thing)
    if inspect.isfunction(thing):
        hint = f"; decorate {thing.__name__}() with @queue.executor()"
    raise ConfigurationError(f"{what} requires {wanted}, not {thing!r:.80}{hint}")


class PlainExecutor(Executor[P, R]):
    """An executor whose function takes only its params."""

    _takes_context = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)


class ContextExecutor(Executor[P, R]):
    """An executor whose function takes a :class:`Context` first."""

    _takes_context = True

    def __call__(self, ctx: Context, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return self.function(ctx, *args, **kwargs)
        except AttributeError as error:
            if ctx is not None or error.obj is not None or not hasattr(Context, error.name or ""):
                raise
            raise ConfigurationError(
                f"executor {self.type!r} uses ctx.{error.name}, and was called with None as its ctx: in a "
                "test, run_executor of taskx.testing gives it one"
            ) from error


class AsyncExecutor(Executor[P, R]):
    """An executor made from a coroutine function. A call returns a coroutine."""

    def __init__(
        self, type: str, function: Callable[..., Any], options: Options, *, takes_context: bool
    ) -> None:
        self._takes_context = takes_context
        super().__init__(type, function, options)

    async def __call__(self, *args: Any, **kwargs: Any) -> R:
        return await self.function(*args, **kwargs)  # type: ignore[misc, no-any-return]


class EmittingExecutor(AsyncExecutor[P, None]):
    """An executor made from an asynchronous generator function: its tasks emit what it yields.

    A call returns the generator.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        return self.function(*args, **kwargs)  # type: ignore[return-value]


class BatchExecutor(Executor[[T], R], Generic[T, R]):
    """An executor whose function takes a list of the params of tasks, and returns a list of results.

    ``submit`` and ``task`` take the params of one task.
    """

    def __init__(self, type: str, function: Callable[..., Any], options: Options) -> None:
        own = [*inspect.signature(function).parameters.values()]
        self._takes_context = bool(own) and _is_context(own[0])
        super().__init__(type, function, options)
        taken = [*self._signature.parameters.values()]
        needed = [p for p in taken if p.default is p.empty]
        if not taken or needed not in ([], taken[:1]) or taken[0].kind is not _BY_PLACE:
            raise ConfigurationError(
                f"executor {type!r} has batch=…, so its function must take one list, with the params of "
                "each task, after ctx if that is its first parameter"
            )
        # The params are those of the items.
        self._only_param, self._required = None, frozenset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def _values_of(self, own: Sequence[inspect.Parameter]) -> Values | None:
        return values_of(self.function, own[:1], ItemValues) if own else None

    def task(self, params: T, /) -> Task:
        """Return a new task with these params as JSON, to change and submit.

        Raises:
            PayloadError: the params are no object, or do not fit their annotation.
        """
        return self._task_with(params)

    def _task_with(self, params: Any = None) -> Task:
        if params is None:
            raise PayloadError(
                "params", f"{self.type!r} requires the params of the task, an object"
            )
        if self._values is not None:
            params = self._values.encode_params(params)
        if not isinstance(params, Mapping):
            raise PayloadError(
                "params",
                f"the params of a task of {self.type!r} must be an object, not {params!r:.80}",
            )
        return Task(type=self.type, params=dict(params))

    def _check_params(self, params: Mapping[str, Any]) -> None:
        if self._values is not None:
            self._values.decode_params(params)

    def _together(self, ctx: BatchContext, params: list[Any]) -> Any:
        """Call the function with the params of tasks."""
        if (values := self._values) is not None:
            params = [values.decode_params(one) for one in params]
        return self.function(*((ctx,) if self._takes_context else ()), params)


_BY_PLACE = inspect.Parameter.POSITIONAL_OR_KEYWORD
_CONTEXTS = {"Context": Context, "BatchContext": BatchContext}


def _is_context(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = _CONTEXTS.get(annotation.rpartition(".")[2])
    return parameter.name == "ctx" or annotation is Context or annotation is BatchContext


def make_executor(
    function: Callable[..., Any], type: str | None, options: Options
) -> Executor[Any, Any]:
    """Return an executor for a function; its first parameter, or ``batch``, decides between the kinds."""
    name = check_name(getattr(function, "__name__", "") if type is None else type, "type")
    if not name:
        raise ConfigurationError(f"{function!r} requires a type: executor('name')")
    if not callable(function):
        raise ConfigurationError(f"executor {name!r} must be a function, not {function!r}")
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except ValueError:
        raise ConfigurationError(
            f"executor {name!r}: {function!r} does not tell its parameters; wrap it in a function"
        ) from None
    if options.batch is not None:
        check_plain(function, f"executor {name!r} with batch=…")
        return BatchExecutor(name, function, options)
    check_plain(function, f"executor {name!r}", or_async=True)
    takes_context = first is not None and _is_context(first)
    if is_async_generator(function):
        return EmittingExecutor(name, function, options, takes_context=takes_context)
    if is_async(function):
        return AsyncExecutor(name, function, options, takes_context=takes_context)
    return (ContextExecutor if takes_context else PlainExecutor)(name, function, options)


class ExecutorDecorator:
    """The decorator that ``executor(…)`` returns. It makes an executor from a function."""

    def __init__(
        self,
        type: str | None,
        options: Options,
        register: Callable[[Executor[Any, Any]], object] = lambda made: None,
    ) -> None:
        self._type = type
        self._options = options
        self._register = register

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[Context, P], AsyncIterator[Any]]
    ) -> EmittingExecutor[P]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, AsyncIterator[Any]]
    ) -> EmittingExecutor[P]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]]
    ) -> AsyncExecutor[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> AsyncExecutor[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], R]) -> ContextExecutor[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> PlainExecutor[P, R]: ...
    def __call__(self, function: Callable[..., Any]) -> Any:
        """Make the executor and, if a queue made this decorator, register it there."""
        made = make_executor(function, self._type, self._options)
        self._register(made)
        return made


class BatchDecorator(ExecutorDecorator):
    """The decorator that ``executor(…, batch=…)`` returns."""

    @overload  # type: ignore[override]
    def __call__(
        self, function: Callable[[BatchContext, list[T]], Sequence[R | Exception]]
    ) -> BatchExecutor[T, R]: ...
    @overload
    def __call__(
        self, function: Callable[[list[T]], Sequence[R | Exception]]
    ) -> BatchExecutor[T, R]: ...
    def __call__(self, function: Callable[..., Any]) -> Any:
        """Make the executor and, if a queue made this decorator, register it there."""
        return super().__call__(function)


def decorator_of(
    type: str | None,
    options: Options,
    register: Callable[[Executor[Any, Any]], object] = lambda made: None,
) -> ExecutorDecorator:
    """Return the decorator that makes an executor with these options."""
    kind = ExecutorDecorator if options.batch is None else BatchDecorator
    return kind(type, options, register)


@overload
def executor(
    type: str | None = None,
    *,
    batch: int,
    wait: Duration | None = None,
    **options: Unpack[PlainOptions],
) -> BatchDecorator: ...
@overload
def executor(type: str | None = None, **options: Unpack[PlainOptions]) -> ExecutorDecorator: ...
def executor(type: str | None = None, **options: Any) -> ExecutorDecorator:
    """Make an executor from the decorated function, to register with a queue later.

    Args:
        type: the type of task that it runs; by default the function's name.
        options: the options of its tasks, as in :meth:`Queue.executor`.

    Raises:
        ConfigurationError: an option is not valid, or the function cannot be an executor.
    """
    if callable(type):
        raise ConfigurationError("write @executor() or @executor('name'), with parentheses")
    return decorator_of(type, options_of(options))


class Registered(NamedTuple):
    """The entry of a type that this queue runs."""

    type: str
    #: Takes the context if ``takes_context`` is true, and the params as keyword arguments.
    function: Callable[..., Any]
    takes_context: bool
    #: Raises ``PayloadError`` for params that do not fit; None if the params are not known.
    check_params: Callable[[Mapping[str, Any]], None] | None
    options: Options
    defaults: Mapping[str, Any]  #: the options stored with a task that does not set them itself
    #: The options set at the start: as ``FALLBACKS``, in that order, and then the version.
    at_start: tuple[Any, ...]
    log_level: int | None  #: the lowest level of log lines that are kept; None keeps none
    values: Values | None  #: the JSON forms of params and result; None if no annotation has one
    expires: int | None  #: milliseconds in which its tasks must start; None for no limit
    #: The row of a task without options; None if more than a row is needed to make one.
    model: Mapping[str, Any] | None
    #: Calls the executor for many tasks; None if it takes one at a time.
    together: Together | None = None


def apply_defaults(tasks: Iterable[Task], registered: Mapping[str, Registered]) -> None:
    """Set the options that neither a task nor its submit has set, and the version, before the start."""
    for task in tasks:
        timeout, max_attempts, max_crashes, task.version = registered[task.type].at_start
        if task.timeout is None:
            task.timeout = timeout
        if task.max_attempts is None:
            task.max_attempts = max_attempts
        if task.max_crashes is None:
            task.max_crashes = max_crashes


def entry_of(executor: TaskExecutor | Executor[Any, Any], options: Options) -> Registered:
    """Return a queue's entry for an executor; the given options win over the executor's own.

    Raises ``ConfigurationError`` if the executor or an option is not valid.
    """
    check: Callable[[Mapping[str, Any]], None] | None = None
    together: Together | None = None
    if isinstance(executor, Executor):
        options, check = executor.options.overridden(options), executor._check_params
        type, takes_context = executor.type, executor._takes_context
        function = _sync(executor.function)
        values = executor._values
    else:
        type, function, takes_context = _type_of(executor), _classic(executor), True
        values = values_of(executor.execute)
    check_batch(type, options, batches=isinstance(executor, BatchExecutor))
    if isinstance(executor, BatchExecutor):
        together = executor._together
        function, takes_context = alone(together, values), True
    elif values is not None:
        function = _coding(function, values)
    if (
        not together
        and isinstance(executor, Executor)
        and PREVIOUS in executor._signature.parameters
    ):
        function, takes_context = _passing(function, takes_context=takes_context), True
    defaults = options.task_defaults
    model = None
    if values is None and options.expires is None and not options.tags:
        model = model_of(type, priority=options.priority or 0, **defaults)
    return Registered(
        type=type,
        function=function,
        takes_context=takes_context,
        check_params=check,
        options=options,
        defaults=defaults,
        at_start=(*{**FALLBACKS, **defaults}.values(), options.version),
        log_level=log_level(options.capture_log),
        values=values,
        expires=None if options.expires is None else lifetime(options.expires),
        model=model,
        together=together,
    )


def check_batch(type: str, options: Options, *, batches: bool) -> None:
    """Raise ``ConfigurationError`` if an executor cannot have its options for calls with many tasks."""
    if options.wait is not None and options.batch is None:
        raise ConfigurationError(f"executor {type!r}: wait requires batch")
    if options.batch is None:
        return
    wrong = ""
    if not batches:
        wrong = "requires a function that was decorated with it: @queue.executor(…, batch=…)"
    elif options.isolation is not None:
        wrong = 'cannot be combined with isolation="process": a child process runs one task'
    elif options.stall is not None:
        wrong = "cannot be combined with stall: a call for many tasks gives no sign of life"
    elif options.max_crashes == 1:
        wrong = "cannot be combined with max_crashes=1: such a task runs in a call of its own"
    if wrong:
        raise ConfigurationError(f"executor {type!r}: batch {wrong}")


def _sync(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that waits for a coroutine function; any other function as it is.

    What an asynchronous generator yields is emitted.
    """
    if is_async_generator(function):
        function = _emitting(function)
    if not is_async(function):
        return function

    def call(*args: Any, **params: Any) -> Any:
        return wait_for(function(*args, **params))

    return call


def _emitting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a coroutine function that emits what an asynchronous generator function yields."""

    async def emit(*args: Any, **params: Any) -> None:
        context = current_context()
        assert context is not None  # a run calls it
        async with aclosing(function(*args, **params)) as pieces:
            async for piece in pieces:
                context.emit(piece)

    return emit


def wait_for(
    coroutine: Coroutine[Any, Any, T], enter: Callable[[Awaited], object] = lambda begun: None
) -> T:
    """Run a coroutine for the executor that calls this, on the queue's loop, and return its result.

    ``enter`` is called in the context of variables that the coroutine gets.
    """
    context, inside = current_context(), awaited.get() is not None
    assert context is not None  # a run calls the executor

    def begin(begun: Awaited) -> None:
        awaited.set(context)
        enter(begun)

    return context._wait_for(coroutine, begin, inside=inside)


def _coding(function: Callable[..., Any], values: Values) -> Callable[..., Any]:
    """Return a function that takes JSON params and returns a JSON result."""

    def call(*context: Context, **params: Any) -> Any:
        return values.encode_result(function(*context, **values.decode_params(params)))

    return call


def _passing(function: Callable[..., Any], *, takes_context: bool) -> Callable[..., Any]:
    """Return a function that gets the result of the step before it in a flow, unless it is given one."""

    def call(ctx: Context, /, **params: Any) -> Any:
        if PREVIOUS not in params and ctx.task.flow and ctx.task.depends_on:
            results = [parent.result for parent in ctx.parents]
            params[PREVIOUS] = results[0] if len(results) == 1 else results
        return function(*((ctx,) if takes_context else ()), **params)

    return call


def _type_of(executor: Any) -> str:
    if isinstance(executor, BoundExecutor):
        raise ConfigurationError(
            f"{executor!r} is bound with options of submits: register the executor itself"
        )
    type_ = getattr(executor, "type", None)
    if inspect.isclass(executor) or not callable(getattr(executor, "execute", None)) or not type_:
        raise ConfigurationError(
            f"{executor!r} is not an executor; expected an instance of TaskExecutor with type and "
            "execute(ctx, task), or a function decorated with @executor(…)"
        )
    check_plain(executor.execute, f"executor {type_!r}", or_async=True)
    return check_name(type_, "type")


def _classic(executor: TaskExecutor) -> Callable[..., Any]:
    call = _sync(executor.execute)

    def execute(ctx: Context, /, **_: Any) -> Any:
        task = ctx.task
        returned = call(ctx, task)
        return task.result if returned is None else returned

    return execute
