"""Executors in child processes: the child's side, from its start to its end."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import inspect
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from taskx.attempt.alarms import Alarms
from taskx.attempt.checkpoints import Keeper
from taskx.attempt.children import Children
from taskx.attempt.context import Context, Shared, Watched
from taskx.attempt.current import current
from taskx.attempt.emitted import Emitted
from taskx.attempt.executors import Executor, Registered, entry_of, make_executor
from taskx.attempt.failures import told_error
from taskx.attempt.process.channel import Channel
from taskx.attempt.process.processes import end_family
from taskx.attempt.waiting import Parked, Waits, heard
from taskx.tasks import forks, payload, permission
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    PayloadError,
    RepositoryError,
    TaskNotFound,
)
from taskx.tasks.log import Once
from taskx.tasks.model import Task
from taskx.tasks.options import Options
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.token import CancelToken

if TYPE_CHECKING:
    from taskx.attempt.coroutines import Loop

_PR_SET_PDEATHSIG = 1


def main(end: str, paper: str) -> NoReturn:
    """Run one task for the parent process, and exit.

    The arguments are file descriptors: ``end`` is this end of the channel, ``paper`` is a file for the
    traceback after a fatal signal.
    """
    for number in (end, paper):
        os.set_inheritable(int(number), False)
    faulthandler.enable(int(paper), all_threads=False)
    channel = Channel(socket.socket(fileno=int(end)))
    (request,), *further = _first_messages(channel)
    _die_with(request["parent"])
    for meant_for_parent in (signal.SIGINT, signal.SIGTERM):
        # Not SIG_IGN, because programs that are started here would inherit it.
        signal.signal(meant_for_parent, lambda *_: None)
    sys.argv = request["argv"]
    work = _Work(channel, request)
    work.heed(further)
    work.do()
    forks.flush_streams()
    channel.flush()
    os._exit(0)


def _first_messages(channel: Channel) -> list[list[Any]]:
    """Return the request, and the messages that may already follow it."""
    messages: list[list[Any]] | None = []
    while messages == []:
        messages = channel.hear(60.0)
    return messages or end_family()


def _die_with(parent: int) -> None:
    """Tell the kernel, if it can, to kill this process when the thread that started it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has already ended
        end_family()


def _own_loop() -> Loop:
    from taskx.attempt.coroutines import Loop  # at first use

    return Loop()


class _Work:
    """The one task that a child runs, as its request says."""

    def __init__(self, channel: Channel, request: dict[str, Any]) -> None:
        self._channel = channel
        self._request = request
        # The monotonic clock is the machine's, so the time that the start of this process took counts.
        deadline = None if request["left"] is None else request["asked_at"] + request["left"]
        self._token = CancelToken(deadline, SYSTEM_CLOCK)
        self._parent = _Parent(channel, request["no_checkpoints"], request["max_payload_size"])
        log = logging.getLogger(request["logger"])
        # The parent knows for which types the log has said it.
        cut = Once(lambda type: channel.say("cut"))
        alarms, parent = Alarms(SYSTEM_CLOCK, DEFAULT_TIMING), self._parent
        shared = Shared(alarms, log, parent, parent.fetch, None, _own_loop, cut)
        self._beats = False  # True if there was a sign of life that the parent does not know of
        given = Task.from_dict(request["task"]), self._token, shared
        self._context = Watched(*given, self._beat) if request["stalls"] else Context(*given)

    def _beat(self) -> None:
        self._beats = True

    def do(self) -> None:
        """Run the task, and tell the parent how it ended."""
        threading.Thread(target=self._listen, name="taskx-parent", daemon=True).start()
        try:
            message: list[Any] = ["returned", self._call()]
        except BaseException as raised:  # noqa: BLE001  (told to the parent)
            reason, error = self._token.reason, raised
            if (parked := self._context._parked) is not None:
                error = Parked(self._context._sealed(), parked.step)
            told = told_error(error, skip=2, main=self._request["main"])
            message = ["raised", told, reason and reason.value]
        self._context._save_emitted()
        if (progress := self._context._latest_progress()) is not None:
            self._channel.say("progress", *progress)
        if spent := self._context._spent_in_truth():
            self._channel.say("spent", spent)
        self._channel.say(*message)

    def heed(self, messages: list[list[Any]]) -> None:
        """Handle messages of the parent: a stop with its reason, or the answer to a question."""
        for what, *facts in messages:
            if what == "stop":
                self._token.fire(CancelReason(*facts))
            elif what == "answer":
                self._parent.answers.put(facts)

    def _listen(self) -> None:
        """Receive messages of the parent, report progress to it, and end when the parent ends."""
        while (messages := self._channel.hear(self._request["progress_every"])) is not None:
            self.heed(messages)
            if (told := self._context._new_progress()) is not None:
                self._channel.say("progress", *told)
            elif self._beats:
                self._channel.say("alive")
            self._context._save_emitted()
            self._beats = False
        end_family()

    def _call(self) -> str | None:
        request = self._request
        executor = _find(request["type"], *request["address"])
        _log_to(self._channel, request["levels"])
        self._token.raise_if_cancelled()
        params = request["task"]["params"] if request["params"] is None else request["params"]
        given = (self._context,) if executor.takes_context else ()
        before = forks.generation
        current.context = self._context
        try:
            value = executor.function(*given, **params)
        except BaseException as error:
            forks.end_in_child(before, error)
            raise
        forks.end_in_child(before)
        if self._context._parked is not None:  # the executor has caught the exception
            raise self._context._parked
        if value is None:
            return None
        return payload.encode(value, "result", request["max_payload_size"])


class _Parent(Keeper):
    """The parent process, which stores checkpoints and reads tasks for the child.

    Any thread may ask; the parent answers one question at a time.
    """

    def __init__(self, channel: Channel, refused: str, max_payload_size: int) -> None:
        self.max_payload_size = max_payload_size
        self.lock = threading.Lock()
        self.process = forks.generation
        self._channel = channel
        self._refused = refused  # the reason why checkpoints cannot be stored, or empty
        self._asking = threading.Lock()
        self.waits = waits = _Waits(self._ask)
        self.children = _Children(waits.heard)
        #: The parent's answers.
        self.answers: SimpleQueue[list[Any]] = SimpleQueue()

    def _ask(self, *question: Any) -> Any:
        """Return the parent's answer; raise PayloadError or RepositoryError if the parent failed."""
        with self._asking:
            self._channel.say(*question)
            answer, problem, path = self.answers.get()
        if path:
            raise PayloadError(path, problem)
        if problem:
            raise RepositoryError(problem)
        return answer

    def fetch(self, _: Sequence[str]) -> dict[str, Task]:
        """Return the tasks that this task depends on, by their ids."""
        found = self._ask("parents")
        if isinstance(found, str):
            raise TaskNotFound(found)
        return {parent["id"]: Task.from_dict(parent) for parent in found}

    def check(self) -> None:
        if self._refused:
            raise ConfigurationError(self._refused)

    def refuse_own_transaction(self) -> None:
        """Do nothing: a thread of the parent stores."""

    def transaction(self, *_: Any) -> NoReturn:
        raise ConfigurationError(
            "ctx.transaction() is not available with isolation='process': the child process has no "
            "connection to the repository"
        )

    def file(self, task: Task, text: str, token: CancelToken) -> str:
        name = self._ask("file", text)
        if name is None:
            token.wait()  # the token of the parent has fired
            token.raise_if_cancelled()
        return str(name)

    def save(self, task: Task, emitted: Emitted, token: CancelToken) -> None:
        if texts := emitted.unsaved():
            self._channel.say("emitted", [*texts.items()])
            emitted.saved(texts)

    def store(self, task: Task, text: str, *, durable: bool, token: CancelToken) -> bool:
        kept = bool(self._ask("checkpoints", text, durable))
        if not kept:
            token.raise_if_cancelled()
        return kept


class _Waits(Waits):
    """The waits of a run in a child process: the parent looks, and makes answers."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def now_ms(self) -> int:
        return SYSTEM_CLOCK.now_ms()

    def ask(
        self,
        task: Task,
        name: str,
        question: Any,
        timeout: float | None,
        tags: Sequence[str],
        token: CancelToken,
        what: str = "question",
    ) -> Any:
        text = payload.encode(question, "question", payload.NO_LIMIT)
        return self.heard(token, "ask", name, text, timeout, [*tags], what)

    def forget(self, task: Task, name: str, token: CancelToken) -> object:
        return self.heard(token, "forget", name)

    def wait(
        self, task: Task, awaited: str, timeout: float | None, until: int | None, token: CancelToken
    ) -> Any:
        return self.heard(token, "wait", awaited, timeout, until)

    def heard(self, token: CancelToken, *question: Any) -> Any:
        """Return or raise what the parent has told."""
        said = self._ask(*question)
        if said is None:  # the token of the parent has fired
            token.wait()
        token.raise_if_cancelled()
        return heard(said)


class _Children(Children):
    """The children of a run in a child process: the parent submits them, and reads their results."""

    def __init__(self, heard: Callable[..., Any]) -> None:
        self._heard = heard

    def wait(
        self,
        parent: Task,
        name: str,
        tasks: Sequence[Task],
        needed: int | None,
        taken: list[int] | None,
        token: CancelToken,
    ) -> Any:
        return self._heard(token, "children", name, _told(tasks), needed, taken)

    def outcomes(
        self, parent: Task, name: str, some: bool, taken: Sequence[int] | None, token: CancelToken
    ) -> Any:
        return self._heard(token, "outcomes", name, some, taken)

    def fork(self, parent: Task, name: str, tasks: Sequence[Task], token: CancelToken) -> Any:
        return self._heard(token, "fork", name, _told(tasks))


def _told(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    for task in tasks:
        payload.encode_params(task.params, payload.NO_LIMIT)  # raises if they are not JSON
    return [task.to_dict() for task in tasks]


def _find(type: str, module: str, name: str, main: str) -> Registered:
    """Import the executor and return its entry; ``ConfigurationError`` if it cannot be found."""
    with permission.importing(
        f"this is the child process of a task of type {type!r}, and it imports {main or module}; "
        'submit tasks and start queues there only under: if __name__ == "__main__"'
    ):
        if main:
            from multiprocessing import spawn

            spawn.prepare({"init_main_from_path": main})
        found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigurationError(f"{module} has no {name}, the executor of {type!r}")
    if inspect.isclass(found):
        found = found()
    elif not isinstance(found, Executor):
        found = make_executor(found, type, Options())
    return entry_of(found, Options())


def _log_to(channel: Channel, levels: dict[str, int]) -> None:
    """Send all log records to the parent, instead of to the handlers that an import has set up."""
    handler = _ToParent(channel)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.root.handlers = [handler]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class _ToParent(logging.Handler):
    """A handler that sends log records to the parent."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record with its complete text and the plain values of its ``extra``."""
        try:
            told = {
                name: value
                for name, value in vars(record).items()
                if value is None or isinstance(value, (str, int, float))
            }
            told.update(msg=record.getMessage(), args=None, exc_info=None)
            if record.exc_info and not record.exc_text:
                told["exc_text"] = _formatter.formatException(record.exc_info)
            self._channel.say("log", told)
            self._channel.flush()
        except Exception:  # as each handler does  # noqa: BLE001
            self.handleError(record)


_formatter = logging.Formatter()
