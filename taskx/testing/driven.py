"""The engine of a queue that its caller drives: one thread, and a clock that is moved by hand.

All rules are those of a started queue. The parts of this engine only replace what would start a thread, or
wait.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import attrs

from taskx.attempt.alarms import Alarms, Overdue, Pulse, Steps
from taskx.attempt.runner import Run, Runner
from taskx.node.due import next_expiry
from taskx.node.engine import Engine
from taskx.node.housekeeper import Duty, Housekeeper
from taskx.node.pool import Ends, PoolParts, WorkerPool
from taskx.stores.liveness.base import About, Node
from taskx.tasks.bell import Signal
from taskx.tasks.checks import Duration, in_seconds
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.errors import CancelReason
from taskx.tasks.lifecycle import Ending
from taskx.tasks.model import TaskStatus
from taskx.tasks.timing import Timing
from taskx.tasks.token import CancelToken
from taskx.testing.clock import ManualClock

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

#: The largest buffer: no submit is refused while nothing runs.
ROOM = 10_000_000
#: The number of times that an executor can check its token while no time passes. Each further check takes
#: a millisecond, so that a loop which only checks its token reaches its time-out.
FREE_CHECKS = 1000
#: The shortest step of the clock that is never lost to rounding, in seconds.
SHORTEST_STEP = 1e-9
# Seconds to wait for the threads that TaskX has started for callbacks.
_PATIENCE = 5.0


class DrivenToken(CancelToken):
    """A token whose waits let time pass on the clock that the test moves, and take none."""

    __slots__ = ("_at", "_checks")

    def __init__(self, deadline: float | None, clock: Clock) -> None:
        super().__init__(deadline, clock)
        self._at, self._checks = clock.monotonic(), 0

    @property
    def reason(self) -> CancelReason | None:
        """The reason why the token fired; None as long as it has not."""
        now = self._clock.monotonic()
        if now != self._at:
            self._at, self._checks = now, 0
        self._checks += 1
        if self._checks > FREE_CHECKS and isinstance(self._clock, ManualClock):
            self._clock.advance(0.001)
        return super().reason

    def wait(self, timeout: Duration | None = None) -> bool:
        """Let time pass until the token fires, at most ``timeout`` seconds; return True if it has fired."""
        clock = self._clock
        assert isinstance(clock, ManualClock)
        left = math.inf if timeout is None else max(0.0, in_seconds(timeout))
        end = clock.monotonic() + left
        while not self.cancelled and left > 0:
            deadline = math.inf if self.deadline is None else self.deadline - clock.monotonic()
            coming = clock.until_next_call()
            step = min(left, deadline, math.inf if coming is None else coming)
            if step == math.inf:
                raise RuntimeError(
                    "the executor waits for ever: it has no time-out, and no call that may cancel it is "
                    "planned; use clock.call_later(seconds, handle.cancel)"
                )
            clock.advance(max(step, SHORTEST_STEP))
            left = end - clock.monotonic()
        return self.cancelled


class DrivenAlarms(Alarms):
    """Time-outs that the clock itself tells of, when it is moved past them."""

    def __init__(self, clock: Clock, timing: Timing) -> None:
        super().__init__(clock, timing)
        self._planned: dict[CancelToken, list[Callable[[], None]]] = {}

    def add(
        self, token: CancelToken, overdue: Overdue | None = None, pulse: Pulse | None = None
    ) -> None:
        super().add(token, overdue, pulse)
        if token.deadline is not None:
            left = max(0.0, token.deadline - self._clock.monotonic())
            self._plan(token, [left] if overdue is None else [left, left + overdue[0]])

    def _plan(self, token: CancelToken, moments: Iterable[float]) -> None:
        """Have the clock call in some seconds."""
        if isinstance(self._clock, ManualClock):
            calls = [self._clock.call_later(seconds, self.ring) for seconds in moments]
            self._planned.setdefault(token, []).extend(calls)

    def _expect(
        self, steps: Steps, token: CancelToken, pulse: Pulse, overdue: Overdue | None
    ) -> None:
        super()._expect(steps, token, pulse, overdue)
        left = max(0.0, pulse.due - self._clock.monotonic()) + SHORTEST_STEP
        late = () if overdue is None else (left + overdue[0] + SHORTEST_STEP,)
        self._plan(token, (left, *late))

    def go_on(self) -> None:
        """Start no thread: the clock calls :meth:`ring`."""

    def remove(self, token: CancelToken) -> None:
        super().remove(token)
        for take_back in self._planned.pop(token, ()):
            take_back()

    def ring(self) -> float | None:
        before = threading.enumerate()
        nearest = super().ring()
        wait_for_threads(before, ("taskx-stuck",))
        return nearest


class DrivenRunner(Runner):
    """A runner that keeps the errors of executors. A retry waits the back-off without a random part."""

    make_token = DrivenToken

    def __init__(self, clock: Clock, timing: Timing, max_payload_size: int) -> None:
        super().__init__(
            clock, DrivenAlarms(clock, timing), max_payload_size, chance=_half, timing=timing
        )
        #: The error of each executor, or of its result, until it is taken from here.
        self.raised: dict[Run, BaseException] = {}
        #: How often each task has begun to wait in the middle of an attempt, by id.
        self.parks: Counter[str] = Counter()

    def ending_of(self, error: BaseException, run: Run) -> Ending:
        """Return how a run ends whose executor has raised an error."""
        self.raised[run] = error
        ending = super().ending_of(error, run)
        if ending.parked is not None:
            self.parks[run.task.id] += 1
        return ending


class DrivenPool(WorkerPool):
    """A pool without threads: the caller of the queue runs the tasks."""

    waits_for_more = False

    def start_workers(self) -> None:
        """Start no thread."""

    def go(self) -> None:
        """Do nothing: no worker waits, and the log needs no line."""

    def begin_stop(self) -> None:
        """Take no more tasks, and hand back those that an interrupt has kept from being executed.

        No thread is about to execute them, and no housekeeper would find them later.
        """
        super().begin_stop()
        self.starter.hand_back([run for run in list(self.runs.values()) if run.state == "starting"])


class DrivenHousekeeper(Housekeeper):
    """A housekeeper without a thread that does all its duties in each round."""

    def start(self) -> None:
        """Start no thread."""

    def _duties(self) -> list[Duty]:
        known = super()._duties()  # without "news": each round takes in all changes of others
        return [Duty(one.name, one.step, due=one.due) for one in known if one.name != "news"]

    def do_round(self) -> None:
        """Do everything that is due, to the end.

        Raises:
            RepositoryError: the repository failed; the next round does the rest.
        """
        # Twice: the audit puts right what it finds two times in a row.
        for _ in range(2):
            self._pool.agenda.check_due()
            self._pool.agenda.expect_more()
            self._ticker.refresh_now()
            self.tick()
            while any(duty.more for duty in self.duties):
                self.tick()

    def until_next(self) -> float:
        """Return the seconds until a task, a tick or a token of a rate is due; inf if nothing is."""
        now = self._pool.clock.now_ms()
        coming = (
            self._release.earliest(),
            next_expiry(self._pool.moves.repository),
            self._ticker.next,
        )
        seconds = [(due - now) / 1000 for due in coming if due]
        return max(0.001, min([*seconds, self._until_token()]))

    def was_there(self) -> None:
        """Note that no tick of a schedule was missed since the last round."""
        self._ticker.was_there()


class Driven(Engine):
    """The engine of a queue that its caller drives: it has no threads.

    Args:
        signal: makes the signal that a thread waits with for the end of a task.

    Attributes:
        pool, housekeeper: those of the started queue.
        runner: the runner of the queue.
    """

    name = "driven"
    threaded = False
    pool: DrivenPool
    housekeeper: DrivenHousekeeper
    runner: DrivenRunner

    def __init__(self, signal: Callable[[], Signal]) -> None:
        self._signal = signal

    def make_signal(self) -> Signal:
        return self._signal()

    def describe(self, about: About) -> About:
        return attrs.evolve(about, worker_num=1, buffer_size=ROOM)

    def make_pool(
        self, node: Node, config: Config, ends: Ends, **parts: Unpack[PoolParts]
    ) -> WorkerPool:
        config = attrs.evolve(config, worker_num=1, buffer_size=ROOM, overflow="reject")
        self.pool = DrivenPool(node, config, ends, **parts)
        return self.pool

    def make_housekeeper(
        self, pool: WorkerPool, retention: Mapping[TaskStatus, float]
    ) -> Housekeeper:
        self.housekeeper = DrivenHousekeeper(pool, retention, _half)
        return self.housekeeper

    def make_runner(self, clock: Clock, timing: Timing, max_payload_size: int) -> Runner:
        self.runner = DrivenRunner(clock, timing, max_payload_size)
        return self.runner


def is_for_the_test(error: BaseException) -> bool:
    """Return True if an error is meant for the test, such as that of ``pytest.fail()``."""
    return "OutcomeException" in (kind.__name__ for kind in type(error).__mro__)


def _half() -> float:
    return 0.5


class DrivenSignal(Signal):
    """A signal whose wait runs other tasks, and lets time pass, in place of waiting.

    Args:
        clock: measures the time-outs of virtual waits.
        work: runs tasks and lets time pass until a condition holds, at most so many seconds.
        virtual: False if this thread waits for another one, in real time.
    """

    def __init__(
        self, clock: Clock, work: Callable[[Callable[[], bool], float], bool], *, virtual: bool
    ) -> None:
        super().__init__()
        self.virtual = virtual
        if virtual:
            self.now = clock.monotonic
        self._work = work

    def wait(self, timeout: float | None = None) -> bool:
        """Work until the signal is set, and reset it; return False if ``timeout`` seconds passed before."""
        seconds = math.inf if timeout is None else timeout
        was_set = self._work(lambda: not self._lock.locked(), seconds)
        if was_set:
            self.clear()
        return was_set


def wait_for_threads(before: Collection[threading.Thread], names: Collection[str]) -> None:
    """Wait for threads with these names that have been started since ``before`` was taken."""
    known = set(before)
    for thread in threading.enumerate():
        if thread not in known and thread.name in names:
            thread.join(_PATIENCE)
