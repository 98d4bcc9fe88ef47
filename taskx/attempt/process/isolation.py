"""Executors in child processes: the parent's side, which starts a child, serves it, and kills it."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from taskx.attempt.context import Context
from taskx.attempt.executors import Executor, Registered, TaskExecutor
from taskx.attempt.failures import MAX_TRACEBACK, ChildDied, ChildKilled, heard_error, shortened
from taskx.attempt.process.channel import Channel
from taskx.attempt.process.interpreter import start_python
from taskx.attempt.process.processes import kill_family
from taskx.attempt.waiting import Parked, told
from taskx.tasks import payload
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    PayloadError,
    RepositoryError,
    TaskCancelled,
    TaskNotFound,
    is_interrupt,
)
from taskx.tasks.ids import new_id
from taskx.tasks.timing import Timing


class Address(NamedTuple):
    """The place from which a child process imports an executor."""

    module: str  #: the module to import
    name: str  #: the executor's name in the module, with dots if it is inside a class
    main: str = ""  #: the file of the program's main module, if it must be loaded first


def address_of(type: str, found: Any) -> Address:
    """Return the address of an executor's function or class.

    Raises ``ConfigurationError`` if a child process cannot import it.
    """
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    if getattr(sys, "frozen", False):
        raise _refusal(type, "a frozen program cannot be started as an interpreter")
    if not name or "<" in name or inspect.ismethod(found) or module not in sys.modules:
        raise _refusal(type, f"{found!r} is not at the top level of a module that can be imported")
    if inspect.isclass(found) and _needs_arguments(found):
        raise _refusal(type, f"{name} cannot be created without arguments")
    if module not in ("__main__", "__mp_main__"):
        return Address(module, name)
    main = sys.modules[module]
    if (spec := getattr(main, "__spec__", None)) is not None:  # python -m
        return Address(spec.name, name)
    if (file := getattr(main, "__file__", None)) is None or not os.path.exists(file):
        raise _refusal(
            type, "the main module of this program is not a file that can be loaded again"
        )
    return Address("__main__", name, os.path.abspath(file))


def _refusal(type: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f'executor {type!r} cannot have isolation="process", because a child process must be able '
        f"to import it: {why}"
    )


def _needs_arguments(cls: Callable[..., Any]) -> bool:
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(cls).parameters.values()
    )


class Isolated:
    """The stand-in for an executor in the parent process: it runs the executor in a child process."""

    def __init__(
        self,
        executor: Executor[Any, Any] | TaskExecutor,
        entry: Registered,
        max_payload_size: int,
        timing: Timing,
    ) -> None:
        self._type = entry.type
        self._code: Any = (
            executor.function if isinstance(executor, Executor) else executor.__class__
        )
        self._address = address_of(entry.type, self._code)
        # The name of the main module in the child, if the child imports it.
        self._main = ("__mp_main__" if self._address.main else self._address.module) * (
            self._code.__module__ == "__main__"
        )
        # Celery finds the program in a folder that it takes out of sys.path after the import.
        self._path = list(sys.path)
        self._grace = entry.options.patience
        self._stalls = entry.options.stall is not None
        self._values = entry.values
        self._max_payload_size = max_payload_size
        self._timing = timing

    def __call__(self, ctx: Context, /, **params: Any) -> Any:
        """Run the executor in a child process and return its result.

        Raises ``Remote``, ``ChildDied`` or ``ChildKilled``.
        """
        self._check_name()
        task = ctx.task.to_dict()
        if (values := self._values) is not None:  # middleware may have decoded params
            task["params"] = values.encode_params(task["params"])
            params = values.encode_params(params)
        request = {
            "type": self._type,
            "address": self._address,
            "main": self._main,
            "task": task,
            "params": None if task["params"] == params else params,
            "max_payload_size": self._max_payload_size,
            "left": ctx.remaining(),
            "stalls": self._stalls,
            "asked_at": time.monotonic(),
            "no_checkpoints": ctx._checkpoints_refused(),
            "parent": os.getpid(),
            "progress_every": self._timing.progress_every,
            "argv": sys.argv,
            "logger": ctx.logger.logger.name,
            "levels": _log_levels(ctx.logger.logger),
        }
        child = _Child(self._path)
        try:
            return _Attendance(ctx, child, self._grace, self._timing.child_every).run(request)
        finally:
            child.end()

    def _check_name(self) -> None:
        """Raise ``ConfigurationError`` if the name now belongs to another object.

        This is not checked at registration, because the name may not be bound yet then.
        """
        module, name = self._code.__module__, self._code.__qualname__
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, Executor):
            found = found.function
        if found is not self._code:
            raise ConfigurationError(
                f"cannot import the executor of {self._type!r}: {module}.{name} is another object"
            )


class _Child:
    """A child process. It has its own session, because the parent handles Ctrl-C and tells the child."""

    def __init__(self, path: Sequence[str]) -> None:
        with ExitStack() as stack:
            self._last_words = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = socket.socketpair()
            self.channel = Channel(ours)
            stack.callback(self.channel.close)
            with theirs:
                self._mark = new_id()
                files = theirs.fileno(), self._last_words.fileno()
                self._process = _start(self._mark, path, *files)
            self._close = stack.pop_all().close
        #: True if the child has reported how the executor ended.
        self.done = False

    @property
    def ended(self) -> bool:
        """True if the process has ended."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """Kill the child and the processes it has started; return when the child has ended."""
        kill_family(self._process.pid, self._mark, reaped=self.ended)
        self._process.wait()

    def end(self) -> None:
        """End the child. If the executor has ended, processes that it left in the background go on."""
        if not self.done:
            self.kill()
        elif not self.ended:
            self._process.kill()
            self._process.wait()
        self._close()

    def post_mortem(self) -> ChildDied:
        """Return an error that says why, and where, the child ended by itself."""
        self._last_words.seek(0)
        words = self._last_words.read(2 * MAX_TRACEBACK).decode(errors="replace")
        code = self._process.returncode
        cause = f"its process ended with exit code {code}"
        if code < 0:  # real-time signals have no names
            names = {known.value: known.name for known in signal.Signals}
            cause = f"its process was killed by {names.get(-code, f'signal {-code}')}"
        if code == -signal.SIGKILL:
            cause += ", perhaps because memory ran out"
        return ChildDied(cause, shortened(words))


def _start(mark: str, path: Sequence[str], *files: int) -> subprocess.Popen[bytes]:
    return start_python(
        "taskx.attempt.process.child:main",
        *map(str, files),
        mark=mark,
        path=path,
        stdin=subprocess.DEVNULL,
        pass_fds=files,
        start_new_session=True,
    )


class _Attendance:
    """A worker's wait for a child process."""

    def __init__(self, ctx: Context, child: _Child, grace: float, every: float) -> None:
        self._ctx = ctx
        self._token = ctx.token
        self._child = child
        self._grace = grace
        self._every = every
        self._kill_at: float | None = None

    def run(self, request: Mapping[str, Any]) -> Any:
        """Send a request, and return the result or raise the error of the executor."""
        self._child.channel.say(request)
        remove = self._token.on_cancel(self._tell_to_stop)
        try:
            while True:
                for what, *facts in self._hear():
                    if what == "returned":
                        self._child.done = True
                        return None if facts[0] is None else payload.loads(facts[0])
                    if what == "raised":
                        self._child.done = True
                        raise self._raised(*facts)
                    self._note(what, *facts)
                self._kill_if_it_is_time()
        finally:
            remove()

    def _tell_to_stop(self) -> None:
        assert self._token.reason is not None
        self._child.channel.say("stop", self._token.reason.value)

    def _hear(self) -> list[list[Any]]:
        channel = self._child.channel
        left = self._every if self._kill_at is None else self._kill_at - time.monotonic()
        messages = channel.hear(max(0.0, min(self._every, left)))
        if messages == [] and self._child.ended:
            # A process that the executor started may keep the socket open. All messages have arrived now.
            messages = channel.hear_rest()
        if messages is None:
            self._child.kill()
            self._token.raise_if_cancelled()
            raise self._child.post_mortem()
        return messages

    def _kill_if_it_is_time(self) -> None:
        if (reason := self._token.reason) is None:
            return
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace
        if time.monotonic() >= self._kill_at:
            self._child.kill()
            raise ChildKilled(reason, self._grace)

    def _note(self, what: str, *facts: Any) -> None:
        if what != "log":  # a captured line is a sign of life, too, but not each one
            self._ctx.alive()
        if what == "progress":
            self._ctx.progress(*facts)
        elif what == "emitted":
            self._ctx._take_emitted(facts[0])
        elif what == "spent":
            self._ctx.spent(**facts[0])
        elif what == "cut":
            self._ctx._message_was_cut()
        elif what == "log":
            _log(self._ctx.logger.logger, *facts)
        elif what == "checkpoints":
            self._child.channel.say("answer", *self._keep(*facts))
        elif what == "file":
            self._child.channel.say("answer", *self._file(*facts))
        elif what == "parents":
            self._child.channel.say("answer", *self._parents())
        elif what in ("ask", "forget", "wait", "children", "outcomes", "fork"):
            self._child.channel.say("answer", *self._wait(what, *facts))

    def _keep(self, text: str, durable: bool) -> tuple[bool, str, str]:
        """Store checkpoints. Return True if the run still has its task; then the problem and its path."""
        try:
            return self._ctx._keep_checkpoints(text, durable=durable), "", ""
        except TaskCancelled:
            return False, "", ""  # the child is told to stop, too
        except PayloadError as error:
            return False, error.problem, error.path
        except RepositoryError as error:
            return False, str(error), ""

    def _file(self, text: str) -> tuple[str | None, str, str]:
        """Store steps of the child in a note. Return its name; then the problem and its path."""
        try:
            return self._ctx._file(text), "", ""
        except TaskCancelled:
            return None, "", ""  # the child is told to stop, too
        except PayloadError as error:
            return None, error.problem, error.path
        except RepositoryError as error:
            return None, str(error), ""

    def _wait(self, what: str, *facts: Any) -> tuple[Any, str, str]:
        """Return how an answer or a task has ended, or that the child's task waits; then the problem."""
        try:
            return told(lambda: self._ctx._look(what, *facts)), "", ""
        except TaskCancelled:
            return None, "", ""  # the child is told to stop, too
        except PayloadError as error:
            return None, error.problem, error.path
        except RepositoryError as error:
            return None, str(error), ""

    def _parents(self) -> tuple[list[dict[str, Any]] | str, str, str]:
        """Return the task's parents, or the id of a deleted parent; then the problem and its path."""
        try:
            return [parent.to_dict() for parent in self._ctx.parents], "", ""
        except TaskNotFound as gone:
            return gone.task_id, "", ""
        except RepositoryError as error:
            return "", str(error), ""

    def _raised(self, told: Mapping[str, Any], fired: str | None) -> BaseException:
        if fired is not None:  # by the child's clock, which may be a little ahead
            self._token.fire(CancelReason(fired))
        error = heard_error(told)
        if isinstance(error, Parked):  # a layer of middleware may catch it
            self._ctx._note_parked(error)
        return error


def _log_levels(log: logging.Logger) -> dict[str, int]:
    """Return the levels of all loggers, so that a child makes the records that this process wants."""
    known = {
        name: logger.level
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and logger.level
    }
    return {**known, "root": logging.root.level, log.name: max(1, log.getEffectiveLevel())}


def _log(log: logging.Logger, record: dict[str, Any]) -> None:
    """Handle a log record of the child as a record of this process."""
    logger = log if record["name"] == log.name else logging.getLogger(record["name"])
    try:
        if logger.isEnabledFor(record["levelno"]):
            logger.handle(logging.makeLogRecord(record))
    except BaseException as error:  # a user's filter raised it
        if is_interrupt(error):
            raise
