"""The methods of a queue that read: tasks, reasons, statistics, nodes, settings.

Many programs only submit and run tasks, so modules that only these methods need are loaded when used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from taskx.node import requests
from taskx.queue.parts import Parts
from taskx.stores import queries
from taskx.stores.controls import Controls, Paused
from taskx.stores.selecting import dead
from taskx.tasks.checks import Duration
from taskx.tasks.model import (
    Task,
    TaskCount,
    TaskFilter,
    TaskPage,
    check_name,
)
from taskx.tasks.options import (
    FilterOptions,
    filter_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

    from taskx.insight.changelog import Change
    from taskx.insight.counted import Usage
    from taskx.insight.diagnosis import Diagnosis
    from taskx.insight.failures import Failures
    from taskx.insight.health import Health
    from taskx.insight.history import History
    from taskx.insight.limits import LimitInfo
    from taskx.insight.nodes import NodeInfo
    from taskx.insight.stats import Stats
    from taskx.node.threads import ThreadStack
    from taskx.queue.flows import FlowSummary
    from taskx.queue.tuning import Tuned
    from taskx.tasks.findings import Reason


class Questions(Parts):
    """The questions that a queue answers. The queue need not be started."""

    def get_task_status(self, task_id: str) -> Task:
        """Return the task's record as it is now.

        Raises:
            TaskNotFound: no task has this id.
        """
        with self._reading() as repository:
            return repository.get_by_id(task_id)

    def list_tasks(
        self,
        filter: TaskFilter | None = None,
        *,
        after: str | None = None,
        at_most: int | None = None,
        **fields: Unpack[FilterOptions],
    ) -> TaskPage:
        """Return one page of the tasks that match, newest first, and the total number of matches.

        The page has 100 tasks unless ``limit`` says otherwise; its ``more`` is the number of tasks after
        it. Use :meth:`iter_tasks` for all of them.

        Args:
            filter: the conditions for the tasks.
            after: the ``next`` of the page before, with the same conditions. Every page then costs the
                same. Its total is that of the first page, because the tasks are not counted again.
            at_most: the largest total that is counted; None for no limit.
            fields: the fields of a :class:`TaskFilter`, instead of one: ``type``, ``status``,
                ``created_by``, ``start_date``, ``end_date``, ``error``, ``error_type``, ``id_prefix``,
                ``params``, ``parent``, ``tag``, ``flow``, ``offset``, ``limit``; and the age of the tasks
                in seconds or as a timedelta: ``older`` than that, ``newer`` than that. With ``params`` only
                the newest 100,000 tasks are searched; ``searched_since`` of the page says so.

        Raises:
            ConfigurationError: a value is not valid, or both a filter and fields were given, or params were
                given and a codec hides them.
        """
        wanted = filter_of(filter, fields, "list_tasks", self.clock)
        with self._reading() as repository:
            return queries.page(repository, wanted, after, at_most)

    def count_tasks(
        self,
        filter: TaskFilter | None = None,
        *,
        at_most: int | None = None,
        **fields: Unpack[FilterOptions],
    ) -> TaskCount:
        """Return the number of tasks that match.

        Args:
            filter, fields: as in :meth:`list_tasks`; ``offset`` and ``limit`` have no effect.
            at_most: the largest number that is counted; None to count all. If more tasks match, the result
                is this number, and its ``exact`` is False. If it is given, a search in params is limited as
                in :meth:`list_tasks`.

        Raises:
            ConfigurationError: as in :meth:`list_tasks`.
        """
        wanted = filter_of(filter, fields, "count_tasks", self.clock)
        with self._reading() as repository:
            return queries.count(repository, wanted, at_most)

    def iter_tasks(
        self, filter: TaskFilter | None = None, **fields: Unpack[FilterOptions]
    ) -> Iterator[Task]:
        """Iterate over all tasks that match, newest first, or over ``limit`` of them.

        The iterator reads 200 tasks at a time, each time from where it is in the list: it needs little
        memory, and a late task costs no more than an early one. Tasks that are stored or deleted in the
        meantime neither hide nor repeat another one. After an error, begin a new iteration.

        Args:
            filter, fields: as in :meth:`list_tasks`.

        Raises:
            ConfigurationError: a value is not valid, or both a filter and fields were given.
            RepositoryError: from the iterator, if the repository cannot be read.
        """
        wanted = filter_of(filter, fields, "iter_tasks", self.clock)
        return queries.read_all(self._page_after, wanted, self._timing.batch)

    def _page_after(self, filter: TaskFilter, after: Any) -> tuple[Sequence[Task], Any]:
        with self._reading() as repository:
            return queries.list_after(repository, filter, after)

    @property
    def types(self) -> frozenset[str]:
        """The types that have an executor in this queue, and those that were declared.

        Executors that ``find_executor`` has not found yet are not among them.
        """
        return self._registry.accepted

    @property
    def buffered(self) -> int:
        """The number of submitted tasks that wait in this queue's buffer, at most ``buffer_size``."""
        return 0 if (pool := self._pool) is None else pool.buffer.submitted

    @property
    def events_waiting(self) -> int:
        """The number of events that the hooks of this queue were not told yet."""
        return len(self._hooks.waiting)

    @property
    def running(self) -> int:
        """The number of executors that this queue is running."""
        return 0 if (pool := self._pool) is None else len(pool.runs.executing)

    @property
    def stopped(self) -> bool:
        """True if the queue was stopped: it accepts no more tasks, except from its own executors."""
        return self._node.stopped

    @property
    def healthy(self) -> bool:
        """True if this queue can do its work: the part of :meth:`health` that needs no read.

        It is False while more threads are stuck than the queue replaces (``max_stuck``), while the
        SQLite file is moved away, deleted or replaced, and after a newer TaskX has migrated the file. It
        does not tell you if the queue was started: a queue that only submits has no threads, and is
        healthy as long as its file exists. :meth:`health` tells you if any queue runs tasks.
        """
        from taskx.insight.health import own_problems

        return not [*own_problems(self.repository, self._pool, self.config.max_stuck)]

    def flows(self, *, at_most: int = 20, after: str | None = None) -> list[FlowSummary]:
        """Return the flows that were submitted last, newest first, with the counts of their tasks.

        A flow is listed as long as one of its tasks is stored. The cost depends on the tasks of these flows
        only: at most 5,000 tasks of each are counted.

        Args:
            at_most: most flows to return.
            after: the id of the last flow of the call before, for the flows that follow it.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        from taskx.queue.flows import newest

        with self._reading() as repository:
            return newest(repository, at_most, after)

    def dead_letters(
        self,
        filter: TaskFilter | None = None,
        *,
        after: str | None = None,
        at_most: int | None = None,
        **fields: Unpack[FilterOptions],
    ) -> TaskPage:
        """Return one page of the failed tasks that match, newest first, and the number of all matches.

        The arguments are those of :meth:`list_tasks`. Use ``iter_tasks(status="failed")`` for all.

        Raises:
            ConfigurationError: the filter is not valid, or it has another status.
        """
        wanted = dead(filter_of(filter, fields, "dead_letters", self.clock))
        return self.list_tasks(wanted, after=after, at_most=at_most)

    def why(self, task_id: str) -> list[Reason]:
        """Return the reasons why a task waits, runs or has ended, the decisive one first.

        A pending task can have several reasons: all of them must pass before it starts. If the repository
        cannot be read, the only reason says so. The answer is of one moment, and nothing is changed. The
        queue need not be started.

        Raises:
            TaskNotFound: no task has this id.
        """
        from taskx.insight.reasons import why

        ageing = round((self.config.ageing or 0) * 1000)
        with self._reading() as repository:
            known = (self._registry, self.clock, self._log, self._timing)
            return why(repository, *known, self._pool, ageing, check_name(task_id, "id"))

    def health(
        self,
        *,
        oldest_due: Duration | None = 300.0,
        failed: tuple[int, Duration] | None = None,
        nodes: int | Mapping[str, int] = 1,
        stuck: int | None = None,
        file_size: int | None = None,
        schedule_overdue: Duration | None = 60.0,
    ) -> Health:
        """Check the repository and this queue, and return what is wrong.

        A repository that is away, a lost file and a newer schema are problems, not errors. The queue need
        not be started. None as a threshold: do not check.

        Args:
            oldest_due: most seconds since a task could have started; paused types do not count.
            failed: ``(count, seconds)``: most tasks that failed in the last ``seconds``. Only the thousand
                failed tasks that were submitted last are examined.
            nodes: fewest live nodes, in all and for each type that has tasks to run; a dict has other
                numbers for some types. 0: do not check.
            stuck: most threads on one node that run on after a time-out; ``max_stuck`` by default.
            file_size: most bytes that a SQLite file and its write-ahead log take.
            schedule_overdue: most seconds by which a tick of a schedule may be late.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has no file.
        """
        from taskx.insight.health import check, thresholds

        wanted = thresholds(
            oldest_due=oldest_due,
            failed=failed,
            nodes=nodes,
            stuck=self.config.max_stuck if stuck is None else stuck,
            file_size=file_size,
            schedule_overdue=schedule_overdue,
        )
        return check(
            self.repository, self._controls, self._timing, self._pool, wanted, self.clock.now_ms()
        )

    def diagnose(self) -> Diagnosis:
        """Examine what is around the tasks: versions, file, permissions, disk, locks, dead nodes, clock.

        Nothing is created, migrated or changed, and the queue need not be started. What cannot be read is
        a check that has failed, not an error. It may take some seconds.
        """
        from taskx.insight.diagnosis import diagnose

        return diagnose(self.repository, self._registry, self.clock.now_ms())

    def stats(
        self,
        *,
        period: Duration = 3600.0,
        since: datetime | None = None,
        at_most: int = 5_000,
        waiting_at_most: int = 100_000,
    ) -> Stats:
        """Return how many tasks of each type wait, run and have ended, and how long that took.

        The numbers are of all processes. A task that moves between two reads may be counted twice, or not
        at all. What began and ended was counted by the nodes when it did, by minutes. Another process
        stores its counts every five seconds, or every second if they are more than 100, and when it stops.
        One that is killed loses those that it has not stored. The cost hardly depends on the number of
        tasks. The queue need not be started.

        Args:
            period: the seconds before now in which tasks are counted that began or ended; with 0 none are.
            since: an aware datetime from which they are counted, instead of a period.
            at_most: most delayed, blocked and running tasks to read.
            waiting_at_most: the largest number of waiting tasks that is counted for each type and node.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        from taskx.insight.stats import stats

        with self._reading() as repository:
            return stats(
                repository,
                self._moves.counts,
                self._registry.types,
                self.clock.now_ms(),
                period=period,
                since=since,
                at_most=at_most,
                waiting_at_most=waiting_at_most,
            )

    def history(
        self,
        *,
        period: Duration = 3600.0,
        intervals: int = 60,
    ) -> History:
        """Return how many tasks completed and failed in each interval of a period, and their run times.

        The numbers are of all processes, for charts, as exact as those of :meth:`stats`. The cost depends
        on the period and the types, and not on the number of tasks. The queue need not be started.

        Args:
            period: the seconds that are divided into intervals; they end with the present minute.
            intervals: the number of equal intervals, 1 to 1,000. Each must be a minute or longer: ten
                minutes in a period of more than 3 hours, an hour in one of more than 26 hours, a day in one
                of more than 62 days.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        from taskx.insight.history import history

        with self._reading() as repository:
            return history(repository, self._moves.counts, self.clock.now_ms(), period, intervals)

    def usage(
        self, name: str, *, period: Duration = 86_400.0, since: datetime | None = None
    ) -> Usage:
        """Return what the tasks of concurrency keys did, how long that took, and their cost.

        ``queue.usage("tenant:", since=monday)`` is for bills and quotas. Only keys with a declared limit
        are counted: see :meth:`limit`. The numbers are of all processes, as exact as those of
        :meth:`stats`. Of each day the 1,000 largest keys are counted apart.

        Args:
            name: a key; or the beginning of keys, which ends in ``":"``.
            period: the seconds before now that are counted: whole hours, and days (UTC) after two days.
            since: an aware datetime from which to count, instead of a period.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        from taskx.insight.counted import usage

        with self._reading() as repository:
            return usage(repository, self._moves.counts, self.clock.now_ms(), name, period, since)

    def failures(
        self, *, type: str | None = None, since: datetime | None = None, at_most: int = 1_000
    ) -> Failures:
        """Return the failed tasks in groups of the same type, class of error and place in the code.

        Run a whole group again with :meth:`requeue_failures`.

        Args:
            type: only tasks of this type.
            since: only tasks that failed at or after this aware datetime.
            at_most: most failed tasks to read: those that were submitted last. The answer's ``complete``
                says if these were all.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        from taskx.insight.failures import failures

        with self._reading() as repository:
            return failures(repository, type, since, at_most)

    def nodes(self) -> list[NodeInfo]:
        """Return the nodes on the repository, of all processes, and the tasks that they are running.

        Dead nodes are listed until another node has taken over their tasks. The queue need not be started.

        Raises:
            ConfigurationError: the repository has only the eight methods.
            RepositoryError: the repository cannot be read.
        """
        from taskx.insight.nodes import nodes

        return nodes(self.repository, self._pool)

    def stacks(self, node_id: str | None = None, *, timeout: Duration = 5.0) -> list[ThreadStack]:
        """Return what the threads of a process do, with their stacks.

        The threads that run tasks come first. At most 200 threads are returned, and at most some 4,000
        characters of each stack.

        Args:
            node_id: the id of a node, from :meth:`nodes`; None for this process. A node of another process
                is asked through the repository, and answers within about a second.
            timeout: seconds to wait for the answer.

        Raises:
            NodeNotFound: no live node has this id.
            TimeoutError: the node did not answer in time.
            ConfigurationError: the repository has only the eight methods, or this thread is in a
                transaction of its own, and a node of another process was named.
            RepositoryError: the repository failed.
        """
        return requests.stacks(self.repository, self._controls, self._timing, node_id, timeout)

    def changes(self, at_most: int = 100) -> list[Change]:
        """Return the newest entries of the log of changes, the newest first.

        Args:
            at_most: most entries to return. Only the newest 1,000 are kept.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has only the eight methods.
            RepositoryError: the repository cannot be read.
        """
        from taskx.insight.changelog import changes

        with self._reading() as repository:
            return changes(repository, self._timing, at_most)

    @property
    def paused(self) -> Paused:
        """The pauses that are stored in the repository.

        Raises:
            RepositoryError: the repository failed.
        """
        with self._reading() as repository:
            return Controls(repository).read_paused()

    def limits(self) -> list[LimitInfo]:
        """Return the limits with names, as they are in effect.

        Raises:
            ConfigurationError: the repository has only the eight methods.
            RepositoryError: the repository failed.
        """
        from taskx.insight.limits import limits_of

        with self._reading() as repository:
            repository.require("limits with a name")
            return limits_of(repository, self._registry, self.clock, self._log)

    def tuned(self) -> Tuned:
        """Return the stored overrides, and the values that they override.

        Raises:
            ConfigurationError: the repository has only the eight methods.
            RepositoryError: the repository failed.
        """
        from taskx.queue.tuning import tuned

        with self._reading() as repository:
            return tuned(repository, self._registry)
