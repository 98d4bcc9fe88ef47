"""The watcher, which resolves the handles in use when their tasks have ended.

It marks no step as done before it is. A step that was cut short is repeated by the next thread that checks.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import Any

from taskx.stores.base import Repository
from taskx.stores.parts import Listener
from taskx.stores.queries import Changes, runs_somewhere
from taskx.tasks.bell import Agenda, Rest, Signal
from taskx.tasks.errors import RepositoryError, on_main_thread
from taskx.tasks.handles import TaskHandle
from taskx.tasks.in_use import InUse
from taskx.tasks.lifecycle import ENDED, FINISHED, NO_WORK
from taskx.tasks.log import Complaint, GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.timing import Timing

# A process in which no queue is started spends at most a tenth of its time on polling.
_REST = 9
# The most ended tasks that are read at once: a record may be large.
_MOST_READ = 50
_Ref = Callable[[], TaskHandle[Any] | None]
_NONE: dict[int, _Ref] = {}
_DEAF = "the watcher gets no wake-ups from other processes; it polls instead"


def _nowhere(task_id: str) -> bool:
    return False


class Watcher:
    """Resolves the handles in use, when their tasks have ended.

    In a started queue the workers and the housekeeper tell it to check. Else it has its own thread as long
    as there is a handle to watch. It holds weak references to handles, except to handles with callbacks.
    A check raises ``RepositoryError`` if the repository cannot be read.
    """

    def __init__(
        self,
        repository: Repository,
        log: GuardedLogger,
        agenda: Agenda,
        timing: Timing,
        signal: Callable[[], Signal],
        *,
        threaded: bool,
    ) -> None:
        self._repository = repository
        self._log = log
        self._timing = timing
        self._agenda = agenda
        # References to the handles of each task, by their ``id()``. The next check forgets handles that
        # nobody uses any more.
        self._handles: dict[str, dict[int, _Ref]] = {}
        self._lock = threading.RLock()  # reentrant: a finalizer may use a handle
        #: The ids of the watched tasks.
        self.watched = self._handles.keys()
        #: The tasks of maps that tell of failures themselves: objects that contain their ids.
        self.reported = InUse[Container[str]]()
        # Handles that have ended, and whose listeners are not told yet.
        self._ended: deque[TaskHandle[Any]] = deque()
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None  # hears of tasks that end in other processes
        self._closed = False
        # When a wait was last looked at, to warn if nobody runs the task.
        self._asked_at = -math.inf
        self._warned_of: set[str] = set()
        #: Makes the signal that a thread waits with for the end of a task.
        self.signal = signal
        self._threaded = threaded

    @property
    def watching(self) -> bool:
        """True if any task is watched that has not ended."""
        return bool(self._handles)

    def watch(self, *handles: TaskHandle[Any], runs: Callable[[str], bool] = _nowhere) -> None:
        """Resolve handles as soon as their tasks have ended. May be called any number of times.

        ``runs`` returns True if a task runs here: its end will be told, so nothing is read.
        """
        new = [handle for handle in handles if handle._watched_by is not self]
        for handle in handles:
            if handle._watched_by is not self or handle._has_callbacks:
                self._register(handle)
        try:
            # After they were registered: an end may come at any moment.
            self.check([handle.id for handle in new if not runs(handle.id)])
            for handle in new:
                handle._note_watched(self)
        finally:
            self.ensure_polling()
        if self._closed:
            for handle in handles:
                handle._conclude_closed()

    def watch_late(self, handle: TaskHandle[Any]) -> None:
        """Watch the handle of a task whose transaction has ended. Nobody hears of an error here."""
        try:
            self.watch(handle)
        except RepositoryError as error:
            self._log.warning("the handle of task %s is checked later: %s", handle.id, error)

    def warn_if_nobody_runs(self, task_id: str) -> None:
        """Warn if a thread waits, in a queue that is not started, for a task that no node can run.

        Each type is warned of once. A program may wait often, so only one wait now and then is looked at.
        """
        if (now := time.monotonic()) - self._asked_at < self._timing.handles_every:
            return
        self._asked_at = now
        task = self._repository.get_many([task_id]).get(task_id)
        if task is None or task.status.finished or task.type in {*NO_WORK, *self._warned_of}:
            return
        if not runs_somewhere(self._repository, task.type):
            self._warned_of.add(task.type)
            self._log.warning(
                "waiting for task %s, but this queue is not started, and no running queue has an "
                "executor for type %r; start a queue that has one",
                task_id,
                task.type,
            )

    def close(self) -> None:
        """Stop watching: end the handles of all tasks that have not ended with ``QueueStopped``."""
        self._closed = True
        self._listen_no_more()
        self.ensure_polling()
        thread = self._thread
        # A thread that another one is about to start is not alive yet; it will see that this is closed.
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(self._timing.close_within)

    # --- the handles

    def _register(self, handle: TaskHandle[Any]) -> None:
        ref = (lambda: handle) if handle._has_callbacks else weakref.ref(handle)
        with self._lock:
            self._handles.setdefault(handle.id, {})[id(handle)] = ref

    def _live(self, task_id: str) -> list[TaskHandle[Any]]:
        """Return the handles of a task that are in use, and forget the others."""
        with self._lock:
            refs = self._handles.get(task_id, {})
            found = {key: ref() for key, ref in refs.copy().items()}
            for key, handle in found.items():
                if handle is None:
                    del refs[key]
            if not refs:
                self._handles.pop(task_id, None)
        return [handle for handle in found.values() if handle is not None]

    # --- checking

    def resolve(self, task_id: str) -> None:
        """Resolve the handles of a task that has just ended, and tell their listeners.

        Its end is committed, so a failed read does no harm: the handles are checked again soon.
        """
        try:
            self._resolve([task_id])
        except RepositoryError as error:
            self._log.debug("the handles of task %s are resolved later: %s", task_id, error)

    def complete(self, task: Task, result: str | None) -> None:
        """Do the same for a task that has just completed in this process: its result need not be read."""
        for ref in self._handles.get(task.id, _NONE).copy().values():
            if (handle := ref()) is None:
                self._live(task.id)  # forgets it; by now another handle may have its ``id()``
            else:
                handle._complete(task.type, result)
                self._tell(handle)

    def tell(self) -> None:
        """Tell the listeners of handles whose end was found on the main thread."""
        while True:
            try:
                handle = self._ended.popleft()
            except IndexError:
                return
            self._end(handle)

    def check_all(self) -> None:
        """Check all watched tasks, and resolve the handles of those that have ended."""
        self.check([task_id for task_id in list(self._handles) if self._live(task_id)])

    def check(self, task_ids: Sequence[str]) -> None:
        """Check some tasks, and resolve the handles of those that have ended."""
        if task_ids:
            statuses = self._repository.statuses(task_ids)  # not the records, which may be large
            self._resolve([i for i in task_ids if i not in statuses or statuses[i] in FINISHED])

    def _resolve(self, task_ids: Sequence[str]) -> None:
        """Resolve the handles of tasks that have ended, or were deleted."""
        for start in range(0, len(task_ids), _MOST_READ):
            some = task_ids[start : start + _MOST_READ]
            # Before the read: a handle that comes later may be of the task's next run, after a requeue.
            watched = [(task_id, self._live(task_id)) for task_id in some]
            found = self._repository.get_many(some)
            for task_id, handles in watched:
                self._conclude(handles, found.get(task_id))

    def _conclude(self, handles: Sequence[TaskHandle[Any]], task: Task | None) -> None:
        for handle in handles:
            handle._conclude(task)
            if handle._has_ended:
                self._tell(handle)

    def _tell(self, handle: TaskHandle[Any]) -> None:
        """Tell the listeners of a handle that has ended, or leave that to another thread.

        The main thread leaves it, because an exception may strike there between two related steps.
        """
        if handle._listeners and on_main_thread() and self._others_tell:
            self._ended.append(handle)
            self._agenda.wake()
        else:
            self._end(handle)

    @property
    def _others_tell(self) -> bool:
        """True if another thread calls :meth:`tell`."""
        return (self._agenda.attended and not self._closed) or self._polls

    def _end(self, handle: TaskHandle[Any]) -> None:
        with self._lock:
            refs = self._handles.get(handle.id, {})
            refs.pop(id(handle), None)
            if not refs:
                self._handles.pop(handle.id, None)
        handle._tell()

    # --- in a queue that is not started

    @property
    def _polls(self) -> bool:
        return (thread := self._thread) is not None and thread.is_alive()

    def ensure_polling(self) -> None:
        """Start the watcher's thread if there is a handle to watch and no other thread checks it."""
        if not self._threaded:  # whoever runs tasks resolves their handles
            if self._closed:
                self._close_all()
            return
        if self._handles and (self._closed or not self._agenda.attended) and not self._polls:
            thread = threading.Thread(target=self._poll, name="taskx-watch", daemon=True)
            self._thread = thread  # before the start: it runs only as long as this names it
            try:
                thread.start()
            except RuntimeError:  # the system cannot start a thread: this thread checks once
                with suppress(RepositoryError):
                    self._close_all() if self._closed else self.check_all()

    def _poll(self) -> None:
        me, timing = threading.current_thread(), self._timing
        listener = self._listen()
        changed, looked, cost = Changes(self._repository), -math.inf, 0.0
        complaint = Complaint(self._log, "handles hear again of tasks that end")
        told, rest = False, Rest(timing)
        while self._thread is me and self._handles and (self._closed or not self._agenda.attended):
            pause, watched = timing.watch_every, len(self._handles)
            try:
                self.tell()
                if self._closed:
                    self._close_all()  # it reads nothing, so it works while the repository is down
                elif changed() or told or time.monotonic() - looked > timing.handles_every:
                    began = time.monotonic()
                    self.check_all()
                    looked = time.monotonic()
                    cost = min(_REST * (looked - began), timing.handles_every)
                    pause = max(timing.watch_every, cost)
                    complaint.over()
            except RepositoryError as error:
                complaint.make("cannot see whether tasks have ended: %s", error)
                pause = timing.handles_every
            except BaseException:  # noqa: BLE001  (without this thread, others would wait for ever)
                self._log.exception("the watcher failed; it goes on")
                pause = timing.handles_every
            if told:
                rest.after(vain=len(self._handles) >= watched)
                time.sleep(max(rest.seconds, timing.shortest_rest, cost))
            try:
                told = _wait(listener, pause)
            except Exception:  # noqa: BLE001  (a defect of a repository)
                self._log.exception(_DEAF)
                self._listen_no_more()
                listener, told = None, False
        if self._agenda.attended or self._closed:
            self._listen_no_more()
        if self._thread is me:
            self._thread = None
            self.ensure_polling()  # a handle may have come in between

    def _listen(self) -> Listener | None:
        """Listen for tasks that end in other processes, if the repository supports it."""
        with self._lock:  # the thread before this one may be about to listen
            if self._listener is None and not self._closed:
                try:
                    self._listener = self._repository.news.listen(ENDED)
                except Exception:  # noqa: BLE001  (a defect of a repository)
                    self._log.exception(_DEAF)
            return self._listener

    def _listen_no_more(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def _close_all(self) -> None:
        for task_id in list(self._handles):
            for handle in self._live(task_id):
                handle._conclude_closed()
                self._tell(handle)

    def renew_after_fork(self) -> None:
        """Start again in a forked child: the threads that waited belong to the parent."""
        self._listener, self._lock = None, threading.RLock()
        for task_id in list(self._handles):
            for handle in self._live(task_id):
                handle._listeners.clear()  # the parent's threads


def _wait(listener: Listener | None, seconds: float) -> bool:
    """Wait for a wake-up, at most ``seconds``. Return True if there was one."""
    if listener is None:
        time.sleep(seconds)
        return False
    return bool(listener.wait(seconds))
