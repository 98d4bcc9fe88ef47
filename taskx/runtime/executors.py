"""Executors: the code for a type of task, as a class or as a function, and their registry."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    get_args,
    overload,
)

import attrs

from taskx.core.checks import check_int, check_number, check_plain
from taskx.core.errors import ConfigurationError, PayloadError, UnknownTaskType
from taskx.core.model import Task, check_name
from taskx.core.payload import DEFAULT_MAX_SIZE
from taskx.core.rate import rate_of
from taskx.core.retry import RetryPolicy, check_policy
from taskx.runtime.capture import log_level
from taskx.runtime.context import Context
from taskx.runtime.limits import Limit, LimitScope
from taskx.runtime.middleware import Layer, wrapped

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

    from taskx.runtime.handles import TaskHandle

P = ParamSpec("P")
R = TypeVar("R")

MAX_PRIORITY = 1_000_000
#: Seconds that an executor is given after its token has fired, where nobody says otherwise.
DEFAULT_GRACE = 10.0
#: Where an executor runs, if not in the worker's thread.
Isolation = Literal["process"]


class TaskExecutor(ABC):
    """An executor as a class: set ``type``, implement :meth:`execute`.

    Attributes:
        type: the type of task it runs.
    """

    type: str

    @abstractmethod
    def execute(self, ctx: Context, task: Task) -> Any:
        """Run the task.

        ``task`` is this run's copy: of what is done to it only ``task.result`` counts, and a value
        that is returned wins over that. To raise is to fail the attempt.
        """


class ExecutorOptions(TypedDict, total=False):
    """The options of an executor, each of which may be left out or None: see :class:`Options`."""

    max_attempts: int | None
    max_crashes: int | None
    timeout: float | None
    priority: int | None
    retry: RetryPolicy | None
    capture_log: bool | int | str | None
    isolation: Isolation | None
    grace: float | None
    max_concurrency: int | None
    rate: str | tuple[int, float] | None
    burst: int | None
    limit_scope: LimitScope | None


def check_options(
    max_attempts: int | None, max_crashes: int | None, timeout: float | None, priority: int | None
) -> None:
    """``ConfigurationError`` for an option, of an executor or a task, that is not valid."""
    if max_attempts is not None:
        check_int(max_attempts, "max_attempts", 1)
    if max_crashes is not None:
        check_int(max_crashes, "max_crashes", 1)
    if timeout is not None and check_number(timeout, "timeout") == 0:
        raise ConfigurationError("timeout must be above 0 seconds; None means no time-out")
    # No call for the usual 0; but False is no number.
    if priority is not None and (priority or type(priority) is not int):
        check_int(priority, "priority", -MAX_PRIORITY, MAX_PRIORITY)


@attrs.frozen(kw_only=True)
class Options:
    """How tasks are run, unless ``submit`` says otherwise for one of them.

    Attributes:
        max_attempts: attempts that may raise before the task is failed; from 1.
        max_crashes: deaths of the process before the task is failed; from 1.
        timeout: seconds after which an attempt's token fires.
        priority: higher runs first.
        retry: when an attempt that raised is followed by another; None: at once.
        capture_log: keep what the executor logs with the record: True for what is of level INFO and
            above, or a level; None and False: do not.
        isolation: ``"process"``: each attempt in a child process of its own; None: in the worker's
            thread.
        grace: seconds that an executor is given after its token has fired. Then its child process is
            killed; in a thread it is given up, if it was for a time-out.
        max_concurrency: how many tasks of the type run at once; from 1.
        rate: how many start in a time: ``"100/m"``, or a count and seconds.
        burst: how many may start at once when none did for a while; the count of the rate unless given.
        limit_scope: ``"node"``, so also unless given: each node has these limits for itself;
            ``"global"``: all nodes on the repository have them together.
    """

    max_attempts: int | None = None
    max_crashes: int | None = None
    timeout: float | None = None
    priority: int | None = None
    retry: RetryPolicy | None = None
    capture_log: bool | int | str | None = None
    isolation: Isolation | None = None
    grace: float | None = None
    max_concurrency: int | None = None
    rate: str | tuple[int, float] | None = None
    burst: int | None = None
    limit_scope: LimitScope | None = None

    def __attrs_post_init__(self) -> None:
        check_options(self.max_attempts, self.max_crashes, self.timeout, self.priority)
        check_policy(self.retry)
        log_level(self.capture_log)
        if self.isolation not in (None, "process"):
            raise ConfigurationError(f'isolation must be "process" or None, not {self.isolation!r}')
        if self.grace is not None:
            check_number(self.grace, "grace")
        if self.max_concurrency is not None:
            check_int(self.max_concurrency, "max_concurrency", 1)
        rate_of(self.rate, self.burst)
        if self.limit_scope not in (None, *get_args(LimitScope)):
            known = " or ".join(map(repr, get_args(LimitScope)))
            raise ConfigurationError(f"limit_scope must be {known}, not {self.limit_scope!r}")

    @property
    def limit(self) -> Limit | None:
        """How many run at once and start in a time; None where there is no limit.

        Raises:
            ConfigurationError: an option belongs to a limit that is not there.
        """
        if self.max_concurrency is None and self.rate is None:
            if self.limit_scope is not None or self.burst is not None:
                raise ConfigurationError(
                    "limit_scope and burst are of a limit: give max_concurrency or rate, too"
                )
            return None
        if self.burst is not None and self.rate is None:
            raise ConfigurationError("burst is of a rate: give one, too")
        rate = rate_of(self.rate, self.burst)
        return Limit(self.max_concurrency, rate, self.limit_scope or "node")

    @property
    def patience(self) -> float:
        """Seconds that an executor is given after its token has fired."""
        return DEFAULT_GRACE if self.grace is None else self.grace

    @property
    def attempts(self) -> int | None:
        """Attempts that may raise: as said, or as the retry policy says."""
        if self.max_attempts is None and self.retry is not None:
            return self.retry.max_attempts
        return self.max_attempts


def options_of(given: Mapping[str, Any]) -> Options:
    """The options that were given; TypeError names those that there are not."""
    if unknown := given.keys() - ExecutorOptions.__optional_keys__:
        raise TypeError(f"executor() has no option {', '.join(sorted(unknown))}")
    return Options(**given)


class _Submits(Protocol):
    def submit(self, task: Task, /) -> TaskHandle[Any]: ...


class Executor(Generic[P, R]):
    """An executor made of a function: still callable as that function, and submittable.

    Attributes:
        type: the type of task it runs.
        function: the function itself.
        options: how its tasks are run.
    """

    def __init__(self, type: str, function: Callable[..., R], options: Options) -> None:
        self.type = type
        self.function = function
        self.options = options
        self._parameters = Parameters(type, function)
        self._queue: _Submits | None = None
        update_wrapper(self, function)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<Executor {self.type!r}>"

    def bind(self, queue: _Submits) -> None:
        """Note the queue that :meth:`submit` submits to: the last one it was registered with."""
        self._queue = queue

    def task(self, *args: P.args, **kwargs: P.kwargs) -> Task:
        """A task of these params, to be changed and submitted.

        Raises:
            PayloadError: a parameter is missing, or unknown.
        """
        return Task(type=self.type, params=self._parameters.bind(args, kwargs))

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Submit a task of these params to the queue the executor is registered with.

        Raises:
            ConfigurationError: it is registered with none.
            PayloadError: a parameter is missing, unknown or not JSON; and what ``Queue.submit`` raises.
        """
        if self._queue is None:
            raise ConfigurationError(
                f"executor {self.type!r} is not registered with a queue: "
                "call queue.register_executor(…) first"
            )
        return self._queue.submit(self.task(*args, **kwargs))

    def check_params(self, params: Mapping[str, Any]) -> None:
        """Refuse params that do not fit the function with a ``PayloadError``."""
        self._parameters.check(params)

    def invoke(self, ctx: Context, params: Mapping[str, Any]) -> R:
        """Run the function for a task of these params."""
        if self._parameters.takes_context:
            return self.function(ctx, **params)
        return self.function(**params)


class PlainExecutor(Executor[P, R]):
    """An executor whose function takes its params alone."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        return self.function(*args, **kwargs)


class ContextExecutor(Executor[P, R]):
    """An executor whose function takes a :class:`Context` first."""

    def __call__(self, ctx: Context, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        return self.function(ctx, *args, **kwargs)


class Parameters:
    """The params that a function takes."""

    def __init__(self, type: str, function: Callable[..., Any]) -> None:
        self._type = type
        if not callable(function):
            raise ConfigurationError(f"executor {type!r} must be a function, not {function!r}")
        check_plain(function, f"executor {type!r}")
        parameters = list(inspect.signature(function).parameters.values())
        self.takes_context = bool(parameters) and _is_context(parameters[0])
        own = parameters[1:] if self.takes_context else parameters
        self._check_kinds(own)
        self._signature = inspect.Signature(own)
        self._open = any(p.kind is p.VAR_KEYWORD for p in own)
        # Nothing may arrive under the context's name, by ``**kwargs`` neither.
        self._reserved = {"ctx", *(p.name for p in parameters[: self.takes_context])}
        named = [p for p in own if p.kind is not p.VAR_KEYWORD]
        self._known = frozenset(p.name for p in named)
        self._required = frozenset(p.name for p in named if p.default is p.empty)

    def _check_kinds(self, parameters: list[inspect.Parameter]) -> None:
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise ConfigurationError(
                    f"executor {self._type!r}: params arrive as keyword arguments, "
                    f"which {parameter} cannot take"
                )
            if parameter.name == "ctx":
                raise ConfigurationError(
                    f"executor {self._type!r}: ctx must be the first parameter; "
                    "no task parameter may bear that name"
                )

    def check(self, params: Mapping[str, Any]) -> None:
        """Refuse params that do not fit with a ``PayloadError``."""
        given = params.keys()
        if self._required <= given and (
            given <= self._known or (self._open and self._reserved.isdisjoint(given))
        ):
            return
        if missing := sorted(self._required - given):
            raise PayloadError("params", f"{self._type!r} needs {', '.join(missing)}")
        extra = given & self._reserved if self._open else given - self._known
        unknown = ", ".join(sorted(map(repr, extra)))
        known = ", ".join(sorted(self._known)) or "none"
        raise PayloadError("params", f"{self._type!r} takes no {unknown}; it takes {known}")

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments as params; ``PayloadError`` where they do not fit."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            takes = ", ".join(self._signature.parameters) or "nothing"
            raise PayloadError("params", f"{self._type!r}: {error}; it takes {takes}") from None
        params: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                params.update(value)
            else:
                params[name] = value
        return params


def _is_context(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = Context if annotation.rpartition(".")[2] == "Context" else None
    return parameter.name == "ctx" or annotation is Context


def make_executor(
    function: Callable[..., Any], type: str | None, options: Options
) -> PlainExecutor[Any, Any] | ContextExecutor[Any, Any]:
    """The executor of a function, of the kind that its first parameter asks for."""
    name = check_name(getattr(function, "__name__", "") if type is None else type, "type")
    if not name:
        raise ConfigurationError(f"the type of {function!r} must be given: executor('name')")
    kind = ContextExecutor if Parameters(name, function).takes_context else PlainExecutor
    return kind(name, function, options)


class ExecutorDecorator:
    """What ``executor(…)`` returns: makes an executor of the function below it."""

    def __init__(
        self,
        type: str | None,
        options: Options,
        register: Callable[[Executor[Any, Any]], object] | None = None,
    ) -> None:
        self._type = type
        self._options = options
        self._register = register

    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], R]) -> ContextExecutor[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> PlainExecutor[P, R]: ...
    def __call__(self, function: Callable[..., Any]) -> Any:
        """Make and, on a queue, register the executor."""
        made = make_executor(function, self._type, self._options)
        if self._register is not None:
            self._register(made)
        return made


def executor(type: str | None = None, **options: Unpack[ExecutorOptions]) -> ExecutorDecorator:
    """Make an executor of the function below, to be registered with a queue later.

    Args:
        type: the type of task it runs; the function's name unless given.
        options: how its tasks are run: ``max_attempts``, ``max_crashes``, ``timeout``, ``priority``,
            ``retry``, ``capture_log``, ``isolation``, ``grace``, ``max_concurrency``, ``rate``, ``burst``
            and ``limit_scope``, as :meth:`Queue.executor` takes them.

    Raises:
        ConfigurationError: an option is not valid, or the function cannot be an executor.
    """
    if callable(type):
        raise ConfigurationError("write @executor() or @executor('name'), with parentheses")
    return ExecutorDecorator(type, options_of(options))


class Registered(NamedTuple):
    """A type that this queue runs."""

    type: str
    invoke: Callable[[Context, Mapping[str, Any]], Any]
    check_params: Callable[[Mapping[str, Any]], None] | None
    options: Options
    log_level: int | None


class Registry:
    """The types that a queue runs or, where they were only declared, accepts.

    Args:
        middleware: what is wrapped around every execution, the first one outermost.
        check: refuses what the queue cannot do, before an executor is added.
        max_payload_size: the largest result, in bytes of JSON.
    """

    def __init__(
        self,
        middleware: Sequence[Layer] = (),
        check: Callable[[Registered], object] = lambda entry: None,
        max_payload_size: int = DEFAULT_MAX_SIZE,
    ) -> None:
        self._middleware = middleware
        self._check = check
        self._max_payload_size = max_payload_size
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

        Raises:
            ConfigurationError: its type is taken, it is no executor, or it is to run in a child
                process, which could not find it.
        """
        entry = entry_of(executor, options)
        if entry.type in self.registered:
            raise ConfigurationError(
                f"type {entry.type!r} has an executor already: make a new queue, or choose another type"
            )
        self._check(entry)
        limit = entry.options.limit
        invoke = entry.invoke
        if entry.options.isolation is not None:
            from taskx.runtime.isolation import Isolated  # not every program starts processes

            invoke = Isolated(executor, entry, self._max_payload_size)
        invoke = wrapped(invoke, self._middleware)
        if limit is not None:  # first: as soon as it is registered, its tasks are taken
            self.limits[entry.type] = limit
        self.registered[entry.type] = entry._replace(invoke=invoke)

    def declare(self, type: str) -> None:
        """Accept a type whose executor lives in another process."""
        self._declared.add(type)

    def get(self, type: str) -> Registered | None:
        """The executor of a type; None if it is only declared.

        Raises:
            UnknownTaskType: it is neither registered nor declared.
        """
        entry = self.registered.get(type)
        if entry is None and type not in self._declared:
            known = ", ".join(sorted({*self.registered, *self._declared})) or "none"
            raise UnknownTaskType(
                f"no executor is registered for type {type!r} (known: {known}); register one, or "
                "declare() the type if it runs in another process"
            )
        return entry


def entry_of(executor: TaskExecutor | Executor[Any, Any], options: Options) -> Registered:
    """What a queue keeps of an executor; options given here win over its own.

    Raises:
        ConfigurationError: it is no executor.
    """
    if isinstance(executor, Executor):
        given = {k: v for k, v in attrs.asdict(options, recurse=False).items() if v is not None}
        options = attrs.evolve(executor.options, **given)
        return Registered(
            type=executor.type,
            invoke=executor.invoke,
            check_params=executor.check_params,
            options=options,
            log_level=log_level(options.capture_log),
        )
    type_ = getattr(executor, "type", None)
    if inspect.isclass(executor) or not callable(getattr(executor, "execute", None)) or not type_:
        raise ConfigurationError(
            f"{executor!r} is no executor: give an instance of a TaskExecutor with type and "
            "execute(ctx, task), or a function under @executor(…)"
        )
    check_plain(executor.execute, f"executor {type_!r}")
    return Registered(
        type=check_name(type_, "type"),
        invoke=_classic(executor),
        check_params=None,
        options=options,
        log_level=log_level(options.capture_log),
    )


def _classic(executor: TaskExecutor) -> Callable[[Context, Mapping[str, Any]], Any]:
    def invoke(ctx: Context, _: Mapping[str, Any]) -> Any:
        task = ctx.task
        returned = executor.execute(ctx, task)
        return task.result if returned is None else returned

    return invoke
