"""Faults on purpose: errors and killed processes at named points, and repositories that fail or stall."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Literal, NoReturn, get_args

import attrs

import taskx.queue
from taskx.attempt.runner import Call, Run
from taskx.queue.queue import Queue
from taskx.stores.base import Reads, Repository
from taskx.stores.eight import TaskRepository
from taskx.tasks.checks import check_int, check_number
from taskx.tasks.errors import ConfigurationError, RepositoryError, RepositoryUnavailable
from taskx.tasks.lifecycle import RUNNING
from taskx.tasks.writes import Insert, Write
from taskx.testing.clock import ManualClock

#: The points of :func:`fail_at` and :func:`kill_at`, in the order in which a task comes to them. They
#: are in commits of TaskX, not in those of a program's own transactions.
Point = Literal[
    "before submit commit",
    "after submit commit",
    "before start commit",
    "after start commit",
    "in the executor",
    "before outcome commit",
    "after outcome commit",
]
_OUTCOMES = {"complete", "fail", "retry", "snooze", "interrupt", "cancelled", "crash"}
_METHODS = sorted(Repository.__abstractmethods__ | TaskRepository.__abstractmethods__)
_READS = sorted(name for name in vars(Reads) if not name.startswith("_"))
# Seconds between two looks whether a child process has ended.
_POLL = 0.01


class InjectedFault(Exception):
    """The error that :func:`fail_at` raises in an executor unless another one is given."""


@attrs.define(eq=False)
class Fault:
    """A fault that is set: how often a task has come to its point.

    Attributes:
        point: the point.
        hits: how often the fault has struck.
    """

    point: str
    hits: int = 0


@contextmanager
def fail_at(
    queue: Queue,
    point: Point,
    error: BaseException | type[BaseException] | None = None,
    *,
    times: int = 1,
) -> Iterator[Fault]:
    """Raise an error where the tasks of a queue come to a point, inside the block.

    A commit that fails "before" has changed nothing. One that fails "after" has taken place, and its error
    says so (``in_doubt``), as when the answer of a server is lost.

    Args:
        queue: any queue, started or not, also one of the test kit.
        point: where, such as ``"after start commit"``: see :data:`Point`.
        error: what to raise; by default ``RepositoryUnavailable`` in a commit, :class:`InjectedFault` in an
            executor.
        times: how often; then tasks pass again.

    Raises:
        AssertionError: the block has ended, and no task came to the point.
        ConfigurationError: there is no such point.
    """
    _check_point(point)
    check_int(times, "times", 1)
    fault, lock = Fault(point), threading.Lock()

    def strike() -> None:
        with lock:
            if fault.hits >= times:
                return
            fault.hits += 1
        raise _error_at(point, error)

    remove = _install(queue, point, strike)
    try:
        yield fault
    finally:
        remove()
    if not fault.hits:
        raise AssertionError(f"no task came to the point {_named(point)}")


def kill_at(
    point: Point,
    program: Callable[..., object],
    *args: Any,
    passing: int = 1,
    timeout: float = 60.0,
) -> None:
    """Run ``program(*args)`` in a child process, which is killed (SIGKILL) at a point; return after that.

    The child is forked, so the program may be any function. It must make its own queue, on a repository
    that processes share, such as ``SQLiteRepository``. No queue of the test process should be started.

    Args:
        point: where: see :data:`Point`.
        program: what the child process runs.
        args: its arguments.
        passing: which passing of the point, from 1.
        timeout: seconds after which the child is killed and this fails.

    Raises:
        AssertionError: the program ended, or took too long, before it came to the point.
        ConfigurationError: there is no such point.
    """
    _check_point(point)
    check_int(passing, "passing", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside other threads
        child = os.fork()
    if not child:
        _run_child(point, passing, partial(program, *args))
    status = _wait_for(child, timeout)
    if status is None:
        raise AssertionError(
            f"the program did not come to the point {_named(point)} in {timeout:g} s"
        )
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        code = os.waitstatus_to_exitcode(status)
        raise AssertionError(
            f"the program ended with exit code {code} before it came to the point {_named(point)}"
        )


# --- the points


def _check_point(point: Any) -> None:
    if point not in get_args(Point):
        known = ", ".join(map(repr, get_args(Point)))
        raise ConfigurationError(f"point must be one of {known}, not {point!r}")


def _named(point: str) -> str:
    beside = " outside of its own transactions" if point.endswith("commit") else ""
    return f"{point!r}{beside}"


def _error_at(point: str, error: BaseException | type[BaseException] | None) -> BaseException:
    if isinstance(error, type):
        return error()
    if error is not None:
        return error
    if point == "in the executor":
        return InjectedFault(f"injected {point}")
    unavailable = RepositoryUnavailable(f"injected {point}")
    unavailable.in_doubt = point.startswith("after")
    return unavailable


def _install(queue: Queue, point: str, strike: Callable[[], None]) -> Callable[[], None]:
    """Have ``strike`` called whenever a task of a queue comes to a point; return what ends that."""
    if point == "in the executor":
        undo_one = _replace(queue._runner, "run", partial(_strike_in_executor, strike))
        undo_many = _replace(queue._runner, "run_call", partial(_strike_in_call, strike))

        def undo() -> None:
            undo_one()
            undo_many()

        return undo
    when, what, _ = point.split()
    return _replace(queue.repository, "apply", partial(_strike_in_commit, strike, when, what))


def _strike_in_executor(
    strike: Callable[[], None], inner: Callable[..., Any], run: Run, worker: str
) -> Any:
    function = run.executor.function

    def call(*args: Any, **params: Any) -> Any:
        strike()
        return function(*args, **params)

    run.executor = run.executor._replace(function=call)
    return inner(run, worker)


def _strike_in_call(
    strike: Callable[[], None], inner: Callable[..., Any], call: Call, *args: Any
) -> Any:
    together = call.executor.together
    assert together is not None

    def struck(*given: Any) -> Any:
        strike()
        return together(*given)

    call.executor = call.executor._replace(together=struck)
    return inner(call, *args)


def _strike_in_commit(
    strike: Callable[[], None],
    when: str,
    what: str,
    inner: Callable[..., Sequence[bool]],
    writes: Sequence[Write],
    **options: Any,
) -> Sequence[bool]:
    meant = [_is(what, write) for write in writes]
    if when == "before" and any(meant):
        strike()
    results = inner(writes, **options)
    if when == "after" and any(held and hit for held, hit in zip(results, meant, strict=True)):
        strike()
    return results


def _is(what: str, write: Write) -> bool:
    """Return whether a write is a submit, a start or an outcome; a new task may be stored as started."""
    if isinstance(write, Insert):
        return what == "submit" or (what == "start" and write.row.get("status") == RUNNING)
    return (
        write.move == "start" if what == "start" else what == "outcome" and write.move in _OUTCOMES
    )


def _replace(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of an object by ``around(method, *args, **options)``; return what undoes that."""
    inner, own = getattr(owner, name), vars(owner).get(name)

    @wraps(inner)
    def call(*args: Any, **options: Any) -> Any:
        return around(inner, *args, **options)

    def undo() -> None:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    setattr(owner, name, call)
    return undo


# --- the child process


def _run_child(point: str, passing: int, program: Callable[[], object]) -> NoReturn:
    """Run a program in this process until it comes to a point; leave nothing to the test runner."""
    code = 1
    try:
        _die_at(point, passing)
        program()
        code = 0
    except BaseException:  # noqa: BLE001  (there is nobody to raise it to)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _die_at(point: str, passing: int) -> None:
    """Kill this process when a task of any queue passes a point for that time."""
    lock, armed, left = threading.Lock(), list[object](), passing

    def strike() -> None:
        nonlocal left
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def arm(queue: Queue) -> None:
        place = queue._runner if point == "in the executor" else queue.repository
        if not any(place is known for known in armed):  # queues may share a repository
            armed.append(place)
            _install(queue, point, strike)

    def wire(inner: Callable[[Queue], None], queue: Queue) -> None:
        inner(queue)
        arm(queue)

    inner = Queue._wire
    Queue._wire = lambda queue: wire(inner, queue)  # type: ignore[method-assign,assignment]
    for queue in list(taskx.queue.queue._queues):
        arm(queue)


def _wait_for(child: int, timeout: float) -> int | None:
    """Wait until a child process has ended; return its status, or None if it had to be killed."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    ended = 0
    try:
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                if time.monotonic() > deadline:
                    return None
                pause.wait(_POLL)
        return status
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# --- a repository that fails


@attrs.define(eq=False)
class _Rule:
    act: Callable[[], object]
    methods: Collection[str]
    after: bool
    left: float


class Faults:
    """Makes a repository fail, stall, or answer late, until :meth:`heal`.

    It replaces the methods of that one object: the primitives of a ``Repository``, those of its ``reads``,
    and the eight methods. So it works with any repository, and with queues that have it already. As a
    context manager, it restores the methods at the end of the block.

    .. code-block:: python

        with Faults(repository) as faults:
            faults.fail(times=2)                       # the next two calls
            faults.fail(OSError, on="put_notes")       # every call of that method
            faults.delay(0.5, on=["find", "ready"])
            faults.heal()

    Args:
        repository: any repository.

    Attributes:
        calls: the names of the methods that were called, in order.
        stalled: an event, which is set when a call stalls.
    """

    def __init__(self, repository: TaskRepository) -> None:
        self.calls: list[str] = []
        self.stalled = threading.Event()
        self._healed = threading.Event()
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._clock = getattr(repository, "clock", None)
        reads = getattr(repository, "reads", None)
        owners = dict.fromkeys(_METHODS, repository) | dict.fromkeys(_READS, reads)
        self._names = [name for name, one in owners.items() if callable(getattr(one, name, None))]
        if not self._names:
            raise ConfigurationError(f"expected a repository, got {type(repository).__name__}")
        self._undo = [
            _replace(owners[name], name, partial(self._call, name)) for name in self._names
        ]

    def fail(
        self,
        error: BaseException | type[BaseException] | None = None,
        *,
        on: str | Sequence[str] | None = None,
        times: int | None = None,
        after: bool = False,
    ) -> None:
        """Have calls raise an error.

        Args:
            error: what to raise; ``RepositoryUnavailable`` by default.
            on: the method, or methods, whose calls fail; all by default.
            times: how many calls; all until :meth:`heal` by default.
            after: let the call do its work first. By default the error then says that it is in doubt.

        Raises:
            ConfigurationError: an argument is not valid.
        """

        def act() -> None:
            raise self._made(error, after=after)

        self._add(act, on, times, after=after)

    def delay(
        self, seconds: float, *, on: str | Sequence[str] | None = None, times: int | None = None
    ) -> None:
        """Have calls answer late: after ``seconds``, by which a ``ManualClock`` of the repository is moved.

        The other arguments are those of :meth:`fail`.
        """
        seconds = check_number(seconds, "seconds")
        self._healed.clear()
        self._add(lambda: self._pause(seconds), on, times, after=True)

    def stall(self, *, on: str | Sequence[str] | None = None, times: int | None = None) -> None:
        """Have calls wait until :meth:`heal`, for tests of queues that are started.

        The arguments are those of :meth:`fail`.
        """
        self._healed.clear()
        self._add(self._wait, on, times, after=False)

    def heal(self) -> None:
        """Let all calls pass from now on, those that stall included."""
        with self._lock:
            self._rules.clear()
        self._healed.set()
        self.stalled.clear()

    def remove(self) -> None:
        """Restore the methods of the repository."""
        self.heal()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _add(self, act: Callable[[], object], on: Any, times: int | None, *, after: bool) -> None:
        methods = self._names if on is None else [on] if isinstance(on, str) else list(on)
        if unknown := sorted(set(methods) - set(self._names)):
            known = ", ".join(self._names)
            raise ConfigurationError(f"no method {', '.join(unknown)}; the repository has {known}")
        left = float("inf") if times is None else check_int(times, "times", 1)
        with self._lock:
            self._rules.append(_Rule(act, methods, after, left))

    def _call(self, name: str, inner: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.calls.append(name)
        self._strike(name, after=False)
        result = inner(*args, **options)
        self._strike(name, after=True)
        return result

    def _strike(self, name: str, *, after: bool) -> None:
        for rule in list(self._rules):
            if rule.after == after and name in rule.methods:
                with self._lock:
                    if rule.left <= 0:
                        continue
                    rule.left -= 1
                rule.act()

    def _made(
        self, error: BaseException | type[BaseException] | None, *, after: bool
    ) -> BaseException:
        if isinstance(error, type):
            return error()
        if error is not None:
            return error
        made: RepositoryError = RepositoryUnavailable("an injected fault")
        made.in_doubt = after
        return made

    def _pause(self, seconds: float) -> None:
        if isinstance(self._clock, ManualClock):
            self._clock.advance(seconds)
        else:
            self._healed.wait(seconds)

    def _wait(self) -> None:
        self.stalled.set()
        self._healed.wait()
