"""Coroutines: an event loop in a thread of its own runs the executors that are ``async def``.

The thread of a worker waits for its coroutine. So time-outs, the last chance, kept logs and the fence are
those of other executors.
"""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor, Future
from contextlib import closing, suppress
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from taskx.tasks import forks
from taskx.tasks.errors import TaskCancelled
from taskx.tasks.log import log
from taskx.tasks.model import Task
from taskx.tasks.stacks import top_frames
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.token import CancelToken

T = TypeVar("T")


class Waiter(Executor):
    """A thread that waits for the end of a coroutine, and makes the calls that are submitted to it."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # Held for moments only: to begin a call, or to let the thread go on.
        self._deciding = _thread.allocate_lock()
        self._busy = self._free = False
        #: True if it has gone on before the coroutine ended.
        self.left = False

    @property
    def waits(self) -> bool:
        """True if the coroutine alone goes on: the thread only waits for it, or has left it."""
        return self.left or not (self._busy or self._free)

    def wait(self) -> None:
        """Wait in this thread, until :meth:`let_go`."""
        while not (self._free and self._calls.empty()):
            if (call := self._calls.get()) is not None:
                self._make(*call)
                del call  # it keeps values of the coroutine alive

    def _make(self, future: Future[T], call: Callable[[], T]) -> None:
        try:
            with self._deciding:
                self._busy = not self._free
            if not self._busy:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                future.set_result(call())
        except BaseException as error:  # noqa: BLE001  (raised where the future is awaited)
            future.set_exception(error)
        finally:
            self._busy = False

    def let_go(self, *, early: bool = False) -> bool:
        """Let the thread go on, ``early`` only if it just waits; return False if it does not."""
        with self._deciding:
            if self._free or (early and self._busy):
                return False
            self._free, self.left = True, early
        self._calls.put(None)
        return True

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have the thread call a function; return the future of its result.

        Raises:
            RuntimeError: the thread does not wait any more.
        """
        future = Future[T]()
        with self._deciding:
            if self._free:
                raise RuntimeError(
                    "the thread of the task does not wait for its coroutine any more"
                )
            self._calls.put((future, partial(fn, *args, **kwargs)))
        return future


class Awaited:
    """A coroutine that a worker's thread waits for."""

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        task: Task,
        token: CancelToken,
        loop: asyncio.AbstractEventLoop,
        running: dict[Awaited, None],
    ) -> None:
        #: The id of the task that it belongs to; the id and the type.
        self.task_id, self.name = task.id, f"{task.id} ({task.type})"
        self._token = token
        #: The loop that runs it.
        self.loop = loop
        self._coroutine = coroutine
        #: The thread that waits for it.
        self.thread = Waiter()
        self._process = forks.generation
        #: The task of asyncio; None before the loop has made it.
        self.task: asyncio.Task[None] | None = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._on_end: Callable[[], object] = int
        self._running = running
        running[self] = None

    # --- on the loop

    def begin(self) -> None:
        """Make the task of asyncio."""
        self.task = self.loop.create_task(self._run(), name=f"taskx {self.name}")
        self.task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # before its first step
            self._coroutine.close()
            self._error = asyncio.CancelledError()
        elif (error := task.exception()) is not None:  # a GeneratorExit of the coroutine itself
            self._error = error
        self._end()

    async def _run(self) -> None:
        """Await the coroutine.

        Its error is kept here: asyncio itself would end the loop at a ``SystemExit``, and could not tell a
        ``CancelledError`` of the coroutine from its own.
        """
        try:
            self._value = await self._coroutine
        except GeneratorExit:  # the loop is gone
            raise
        except BaseException as error:  # noqa: BLE001  (raised in the worker's thread)
            self._error = error
        if forks.generation != self._process:
            forks.end_in_child(self._process, self._error)

    def _end(self) -> None:
        """Let the thread go on, because the coroutine has ended; a second call does nothing."""
        try:
            del self._running[self]
        except KeyError:
            return
        if not self.thread.let_go():  # it has left
            # The call waits for the outcome to be handed on, and the loop must not.
            threading.Thread(target=self._on_end, name="taskx-stuck", daemon=True).start()

    # --- in other threads

    def wait(self) -> Any:
        """Wait for the end, and return the result.

        Raises:
            TaskCancelled: the token has fired, and the coroutine has let the ``CancelledError`` through.
            BaseException: any other exception of the coroutine.
        """
        self.thread.wait()
        error, self._error = self._error, None  # else it would keep itself alive
        if error is None:
            return self._value
        trace = error.__traceback__
        if trace is not None:  # without the frame of this class
            trace = trace.tb_next
        reason = self._token.reason
        try:
            if reason is not None and isinstance(error, asyncio.CancelledError):
                raise TaskCancelled(reason).with_traceback(trace) from None
            raise error.with_traceback(trace)
        finally:
            del error, trace

    def cancel(self) -> None:
        """Cancel the coroutine."""

        def on_loop() -> None:
            if self.task is None:  # the thread was interrupted before it had the loop begin
                self._coroutine.close()
                self._end()
            else:
                self.task.cancel()

        try:
            self.loop.call_soon_threadsafe(on_loop)
        except RuntimeError:  # the loop is closed, so the coroutine does not go on
            self._error = self._error or asyncio.CancelledError()
            self._end()

    def cancel_and_wait(self) -> None:
        """Cancel the coroutine, and wait for its end, however it ends."""
        self.cancel()
        self.thread.wait()
        self._error = None

    def part(self, outer: CancelToken) -> Part | None:
        """Return the part of the coroutine that runs now; None in a callback of the loop, which is no part.

        ``outer`` is the token of what it is a part of.
        """
        task = asyncio.current_task(self.loop)
        return None if task is None else Part(task, self.loop, outer)

    def is_here(self) -> bool:
        """Return True if the calling thread is that of the loop."""
        return asyncio._get_running_loop() is self.loop

    def leave(self, on_end: Callable[[], object]) -> bool:
        """Let the thread go on although the coroutine does not end; call ``on_end()`` when it has ended.

        Returns:
            False, and nothing is done, if the thread does not just wait: it makes a call for the coroutine,
            or the coroutine has ended.
        """
        self._on_end = on_end
        return self.thread.let_go(early=True)

    def stack(self) -> str:
        """Return where the coroutine is, as text; empty if it has ended."""
        frames: list[tuple[FrameType, int]] = []
        waits_for: Any = self._coroutine
        while (frame := getattr(waits_for, "cr_frame", None)) is not None:
            frames.append((frame, frame.f_lineno))
            waits_for = waits_for.cr_await
        return _shown(traceback.StackSummary.extract(frames))


class Part:
    """A part of a coroutine, in the task of asyncio that runs it: the whole, or one made by ``gather``."""

    def __init__(
        self, task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop, outer: CancelToken
    ) -> None:
        self._task, self._loop, self._outer = task, loop, outer
        self._over = self._cancelled = False

    def cancel(self) -> None:
        """Cancel the part, unless it has ended when the loop comes to that."""

        def on_loop() -> None:
            # A cancel of the whole ends the part, too: a second one would strike its clean-up.
            if not self._over and not self._outer.cancelled:
                self._cancelled = True
                self._task.cancel()

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(on_loop)

    def end(self) -> None:
        """Note that the part has ended: its task is not cancelled any more, however it has ended."""
        self._over = True
        if self._cancelled and sys.version_info >= (3, 11):
            self._task.uncancel()


class Blocked(NamedTuple):
    """A call that keeps all coroutines of a queue from going on.

    Attributes:
        seconds: for how long it has done so.
        task_id: the id of the task; empty if none is known.
        by: the id and the type of the task whose coroutine makes it; empty if no task is known.
        stack: where the thread of the loop is, as text.
    """

    seconds: float
    task_id: str
    by: str
    stack: str


class Loop:
    """The event loop of a queue. Its thread is started for the first coroutine, and ends with the node."""

    def __init__(self, timing: Timing = DEFAULT_TIMING) -> None:
        self._timing = timing
        self._lock = threading.Lock()
        self._process = forks.generation
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        #: The coroutines that have not ended.
        self.running: dict[Awaited, None] = {}
        # The time at which the loop was asked for a sign of life; None after it has given one.
        self._asked: float | None = None
        self._told = False

    def run(
        self,
        coroutine: Coroutine[Any, Any, Any],
        task: Task,
        token: CancelToken,
        enter: Callable[[Awaited], object],
        *,
        inside: bool = False,
    ) -> Any:
        """Run the coroutine of a task, and return its result; the calling thread waits.

        ``enter`` is called in the context of variables that the coroutine gets. If the caller is ``inside``
        of another coroutine, whose loop may wait for this call, it runs on a loop of its own.

        Raises the exceptions of :meth:`Awaited.wait`.
        """
        if inside:
            with closing(Loop(self._timing)) as inner:
                return inner.run(coroutine, task, token, enter)
        try:
            loop = self._started()
            awaited = Awaited(coroutine, task, token, loop, self.running)
        except BaseException:  # else Python warns of a coroutine that nobody awaits
            coroutine.close()
            raise
        try:
            variables = contextvars.copy_context()
            variables.run(enter, awaited)
            loop.call_soon_threadsafe(awaited.begin, context=variables)
            remove = token.on_cancel(awaited.cancel)
            try:
                return awaited.wait()
            finally:
                remove()
        except BaseException:  # of the coroutine, or an interrupt while it runs
            if awaited in self.running:
                awaited.cancel_and_wait()
            raise

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._process != forks.generation:  # its thread is one of the parent of this process
                self._process, self._loop, self._asked = forks.generation, None, None
                self.running.clear()
            if self._loop is None or self._loop.is_closed():  # a coroutine may have stopped it
                loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=_serve, args=(loop, self.running), name="taskx-loop", daemon=True
                )
                try:
                    thread.start()
                except BaseException:  # no thread can be started, or an interrupt
                    loop.close()
                    raise
                # A queue of a test may be dropped without a stop.
                weakref.finalize(self, _stop, loop)
                self._loop, self._thread = loop, thread
            return self._loop

    def close(self) -> None:
        """End the loop and its thread: cancel what still runs, and close the asynchronous generators."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None or self._process != forks.generation:
            return
        _stop(loop)
        if thread is not threading.current_thread():
            thread.join(self._timing.join_thread_within)

    # --- for the housekeeper

    def look(self) -> None:
        """Ask the loop for a sign of life, and log what keeps it from giving one."""
        loop = self._loop
        if loop is None or self._asked is None:
            if loop is not None and self.running:
                self._told, self._asked = False, time.monotonic()
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._answer)
            return
        if not self._told and (blocked := self.blocked()) is not None:
            self._told = True
            log.warning(
                "%s blocks the event loop for %.1f s: no other coroutine goes on. Use await, or "
                "asyncio.to_thread for a call that blocks.\n%s",
                f"task {blocked.by}" if blocked.by else "a coroutine",
                blocked.seconds,
                blocked.stack,
            )

    def _answer(self) -> None:
        self._asked = None

    def blocked(self) -> Blocked | None:
        """Return what blocks the loop; None if nothing has done so for long."""
        asked, loop, thread = self._asked, self._loop, self._thread
        if asked is None or loop is None or thread is None:
            return None
        seconds = time.monotonic() - asked
        if seconds < self._timing.loop_blocked_after:
            return None
        task = asyncio.current_task(loop)
        found = [a for a in self.running.copy() if a.task is not None and a.task is task]
        frame = top_frames().get(thread.ident or 0)
        stack = [] if frame is None else traceback.extract_stack(frame)
        ours = [n for n, entry in enumerate(stack) if entry.filename == __file__]
        task_id, by = (found[0].task_id, found[0].name) if found else ("", "")
        return Blocked(seconds, task_id, by, _shown(stack[ours[-1] + 1 if ours else 0 :]))


def _shown(stack: Iterable[traceback.FrameSummary]) -> str:
    lines = traceback.format_list([*stack])
    return "The coroutine is here (most recent call last):\n" + "".join(lines) if lines else ""


def _serve(loop: asyncio.AbstractEventLoop, running: dict[Awaited, None]) -> None:
    """Run a loop until it is closed; then let the threads go on whose coroutines have not ended."""
    asyncio.set_event_loop(loop)
    while not loop.is_closed():
        try:
            loop.run_forever()
            loop.close()
        except BaseException:  # noqa: BLE001  (asyncio lets SystemExit of any task through)
            log.exception(
                "a coroutine that no executor waits for has ended the event loop: it goes on"
            )
    for awaited in running.copy():
        if awaited.loop is loop:  # else it runs on the loop that was made after this one
            awaited.cancel()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    """Have a loop end, if it has not."""
    with suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(lambda: loop.create_task(_close(loop)))


async def _close(loop: asyncio.AbstractEventLoop) -> None:
    me = asyncio.current_task()
    left = [task for task in asyncio.all_tasks() if task is not me]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=1.0)
    await loop.shutdown_asyncgens()
    loop.stop()
