"""Chains and groups: several tasks that are submitted together and share one handle."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent import futures
from datetime import datetime
from typing import Any, Literal, Protocol, Union

import attrs

from taskx.attempt.executors import AnyExecutor, executor_of
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.tasks.checks import Duration, check_int, check_number, in_seconds, optional_seconds
from taskx.tasks.creation import check_parents
from taskx.tasks.errors import ConfigurationError, TaskNotFound
from taskx.tasks.handles import TaskHandle
from taskx.tasks.ids import new_id
from taskx.tasks.lifecycle import ANSWER
from taskx.tasks.model import Task, TaskFilter, TaskStatus, check_key
from taskx.tasks.tags import check_flow, check_tags

#: A part of a flow: a task, an executor in the place of its task, or another flow.
Step = Union[Task, AnyExecutor, "Flow"]
#: A submitted flow as JSON values: a task is its id.
Shape = Union[str, "dict[str, list[Shape]]"]
#: Most pairs of a task and one of its parents in one flow.
MOST_EDGES = 1_000_000
# Tasks read at a time.
_SOME = 100
_UNFINISHED = frozenset({TaskStatus.PENDING, TaskStatus.RUNNING})


class Flow:
    """Several tasks to submit together with ``Queue.submit_flow``.

    :func:`chain` and :func:`group` make flows.

    Attributes:
        kind: ``"chain"``: one step runs after the other; ``"group"``: all run at the same time.
        steps: its tasks and flows.
    """

    def __init__(self, kind: Literal["chain", "group"], steps: Sequence[Step]) -> None:
        if not steps:
            raise ConfigurationError(f"a {kind} is empty: give at least one task or flow")
        self.kind = kind
        self.steps = tuple(_task_or_flow(step, kind) for step in steps)

    def __repr__(self) -> str:
        return f"<{self.kind} of {len(self.steps)}>"

    def then(self, *steps: Step) -> Flow:
        """Return a chain of this flow and further steps, which begin when all of it has completed.

        Raises:
            PayloadError: a step is an executor that requires params: write ``executor.task(…)``.
            ConfigurationError: a step is not a task, an executor or a flow.
        """
        before = self.steps if self.kind == "chain" else (self,)
        return Flow("chain", (*before, *steps))


def _task_or_flow(step: Step, kind: str) -> Task | Flow:
    if isinstance(step, (Task, Flow)):
        return step
    executor_of(step, f"a {kind}", "tasks, executors and flows")  # raises if it is none
    return step._task_with()


def chain(*steps: Step) -> Flow:
    """Return a flow whose steps run one after the other.

    A step finds the tasks of the step before it in ``ctx.parents``. An executor with a parameter
    ``previous`` that has a default gets their result, unless its params have one: a list if they are
    several. An executor that requires no params can stand for its task.

    Raises:
        PayloadError: a step is an executor that requires params: write ``executor.task(…)``.
        ConfigurationError: there is no step, or one is not a task, an executor or a flow.
    """
    return Flow("chain", steps)


def group(*steps: Step) -> Flow:
    """Return a flow whose steps run at the same time.

    An executor that requires no params can stand for its task.

    Raises:
        PayloadError: a step is an executor that requires params: write ``executor.task(…)``.
        ConfigurationError: there is no step, or one is not a task, an executor or a flow.
    """
    return Flow("group", steps)


def answer(
    name: str,
    question: Any = None,
    *,
    timeout: Duration | None = None,
    tags: Sequence[str] = (),
    id: str = "",
) -> Task:
    """Return a task that somebody ends by ``queue.finish(id, result)``: no executor runs it.

    It is a step of a flow like any other: ``chain(draft.task(n=1), answer("legal"), publish.task(n=1))``.

    Args:
        name: what the answer is about, for those who give it.
        question: a JSON value that is shown to them.
        timeout: seconds, or a ``timedelta``, from when all tasks that it depends on have completed; after
            that it is cancelled.
        tags: short texts to filter answers by.
        id: a unique id; a new one by default.

    Raises:
        ConfigurationError: an argument is not valid.
    """
    params = {"name": check_key(name, "the name of an answer"), "question": question}
    seconds = None if timeout is None else check_number(timeout, "timeout")
    return Task(id=id, type=ANSWER, params=params, timeout=seconds, tags=check_tags(tags))


def _steps(shape: Shape) -> tuple[str, list[Shape]]:
    """Return the kind of a shape, ``"chain"``, ``"group"`` or empty for a task, and its steps.

    Raises:
        ConfigurationError: the value is not a shape.
    """
    if isinstance(shape, str):
        return "", []
    if isinstance(shape, dict) and len(shape) == 1:
        [(kind, steps)] = shape.items()
        if kind in ("chain", "group") and isinstance(steps, list) and steps:
            return kind, steps
    raise ConfigurationError(
        "the shape of a flow must be a task's id, or an object with a list 'chain' or 'group', not "
        f"{shape!r:.80}"
    )


def _ids(shape: Shape) -> Iterator[str]:
    """Yield the ids of the tasks in a shape, in order."""
    stack = [shape]
    while stack:
        step = stack.pop()
        if isinstance(step, str):
            yield check_key(step, "id")
        stack.extend(reversed(_steps(step)[1]))


class _Queue(Protocol):
    repository: Repository

    def handle(self, task_id: str, /) -> TaskHandle[Any]: ...
    def cancel_many(self, task_ids: Sequence[str], /) -> int: ...
    def requeue_many(self, task_ids: Sequence[str], /) -> int: ...
    def cancel_all(self, *, flow: str) -> object: ...


class FlowHandle:
    """One handle for all tasks of a submitted flow.

    Attributes:
        id: the id of the flow: ``list_tasks(flow=id)`` lists its tasks.
        ids: the ids of all its tasks, in the order in which the flow names them.
        shape: the flow as JSON values, from which ``queue.flow_handle`` makes a handle in any process. A
            task is its id, a chain ``{"chain": [...]}`` and a group ``{"group": [...]}``.
    """

    def __init__(self, shape: Shape, queue: _Queue, flow_id: str = "") -> None:
        self.shape = shape
        self._queue = queue
        self._id = flow_id
        self.ids = list(_ids(shape))
        self._handles = {task_id: queue.handle(task_id) for task_id in self.ids}

    def __repr__(self) -> str:
        name = f" {self._id}" if self._id else ""
        return f"<FlowHandle{name} of {len(self.ids)} tasks>"

    @property
    def id(self) -> str:
        """The id of the flow.

        It is empty if all its tasks are deleted, or were submitted by an older TaskX. For a handle that
        ``queue.flow_handle`` made, it is read from the repository once.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        if not self._id:
            found = self._read(reversed(self.ids))  # of a chain, the last tasks are pruned last
            self._id = next((task.flow for task in found), "")
        return self._id

    @property
    def handles(self) -> list[TaskHandle[Any]]:
        """The handles of all its tasks, in the order in which the flow names them.

        If a task failed or was cancelled and was then requeued, it has a new handle.
        """
        ended = [task_id for task_id, handle in self._handles.items() if handle._ended_badly]
        statuses = self._queue.repository.statuses(ended) if ended else {}
        for task_id, status in statuses.items():
            if status not in (TaskStatus.FAILED, TaskStatus.CANCELLED):
                self._handles[task_id] = self._queue.handle(task_id)
        return list(self._handles.values())

    def _statuses(self) -> list[TaskStatus | None]:
        """Return the status of each task, in order; None if it was deleted before it completed."""
        found: dict[str, TaskStatus | None] = {
            task_id: TaskStatus(status)
            for task_id, status in self._queue.repository.statuses(self.ids).items()
        }
        if len(found) < len(self._handles):
            _restore(self.shape, found)
        return [found.get(task_id) for task_id in self.ids]

    def status(self) -> TaskStatus:
        """Return the status of the flow as a whole.

        It is pending until the first task starts, and running until the last task has ended. Then it is
        failed if a task failed, else cancelled if a task was cancelled or deleted, else completed. A
        deleted step of a chain counts as completed if a later step has completed.
        """
        return _status_of_all(set(self._statuses()))

    def progress(self) -> float:
        """Return the share of its tasks that have ended, in percent."""
        statuses = self._statuses()
        return 100 * sum(status not in _UNFINISHED for status in statuses) / len(statuses)

    def wait(self, timeout: Duration | None = None) -> bool:
        """Wait until all its tasks have ended; return False if ``timeout`` seconds passed before."""
        deadline = None if timeout is None else time.monotonic() + in_seconds(timeout)
        for handle in reversed(self.handles):  # later tasks end last: then the others are done
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not futures.wait([handle], left).done:
                return False
        return True

    def result(self, timeout: Duration | None = None) -> Any:
        """Wait for all its tasks, and return the result of the flow.

        The result of a chain is the result of its last step. The result of a group is a list of the
        results of its steps, in order.

        Raises:
            TaskFailed: a task failed.
            TaskNotFound: a task was deleted. A deleted earlier step of a chain is no error if a later
                step has completed. If several tasks failed or were deleted, the error is about the first
                one, in the order in which the flow names them.
            concurrent.futures.CancelledError: no task failed or was deleted, but one was cancelled.
            concurrent.futures.TimeoutError: not all tasks have ended within ``timeout`` seconds.
        """
        seconds = optional_seconds(timeout)
        if not self.wait(seconds):
            raise futures.TimeoutError(f"not all tasks of the flow have ended within {seconds:g} s")
        cancelled = False
        statuses = dict(zip(self.ids, self._statuses(), strict=False))
        for task_id, handle in self._handles.items():
            if handle.cancelled():
                cancelled = True
            elif (error := handle.exception()) is not None:
                gone = isinstance(error, TaskNotFound)
                if not (gone and statuses[task_id] is TaskStatus.COMPLETED):
                    raise error
        if cancelled:
            raise futures.CancelledError("a task of the flow was cancelled")
        return self._result(self.shape)

    def _result(self, shape: Shape) -> Any:
        if isinstance(shape, str):
            return self._handles[shape].result()
        kind, steps = _steps(shape)
        if kind == "chain":
            return self._result(steps[-1])
        return [self._result(step) for step in steps]

    def cancel(self) -> None:
        """Cancel all its tasks that have not ended; running tasks are asked to stop."""
        # In reverse, so that the end of an earlier task does not start a later one.
        self._queue.cancel_many(list(reversed(self.ids)))
        if self.id:
            self._queue.cancel_all(flow=self.id)  # the children that its tasks have forked

    def requeue(self) -> int:
        """Run its failed and cancelled tasks again, in their order.

        Other tasks that failed or were cancelled because of them run again, too.

        Returns:
            the number of tasks that run again; completed tasks do not.

        Raises:
            QueueStopped: the queue was stopped.
        """
        return self._queue.requeue_many([*self.ids, *self._forked()])

    def _forked(self) -> list[str]:
        """Return the ids of the children that its tasks have forked, and for which others of them wait."""
        own, flow = {*self.ids}, self.id
        parents = {parent: None for task in self._read(self.ids) for parent in task.depends_on}
        others = (parent for parent in parents if parent not in own)
        return [task.id for task in self._read(others) if flow and task.flow == flow]

    def _read(self, task_ids: Iterable[str]) -> Iterator[Task]:
        ids = list(task_ids)
        for start in range(0, len(ids), _SOME):
            yield from self._queue.repository.get_many(ids[start : start + _SOME]).values()


def _status_of_all(statuses: Set[TaskStatus | None]) -> TaskStatus:
    """Return the status of a flow whose tasks have these statuses; None is that of a deleted task."""
    if statuses <= {TaskStatus.PENDING}:
        return TaskStatus.PENDING
    if statuses & _UNFINISHED:
        return TaskStatus.RUNNING
    if TaskStatus.FAILED in statuses:
        return TaskStatus.FAILED
    return TaskStatus.COMPLETED if statuses == {TaskStatus.COMPLETED} else TaskStatus.CANCELLED


@attrs.frozen(kw_only=True)
class FlowSummary:
    """A flow as ``queue.flows`` lists it.

    Attributes:
        id: the id of the flow, as in ``FlowHandle.id``.
        created_at: the time at which its newest stored task was accepted.
        counts: how many of its stored tasks have each status; statuses that none has are left out.
        exact: False if the flow may have more tasks than were counted.
    """

    id: str
    created_at: datetime | None
    counts: Mapping[TaskStatus, int]
    exact: bool

    @property
    def total(self) -> int:
        """The number of its tasks that were counted."""
        return sum(self.counts.values())

    @property
    def status(self) -> TaskStatus:
        """The status of the flow as a whole, by the tasks that were counted: see ``FlowHandle.status``."""
        return _status_of_all(self.counts.keys())


def newest(repository: Repository, at_most: int, after: str | None) -> list[FlowSummary]:
    """Return the newest flows: see ``Queue.flows``."""
    check_int(at_most, "at_most", 1)
    before = "" if after is None else check_flow(after, "after")
    found = (_summary(repository, flow_id) for flow_id in repository.reads.flows(before, at_most))
    return [flow for flow in found if flow is not None]


def _summary(repository: Repository, flow_id: str) -> FlowSummary | None:
    """Return the summary of a flow; None if its last task has just been deleted."""
    filter = TaskFilter(flow=flow_id, limit=1)
    last = next(queries.matching(repository, filter), None)
    most = repository.timing.most_of_flow
    counts = queries.count_by_status(repository, filter, most)
    if last is None or not counts:
        return None
    exact = sum(counts.values()) < most
    return FlowSummary(id=flow_id, created_at=last.created_at, counts=counts, exact=exact)


def _restore(shape: Shape, found: dict[str, TaskStatus | None], later: bool = False) -> bool:
    """Add the deleted steps of a chain that must have completed, because a later step has.

    Returns:
        True if a task of this shape has completed.
    """
    if isinstance(shape, str):
        if later:
            found.setdefault(shape, TaskStatus.COMPLETED)
        return found.get(shape) is TaskStatus.COMPLETED
    kind, steps = _steps(shape)
    completed = False
    for step in reversed(steps):
        completed |= _restore(step, found, later or (kind == "chain" and completed))
    return completed


def lay_out(flow: Flow, flow_id: str = "", tags: Sequence[str] = ()) -> tuple[list[Task], Shape]:
    """Return the tasks of a flow, with ids, parents, the flow's id and these tags, and the flow's shape.

    Raises:
        ConfigurationError: the value is not a flow, too many tasks depend on too many others, flows are
            nested too deep, or tags or ``depends_on`` of a task are not lists of texts.
    """
    if not isinstance(flow, (Task, Flow)):
        raise ConfigurationError(
            f"submit_flow requires a flow made by chain() or group(), not {type(flow).__name__}"
        )
    layout = _Layout(flow_id, check_tags(tags))
    try:
        shape, _ = layout.lay(flow, [])
    except RecursionError:
        raise ConfigurationError("flows are nested too deep: use fewer levels") from None
    return layout.tasks, shape


class _Layout:
    def __init__(self, flow_id: str, tags: Sequence[str]) -> None:
        self.tasks: list[Task] = []
        self._flow_id = flow_id
        self._tags = tags
        self._edges = 0

    def lay(self, step: Task | Flow, parents: list[str]) -> tuple[Shape, list[str]]:
        """Lay out a step after its parents; return its shape and the ids of its last tasks."""
        if isinstance(step, Task):
            return self._lay_task(step, parents)
        shapes: list[Shape] = []
        ends: list[str] = []
        for part in step.steps:
            shape, own = self.lay(part, parents)
            shapes.append(shape)
            if step.kind == "chain":
                parents = ends = own
            else:
                ends += own
        return {step.kind: shapes}, ends

    def _lay_task(self, task: Task, parents: list[str]) -> tuple[str, list[str]]:
        task_id = task.id or new_id()
        self._edges += len(parents)
        if self._edges > MOST_EDGES:
            raise ConfigurationError(
                f"the flow has more than {MOST_EDGES:,} pairs of a task and its parent: put one task "
                "between two large groups, so that the second group depends on that task only"
            )
        own = check_parents(task.depends_on)
        tags = (*check_tags(task.tags), *self._tags) if task.tags else self._tags
        made = attrs.evolve(
            task, id=task_id, depends_on=[*own, *parents], flow=self._flow_id, tags=tags
        )
        self.tasks.append(made)
        return task_id, [task_id]
