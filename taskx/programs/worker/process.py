"""One process of a supervisor: it loads the queue, runs it, and tells the supervisor how it is.

The supervisor starts a fresh interpreter with this module, the number of a socket, and the queue's place.
The socket carries lines of JSON. From the supervisor: the settings, then ``stop`` and ``now``. To the
supervisor: ``beat`` (the first one says that the queue has started), ``leaving`` and ``failed``. If the
socket closes, the supervisor has died, and the process stops as after SIGTERM.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, NoReturn

from taskx.attempt.process.channel import Channel
from taskx.attempt.process.processes import end_family
from taskx.node.node import LocalNode
from taskx.programs.worker.loading import files_of, load_queue_to_run
from taskx.programs.worker.logs import set_up_log
from taskx.programs.worker.settings import AWAY, RECYCLE, USAGE, Settings
from taskx.queue import foreground
from taskx.queue.queue import Queue, node_of
from taskx.stores.base import Repository
from taskx.tasks.errors import ConfigurationError, RepositoryError
from taskx.tasks.forks import flush_streams
from taskx.tasks.timing import DEFAULT_TIMING, Timing

#: Share of a limit by which it may be lower, so that not all processes reach it at the same time.
JITTER = 0.2
#: Bytes of a mebibyte.
MIB = 1 << 20

log = logging.getLogger("taskx.worker")


def main(number: str, target: str) -> NoReturn:
    """Run a process of a supervisor.

    Args:
        number: the file descriptor of the socket between them.
        target: the queue's place, for people who look at the list of processes.
    """
    # Not ignored, because programs that executors start would inherit that.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    end = socket.socket(fileno=int(number))
    end.set_inheritable(False)  # programs that executors start must not hold it
    channel = Channel(end)
    messages: list[list[Any]] | None = []
    while messages == []:
        messages = channel.hear(60.0)
    if messages is None:
        os._exit(1)
    [settings], *orders = messages
    process = Process(channel, Settings(**settings))
    atexit.register(process.end)  # before the program's own functions, and so called after them
    code = process.run([order for (order,) in orders])
    # A thread of the program that does not end must not keep the process.
    timer = threading.Timer(DEFAULT_TIMING.leave_within, process.end, (code,))
    timer.name, timer.daemon = "taskx-leave", True
    timer.start()
    sys.exit(code)


class Process:
    """The one queue of this process, between its supervisor and the system."""

    def __init__(
        self, channel: Channel, settings: Settings, timing: Timing = DEFAULT_TIMING
    ) -> None:
        self._channel = channel
        self._settings = settings
        self._timing = timing
        self._signals = foreground.Signals(timing, once=True)
        self._node: LocalNode | None = None
        self._queue: Queue | None = None
        self._limits = Limits(settings)
        self._changes = Changes(loaded_files)
        self._leaving = ""  # the reason why this process asks to be replaced
        self._ready = self._idle = self._over = False

    def run(self, orders: Iterable[str] = ()) -> int:
        """Load and run the queue; return the exit code of the process."""
        for order in orders:
            self._obey(order)
        threading.Thread(target=self._attend, name="taskx-supervisor", daemon=True).start()
        try:
            if self._settings.reload:
                self._changes.watch()
            queue = load_queue_to_run(self._settings.target)
            check_shared(self._settings.processes, queue.repository)
            if self._settings.reload:
                self._changes.note(loaded_files())
            set_up_log(self._settings.log_level)
            check_memory(self._settings.max_memory, memory())
            self._node = node_of(queue, self._settings.threads)
            self._queue = queue
            code = foreground.run([self._node], self._settings.stop_timeout, self._signals)
        except Exception as error:  # noqa: BLE001  (told to the supervisor)
            return self._failed(error)
        finally:
            self._over = True
        if code == 0:  # no task runs: the file is left without a log
            with suppress(RepositoryError):
                queue.close()
        return RECYCLE if self._leaving and not self._signals.caught else code

    def end(self, code: int | None = None) -> None:
        """Kill this process and the programs of its executors if tasks still run.

        They start again elsewhere as soon as this process has ended, and their programs must not run beside
        them there. With a code, end the process in any case.
        """
        node = self._node
        if node is not None and node.pool and (running := node.still_running()):
            if code is None:  # else the program keeps this process, and perhaps a lock of a stream
                log.warning(
                    "this process is killed, with the programs of its executors: %d task(s) still run",
                    len(running),
                )
                flush_streams()
            end_family()
        if code is not None:
            os._exit(code)

    def _failed(self, error: Exception) -> int:
        code = USAGE if isinstance(error, ConfigurationError) else 1
        code = AWAY if isinstance(error, RepositoryError) else code
        set_up_log(self._settings.log_level)
        log.debug("the process cannot start", exc_info=error)
        self._channel.say("failed", code, " ".join(str(error).split()) or type(error).__name__)
        if self._settings.reload:
            self._idle = True
            self._changes.wait({*files_of(error), *loaded_files(), *_sources()})
            code = RECYCLE
        self._channel.flush()
        return code

    # --- the supervisor, on a thread of its own

    def _attend(self) -> None:
        """Follow the supervisor's orders, and beat, until the process ends."""
        beat_at, timing = 0.0, self._timing
        while not self._over:
            every = timing.beat_every if self._ready else timing.start_check_every
            messages = self._channel.hear(every)
            if messages is None:
                self._orphaned()
                return
            for (order,) in messages:
                self._obey(order)
            # Also if it is stopping already: the supervisor must know that tasks may be left.
            self._ready = self._ready or (self._node is not None and self._node.pool is not None)
            if self._ready and time.monotonic() >= beat_at:
                beat_at = time.monotonic() + timing.beat_every
                self._beat()

    def _obey(self, order: str) -> None:
        if self._node is None or self._idle:  # it runs nothing
            os._exit(0)
        wanted = 1 if order == "stop" else 2
        while len(self._signals.caught) < wanted:
            self._signals.note(signal.SIGTERM)

    def _orphaned(self) -> None:
        if self._node is None or self._idle:
            os._exit(1)
        if not self._signals.caught:
            log.warning("the supervisor has died: this process stops")
            self._signals.note(signal.SIGTERM)

    def _beat(self) -> None:
        assert self._queue is not None
        assert self._node is not None
        node, pool = self._node, self._node.pool
        if pool is None or self._channel.unsent:  # the supervisor does not read
            return
        facts = self._limits.facts(pool)
        running = len(pool.ahead.at_work)
        facts.update(healthy=self._queue.healthy, running=running, problems=node.problems())
        facts.update(shared=self._queue.repository.shared)
        self._channel.say("beat", facts)
        why = self._limits.reached(facts)
        if self._settings.reload and not why and (file := self._changes.next()):
            why = f"{file} has changed"
        if why and not self._leaving and not node.stops:
            self._leave(why)

    def _leave(self, why: str) -> None:
        """Stop the queue, and ask the supervisor for another process."""
        assert self._node is not None
        self._leaving = why
        self._channel.say("leaving", why)
        stop, timeout = self._node.stop, self._settings.stop_timeout
        threading.Thread(
            target=lambda: stop(timeout, cancel=False), name="taskx-recycle", daemon=True
        ).start()


class Limits:
    """The limits of this process: a random value between 80 % and 100 % of what was asked for."""

    def __init__(self, settings: Settings, draw: Callable[[], float] = random.random) -> None:
        share = 1 - JITTER * draw()
        self._tasks = settings.max_tasks and max(1, round(settings.max_tasks * share))
        self._memory = settings.max_memory and round(settings.max_memory * share)
        self._age = settings.max_age and settings.max_age * share
        self._began = time.monotonic()

    def facts(self, pool: Any) -> dict[str, Any]:
        """Return the age, the memory and, if they are limited, the attempts of this process."""
        facts: dict[str, Any] = {"age": time.monotonic() - self._began, "memory": memory()}
        return facts if self._tasks is None else {**facts, "attempts": pool.ahead.attempts}

    def reached(self, facts: dict[str, Any]) -> str:
        """Return words about the limit that is reached; empty if none is."""
        if self._tasks is not None and facts["attempts"] >= self._tasks:
            return f"it has run {facts['attempts']} tasks"
        if self._memory is not None and facts["memory"] >= self._memory:
            return f"it takes {facts['memory'] // MIB} MiB"
        if self._age is not None and facts["age"] >= self._age:
            return f"it is {facts['age']:.0f} s old"
        return ""


def check_memory(limit: int | None, taken: int) -> None:
    """Refuse a limit of memory at which a process would be replaced before it runs a task.

    Raises:
        ConfigurationError: a process that runs no task takes too much, in bytes.
    """
    if limit is not None and taken >= limit * (1 - JITTER):
        least = int(taken / (1 - JITTER) / MIB) + 1
        raise ConfigurationError(
            f"the program takes {taken / MIB:.0f} MiB before it runs a task: --max-memory must be at least "
            f"{least}M, and more for the tasks"
        )


def check_shared(processes: int, repository: Repository) -> None:
    """Refuse several processes on a repository that is for one: each would take the tasks of the others.

    Raises:
        ConfigurationError: there are several processes, and the repository is for one.
    """
    if processes > 1 and not repository.shared:
        name = type(getattr(repository, "inner", repository)).__name__
        raise ConfigurationError(
            f"{name} is for one process, and --processes is {processes}: leave it out and set --threads, "
            "or use SQLiteRepository, PostgresRepository or MongoRepository"
        )


def memory() -> int:
    """Return the resident memory of this process in bytes; its peak where the system tells no more."""
    with suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- reloading


class Changes:
    """The files of imported modules that change.

    A file may change at any moment, even while Python imports it. So its state is noted before Python reads
    it, where possible.
    """

    def __init__(self, files: Callable[[], Iterable[str]]) -> None:
        self._files = files
        self._seen: dict[str, tuple[int, int] | None] = {}
        self._known: set[str] = set()  # the Python files in the working folder before the import

    def watch(self) -> None:
        """Note the files that exist now, and from now on each file before it is imported."""
        self._known = _sources()
        self.note(self._files())
        sys.meta_path.insert(0, _Noting(self))

    def note(self, files: Iterable[str]) -> None:
        """Note the state of these files, unless it was noted before."""
        for file in files:
            if file not in self._seen:
                self._seen[file] = _stamp(file)

    def next(self) -> str:
        """Return a file that has changed since it was first seen; empty if none has."""
        return self._changed(self._files())

    def wait(self, files: Collection[str]) -> None:
        """Wait until one of these files changes, or a Python file appears in the working folder."""
        while not self._changed(files) and _sources() == self._known:
            time.sleep(DEFAULT_TIMING.beat_every / 2)

    def _changed(self, files: Iterable[str]) -> str:
        for file in files:
            stamp = _stamp(file)
            if self._seen.setdefault(file, stamp) != stamp:
                return file
        return ""


class _Noting:
    """The first finder of modules. It finds nothing, and notes each source file before Python reads it."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        with suppress(Exception):  # the finder that is asked next raises it again
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.origin is not None:
                self._changes.note([spec.origin])


def _stamp(file: str) -> tuple[int, int] | None:
    """Return the time and the size of a file. Two changes at the same moment may differ only in size."""
    try:
        state = os.stat(file)
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size


def loaded_files() -> set[str]:
    """Return the source files of the modules that this process has imported."""
    return {file for module in list(sys.modules.values()) if (file := _file_of(module))}


def _file_of(module: object) -> str:
    file: object = None
    with suppress(Exception):  # a lazy module may raise anything
        file = getattr(module, "__file__", None)
    return file if isinstance(file, str) else ""


def _sources() -> set[str]:
    """Return the Python files in the working folder, where a missing module may appear."""
    with suppress(OSError):
        return {entry.path for entry in os.scandir(os.getcwd()) if entry.name.endswith(".py")}
    return set()
