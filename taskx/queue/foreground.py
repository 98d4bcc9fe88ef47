"""A program that only runs queues: it starts them, waits for a signal, and stops them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any

from taskx.node.node import LocalNode, stop_all
from taskx.tasks.bell import Signal
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.errors import ConfigurationError, on_main_thread
from taskx.tasks.timing import DEFAULT_TIMING, Timing

# SIGINT is caught first and given back last, because its usual handler raises an exception.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Call:
    """A call on a thread of its own, which no signal handler interrupts."""

    def __init__(self, function: Callable[[], Any], woken: Signal) -> None:
        self._function, self._woken = function, woken
        self.value: Any = None
        self.error: BaseException | None = None
        self.over = False
        threading.Thread(target=self._run, name="taskx-run", daemon=True).start()

    def _run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
            self.error = error
        self.over = True
        self._woken.set()


class Signals:
    """Catches SIGINT and SIGTERM within a ``with`` block. A handler only notes the signal.

    With ``once``, only the first signal of the system counts. A supervised process gets its orders from its
    supervisor, by :meth:`note`. Some managers send each signal to both of them.
    """

    def __init__(self, timing: Timing = DEFAULT_TIMING, *, once: bool = False) -> None:
        self._every = timing.signals_every
        #: The noted signals, the first one first.
        self.caught: list[int] = []
        self._once = once
        self._woken = Signal()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            # A shell starts a job in the background with SIGINT ignored. It must stay ignored.
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not (self._once and self.caught):
            self.note(number)

    def note(self, number: int) -> None:
        """Note a signal. Any thread may call this."""
        self.caught.append(number)
        self._woken.set()

    def note_request(self) -> None:
        """Note a request of another process to stop, as the first SIGTERM; it is never a second signal."""
        if not self.caught:
            self.note(signal.SIGTERM)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in reversed(self._before.items()):
            # None: not set by Python code, so Python cannot set it again.
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def call(self, function: Callable[[], Any]) -> _Call:
        """Begin a call on a thread of its own; its end wakes :meth:`wait`."""
        return _Call(function, self._woken)

    def wait(self, count: int, over: Callable[[], bool]) -> None:
        """Wait until ``count`` signals were caught, or ``over()`` is true."""
        while len(self.caught) < count and not over():
            self._woken.wait(self._every)


def run(nodes: Sequence[LocalNode], timeout: Duration, signals: Signals | None = None) -> int:
    """Start nodes, wait for a signal, and stop them: see :func:`taskx.run`."""
    seconds = check_number(timeout, "timeout")
    if not on_main_thread():
        raise ConfigurationError(
            "run() must be called in the main thread, because only there a program can handle signals; "
            "elsewhere use start() and stop()"
        )
    with signals or Signals(nodes[0].timing) as signals:
        starts: list[_Call] = []
        try:
            starts.extend(signals.call(partial(node.start, signals.note_request)) for node in nodes)
            return _run(nodes, starts, seconds, signals)
        except BaseException:
            # The last start may be under way, and not be noted yet.
            refused = {node for node, start in zip(nodes, starts, strict=False) if start.error}
            stop_all([node for node in nodes if node not in refused], nodes[0].timing.exit_within)
            raise


def _run(
    nodes: Sequence[LocalNode], starts: Sequence[_Call], timeout: float, signals: Signals
) -> int:
    def ended() -> bool:
        return all(start.over for start in starts) and all(node.stops for node in nodes)

    signals.wait(1, lambda: any(start.error for start in starts) or ended())
    _raise_first(starts)
    if signals.caught:
        nodes[0].log.info(
            "%s: the tokens of running tasks fire after %g s, and the program ends after %g s; a second "
            "signal ends it at once",
            signal.Signals(signals.caught[0]).name,
            timeout * 4 / 5,
            timeout,
        )
    # A queue that is still being started notices that it was stopped.
    stops = [signals.call(partial(node.stop, timeout, cancel=False)) for node in nodes]
    signals.wait(2, lambda: all(stop.over for stop in stops))
    if len(signals.caught) >= 2:
        stops = [
            signals.call(partial(node.stop, node.timing.at_once_within, cancel=True))
            for node in nodes
        ]
        signals.wait(3, lambda: all(stop.over for stop in stops))
        return 128 + signals.caught[1]
    _raise_first(stops)
    return int(any(stop.value for stop in stops) or any(node.outdated for node in nodes))


def _raise_first(calls: Sequence[_Call]) -> None:
    for call in calls:
        if call.error is not None:
            raise call.error
