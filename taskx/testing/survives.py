"""Every death of a process: an executor or a flow runs many times, and each time dies at another commit."""

from __future__ import annotations

import linecache
import os
import sqlite3
import sys
import sysconfig
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from copy import deepcopy
from functools import partial
from itertools import count
from numbers import Real
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn, TypeVar, cast

import attrs

from taskx.attempt.checkpoints import Checkpoints
from taskx.attempt.executors import AnyExecutor, BoundExecutor, Executor, TaskExecutor
from taskx.attempt.runner import Runner
from taskx.attempt.waiting import NotDone
from taskx.node.counts import COUNTS
from taskx.queue.flows import Flow, FlowHandle, Shape, chain
from taskx.queue.queue import Queue
from taskx.stores.base import Repository
from taskx.stores.liveness.base import InProcess
from taskx.stores.memory import MemoryRepository
from taskx.stores.sqlite import SQLiteRepository
from taskx.stores.transactions import Transactions
from taskx.tasks.errors import ConfigurationError, InvalidTransition, is_interrupt
from taskx.tasks.lifecycle import ANSWER
from taskx.tasks.model import Task, TaskFilter
from taskx.tasks.writes import Insert, NoteChange, Write
from taskx.testing.clock import ManualClock
from taskx.testing.execution import _register
from taskx.testing.queues import ManualQueue, _replaced

R = TypeVar("R")

# Files with these paths are not the user's.
_OTHERS = (f"{Path(__file__).parent.parent}{os.sep}", f"{sysconfig.get_path('stdlib')}{os.sep}")
# The most characters of a value in a message.
_SHOWN = 300
# The most runs of tasks in one life of a node.
_MOST = 10_000
_CAUSES = (
    "What runs must not depend on chance, on the time of the system, on threads, or on what the run before "
    "has left: put that back in reset="
)


def survives(
    tested: AnyExecutor | TaskExecutor | Callable[..., Any] | Task | Flow,
    params: Mapping[str, Any] | None = None,
    *,
    effects: Callable[[], Mapping[str, Any]] | None = None,
    twice: Collection[str] = (),
    answers: Mapping[str, Any] | None = None,
    queue: Queue | None = None,
    repository: SQLiteRepository | None = None,
    reset: Callable[[], object] | None = None,
) -> int:
    """Assert that an executor or a flow has the same result and effects, wherever its process dies.

    First it runs without a death, and its commits are counted: its start, each step, its outcome and so on.
    Then it runs twice for each commit: its process dies just before the commit, or just after it, and a new
    node on the same tasks runs it to its end. The result and each effect must be as without a death. All
    runs take place in this thread, each on a new :class:`ManualClock`. Tasks that it submits run, too, if
    they may start when its own have ended.

    .. code-block:: python

        survives(order, {"customer": 7}, effects=lambda: {"charged": charged, "sent": sent}, twice=["sent"])

    Every run finds the same world: before each one, the lists, dicts and sets that ``effects`` returns get
    their content back, and so does the file of ``repository``. At the end, they get it back, too. What is
    anywhere else, ``reset`` must put back.

    The death is an exception that ``except Exception`` does not catch. From then on the dead node can read
    and write nothing. What a ``finally`` block still does to the lists, dicts and sets is undone.

    Args:
        tested: an executor, an instance of a ``TaskExecutor``, a function that could be an executor, a
            ``Task``, or a flow. It must do the same in each run.
        params: the params of the executor.
        effects: returns what was done so far, by name: the list, dict or set itself in which a fake notes
            what it is asked for, or rows of the database.
        twice: the names of the effects that may happen again after a death, once: numbers may double, and
            a list may have each item twice as often, in any order.
        answers: what people answer when they are asked, by the name of the answer, or its id: a JSON value,
            an exception for an error, or a function that looks at the effects and returns or raises it.
            With ``NotDone``, what :meth:`Context.once` asks about is done again.
        queue: the queue of the executors of a task or a flow; by default that of the executor. Its own
            repository is not touched.
        repository: stores the tasks, for executors with ``ctx.transaction()``; by default they are in
            memory. The file is read at the beginning, and written before each run.
        reset: is called before each run.

    Returns:
        the number of deaths: two for each commit.

    Raises:
        AssertionError: it does not survive a death. The message has the commit, the step, the line in your
            code, and the difference. Or it does not do the same in each run.
        ConfigurationError: an argument is not valid, or an effect is not as it was before the first run.
        PayloadError: the params do not fit the executor.
        TaskFailed: it fails without a death.
        TimeoutError: it does not end without a death.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    if repository is not None and not isinstance(repository, SQLiteRepository):
        raise ConfigurationError(f"repository must be an SQLiteRepository, not {repository!r:.80}")
    queue, flow = _laid_out(tested, params, queue)
    with closing(_World(effects, reset, repository, answers)) as world:
        if unknown := sorted({*twice} - world.before.keys()):
            raise ConfigurationError(f"twice: no effect is named {', '.join(unknown)}")
        whole, again = _run(queue, flow, world), _run(queue, flow, world)
        if isinstance(whole.result, Exception):
            raise whole.result
        _compare(whole, again, f"two runs without a death differ. {_CAUSES}")
        for at in range(1, whole.commits + 1):
            for after in (False, True):
                run = _run(queue, flow, world, at, after=after)
                if run.death is None:
                    raise AssertionError(f"commit {at} of {whole.commits} did not come. {_CAUSES}")
                when = f"just {'after' if after else 'before'} commit {at} of {whole.commits}"
                _compare(whole, run, f"after a death {when}, {run.death}", twice)
        return 2 * whole.commits


# --- what runs


def _laid_out(
    tested: Any, params: Mapping[str, Any] | None, queue: Queue | None
) -> tuple[Queue, Flow]:
    """Return a queue, and the flow to submit there. Its tasks have the same ids in every run."""
    if isinstance(tested, (Task, Flow)):
        if queue is None or params is not None:
            raise ConfigurationError("a task or a flow requires queue=, and has its params already")
    elif isinstance(tested, (Executor, BoundExecutor)):
        bound = BoundExecutor(tested, {}) if isinstance(tested, Executor) else tested
        queue = queue or cast("Queue", bound.queue or bound.executor._choose_queue())
        tested = bound._task_with(params)
    elif queue is None:
        queue = ManualQueue()
        tested = Task(type=_register(queue, tested), params=dict(params or {}))
    elif isinstance(tested, TaskExecutor):
        tested = Task(type=tested.type, params=dict(params or {}))
    else:
        raise ConfigurationError(f"queue= requires one of its executors, not {tested!r:.80}")
    return queue, chain(_named(tested, count(1)))


def _named(step: Any, numbers: Iterator[int]) -> Any:
    """Return a task or a flow with an id for each task that has none."""
    if isinstance(step, Flow):
        return Flow(step.kind, [_named(one, numbers) for one in step.steps])
    return step if step.id else attrs.evolve(step, id=f"{step.type} {next(numbers)}")


class _Node(ManualQueue):
    """A queue that runs tasks while its caller waits for some, and whose people answer at once."""

    _runs_when_waiting = True
    _runs = 0
    _answers: Mapping[str, Any]

    def run_next(self) -> Task | None:
        while (ran := super().run_next()) is None and self._answer():
            """Run what waits for the answer."""
        self._runs += ran is not None
        if self._runs > _MOST:
            raise AssertionError(
                f"there are more than {_MOST} runs: does a task run again and again?"
            )
        return ran

    def _answer(self) -> bool:
        """Give an answer that somebody waits for; return False if there is none to give."""
        for answer in list(self.iter_tasks(type=ANSWER, status="pending")):
            for name, value in self._answers.items():
                known = (answer.id, answer.params.get("name"))  # a step of a flow has a name
                if name in known or answer.id.endswith(f"/{name}"):
                    with suppress(InvalidTransition):  # it waits for other tasks first
                        return self._tell(answer.id, value)
        return False

    def _tell(self, answer_id: str, value: Any) -> bool:
        try:
            told = value() if callable(value) else value
        except Exception as raised:  # noqa: BLE001  (it is the answer)
            told = raised
        if isinstance(told, NotDone):
            return self.finish(answer_id, again=True)
        if isinstance(told, Exception):
            return self.finish(answer_id, error=str(told) or type(told).__name__)
        return self.finish(answer_id, told)


@attrs.frozen
class _Seen:
    """One run: its result or its error, its effects, the number of its commits, and its death."""

    result: Any
    effects: Mapping[str, Any]
    commits: int
    death: str | None


def _run(queue: Queue, flow: Flow, world: _World, at: int = 0, *, after: bool = False) -> _Seen:
    """Run a flow in a fresh world. If its node dies, another one finishes it."""
    store, clock, life = world.renew(queue), ManualClock(), _Life(world, at, after=after)
    shape: Shape = ""
    result: Any = None
    try:
        with _replaced(queue, world.nodes, _Mortal(store, life, queue), clock) as node:
            handle = node.submit_flow(flow)
            shape = handle.shape
            life.counts = True
            result = _result(node, handle)
            life.counts = False
    except BaseException as error:
        if life.death is None or is_interrupt(error):
            raise
    if life.death is not None:
        world.put_back(life.left)
        clock = ManualClock(clock.now())
        with _replaced(queue, world.nodes, _Mortal(store, _Life(world), queue), clock) as node:
            result = _result(node, node.flow_handle(shape))
    return _Seen(result, world.values(), life.commits, life.death)


def _result(node: ManualQueue, handle: FlowHandle) -> Any:
    """Run a flow, and then what it has submitted. Return its result or its error."""
    try:
        result = handle.result()
        node.run_all()
    except Exception as error:  # noqa: BLE001  (it is compared)
        return error
    return result


def _compare(whole: _Seen, run: _Seen, title: str, twice: Collection[str] = ()) -> None:
    """Raise an ``AssertionError`` if the result or an effect is not as in the run without a death."""
    __tracebackhide__ = True
    results = ("result", whole.result, run.result)
    found = [results] if whole.result != run.result else []
    for name in {**whole.effects, **run.effects}:
        before, now = whole.effects.get(name), run.effects.get(name)
        if before != now and not (name in twice and _is_repeated(before, now)):
            found.append((f"effect {name!r}", before, now))
    if found:
        lines = [f"  {what}: expected {_shown(a)}, found {_shown(b)}" for what, a, b in found]
        raise AssertionError("\n".join([title, *lines]))


def _shown(value: Any) -> str:
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return f"{value!r:.{_SHOWN}}"


def _is_repeated(once: Any, found: Any) -> bool:
    """Return True if a part of what happened has happened a second time."""
    if isinstance(once, Mapping) and isinstance(found, Mapping):
        return once.keys() == found.keys() and all(_is_repeated(once[k], found[k]) for k in once)
    if isinstance(once, Sequence) and isinstance(found, Sequence) and not isinstance(once, str):
        return all(once.count(x) <= found.count(x) <= 2 * once.count(x) for x in [*once, *found])
    if isinstance(once, Real) and isinstance(found, Real):
        return bool(once <= found <= 2 * once)
    return bool(once == found)


# --- the death


class _Death(BaseException):
    """The process has died."""


class _Life:
    """The life of a node: it counts the commits, and ends at one of them, or at none (0).

    Attributes:
        counts: True while commits are counted.
        commits: the number of commits so far.
        death: the commit at which it died, and the line of the user; None while it lives.
        left: the effects at its death.
    """

    def __init__(self, world: _World, at: int = 0, *, after: bool = False) -> None:
        self._world, self._at, self._after = world, at, after
        self.counts, self.commits = False, 0
        self.death: str | None = None
        self.left: Mapping[str, Any] = {}

    def check(self) -> None:
        """Die again if it is dead, whoever has caught the first death."""
        if self.death is not None:
            raise _Death

    def commit(self, do: Callable[[], R], describe: Callable[[], tuple[str, str]]) -> R:
        """Make a commit. ``describe()`` returns its moves, and the place if no executor makes it."""
        self.check()
        self.commits += self.counts
        ends = self.counts and self.commits == self._at
        if ends and not self._after:
            self._end(*describe())
        done = do()
        if ends:
            self._end(*describe())
        return done

    def _end(self, what: str, place: str) -> NoReturn:
        self.left, self.death = self._world.values(), what + (_place(sys._getframe()) or place)
        raise _Death


def _place(frame: FrameType | None) -> str:
    """Return the step and the user's line that a stack is in; empty outside of executors."""
    step, line = "", ""
    while frame is not None and (code := frame.f_code) is not Runner.run.__code__:
        if code is Checkpoints.step.__code__:
            step = f", step {frame.f_locals['name']!r}"
        if not line and not code.co_filename.startswith(_OTHERS):
            line = _line(code, frame.f_lineno)
        frame = frame.f_back
    return "" if frame is None else step + line


def _line(code: CodeType, number: int) -> str:
    source = linecache.getline(code.co_filename, number).strip()
    return f"\n  {code.co_filename}:{number}, in {code.co_name}{source and f': {source}'}"


def _read(name: str) -> Any:
    def read(self: _Mortal, *args: Any, **options: Any) -> Any:
        self._life.check()
        return getattr(self._inner, name)(*args, **options)

    return read


class _Mortal(Repository):
    """A store as one node has it: after the death of the node, it refuses everything."""

    def __init__(self, inner: Repository, life: _Life, queue: Queue) -> None:
        super().__init__(inner.clock, inner.codecs, inner.timing, InProcess(self))
        self._inner, self._life, self._executors = inner, life, queue._registry.registered
        self.conditions, self.shared = inner.conditions, inner.shared
        self.house, self.forks = inner.house, inner.forks
        self.transactions = cast("Transactions", _Transactions(inner.transactions, life))

    find, distinct, ready, due = _read("find"), _read("distinct"), _read("ready"), _read("due")
    ended, notes, version = _read("ended"), _read("notes"), _read("version")
    list, count = _read("list"), _read("count")

    @property
    def entered(self) -> bool:
        return self._inner.entered

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        do = partial(self._inner.apply, writes, all_or_nothing=all_or_nothing)
        return self._life.commit(do, lambda: self._describe(writes))

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        if all(change.name.startswith(COUNTS) for change in changes):
            self._life.check()
            return self._inner.put_notes(changes)  # nothing depends on what is counted
        names = ", ".join(change.name for change in changes)
        return self._life.commit(
            lambda: self._inner.put_notes(changes), lambda: (f"note {names}", "")
        )

    def _describe(self, writes: Sequence[Write]) -> tuple[str, str]:
        """Return the moves that writes make, and the last step and the executor of the first task."""
        tasks = self._inner.get_many([*{write.id: None for write in writes}])
        types = {write.id: write.row["type"] for write in writes if isinstance(write, Insert)}
        types |= {task.id: task.type for task in tasks.values()}
        moves = [f"{write.move} of {types.get(write.id, write.id)!r}" for write in writes]
        first = writes[0].id
        steps = [*(tasks[first].checkpoints or {}).get("steps", ())] if first in tasks else []
        place = f", after step {steps[-1]!r}" if steps else ""
        entry = self._executors.get(types.get(first, ""))
        executor = getattr(entry and entry.check_params, "__self__", None)
        if (code := getattr(getattr(executor, "function", None), "__code__", None)) is not None:
            place += _line(code, code.co_firstlineno)
        return ", ".join(dict.fromkeys(moves)), place


class _Transactions:
    """The transactions of a store as one node has them."""

    def __init__(self, inner: Transactions, life: _Life) -> None:
        self._inner, self._life = inner, life

    def __getattr__(self, name: str) -> Any:
        self._life.check()
        return getattr(self._inner, name)

    def join(self, connection: object, then: object) -> AbstractContextManager[Any]:
        """Take part in a transaction. A thread would tell of its commit at any time: polling finds it."""
        self._life.check()
        return self._inner.join(connection, None)

    @contextmanager
    def begin(self) -> Iterator[Any]:
        """Begin a transaction for an executor: see :meth:`Transactions.begin`."""
        self._life.check()
        with ExitStack() as stack:
            yield stack.enter_context(self._inner.begin())
            self._life.commit(stack.close, lambda: ("ctx.transaction()", ""))


# --- the world


class _World:
    """All that a run may change.

    Attributes:
        before: the effects before the first run.
        nodes: the class of the nodes, with the answers of people.
    """

    def __init__(
        self,
        effects: Callable[[], Mapping[str, Any]] | None,
        reset: Callable[[], object] | None,
        repository: SQLiteRepository | None,
        answers: Mapping[str, Any] | None,
    ) -> None:
        self.nodes = cast("type[_Node]", type("_Node", (_Node,), {"_answers": answers or {}}))
        self._effects, self._reset, self._repository = effects or dict, reset or dict, repository
        self._reset()
        self.before = self.values()
        self._saved = sqlite3.connect(":memory:")
        if repository is not None:
            repository.count(TaskFilter())  # makes the tables
            with closing(sqlite3.connect(repository.path)) as file:
                file.backup(self._saved)

    def values(self) -> dict[str, Any]:
        """Return a copy of the effects."""
        values = self._effects()
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"effects must return a dict, not {values!r:.80}")
        return deepcopy(dict(values))

    def renew(self, queue: Queue) -> Repository:
        """Put everything back to what it was before the first run, and return a store for the next."""
        self._put_all_back()
        self._reset()
        for name, value in self.values().items():
            if value != (before := self.before.get(name)):
                raise ConfigurationError(
                    f"effect {name!r} was {_shown(before)} before the first run and is {_shown(value)} "
                    "before the next: return the list, dict or set itself, or put it back in reset="
                )
        if self._repository is not None:
            return self._repository
        store = MemoryRepository()
        store.codecs = queue.repository.codecs
        return store

    def put_back(self, values: Mapping[str, Any]) -> None:
        """Give the lists, dicts and sets among the effects the content of these values."""
        for name, value in self._effects().items():
            before: Any = deepcopy(values.get(name, ()))
            if isinstance(value, (MutableSequence, MutableMapping, MutableSet)):
                value.clear()
            if isinstance(value, MutableSequence):
                value.extend(before)
            elif isinstance(value, MutableMapping):
                value.update(before)
            elif isinstance(value, MutableSet):
                value |= set(before)

    def close(self) -> None:
        """Put everything back for the last time."""
        try:
            self._put_all_back()
        finally:
            self._saved.close()

    def _put_all_back(self) -> None:
        self.put_back(self.before)
        if self._repository is not None:
            self._repository.close()
            with closing(sqlite3.connect(self._repository.path)) as file:
                self._saved.backup(file)
