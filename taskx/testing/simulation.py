"""A simulation of many nodes in one thread: a seed chooses who does what next, and what fails."""

from __future__ import annotations

import hashlib
import logging
import pprint
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from random import Random
from typing import Any, Literal, get_args

import attrs

from taskx.attempt.runner import runs_of
from taskx.node.shared_limits import RATE
from taskx.queue.queue import Queue
from taskx.stores.liveness.base import PREFIX
from taskx.stores.memory import MemoryRepository
from taskx.tasks.checks import check_int
from taskx.tasks.config import Config
from taskx.tasks.errors import (
    ConfigurationError,
    InvalidTransition,
    QueueStopped,
    RepositoryError,
    RepositoryUnavailable,
)
from taskx.tasks.writes import NoteChange, Write
from taskx.testing.clock import ManualClock
from taskx.testing.promises import Promises
from taskx.testing.simulated import LEASE, Door, Killed, SimulatedNode, outside, virtual

#: What may go wrong: a node dies, or stops; a call of the repository fails, before or after its work; a
#: node counts as dead although it lives; the clock of a node is wrong.
Fault = Literal["kill", "stop", "error", "late", "clock"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
#: A step: what happens, on which node, with which number, and what comes in between: for the number of a
#: call of the repository a fault, or the steps that others take before that call.
Step = tuple[Any, ...]
#: Declares executors on a queue, and returns what it may be asked for; or a class whose objects do so.
Program = Callable[[Queue], Iterable[Callable[[], object]] | None]

_SECOND = 1_000_000_000
_PAUSES = (0.001, 0.05, 0.2, 0.6, 2.1, 5.0, 31.0, 120.0)
_SHIFTS = (-90.0, -2.0, 2.0, 90.0)
# Heartbeats that are left out until a node counts as dead, if another one is there.
_LONG_STALL = 20
# Steps in steps; looks until all has ended, and looks in a row that see no task end.
_DEEPEST, _MOST_LOOKS, _MOST_IN_VAIN = 2, 1000, 30
# Runs that shrink a failure.
_MOST_TRIES = 1000
# What a request may meet: others were faster, or a fault.
_EXPECTED = (RepositoryError, QueueStopped)


class BrokenPromise(AssertionError):
    """A simulation has found a broken promise. The text has the program that shows it again."""


@attrs.define(eq=False)
class _Frame:
    """A step that is under way: its node, what comes in between, its begin, its calls of the repository.

    While its thread waits, others take steps ``within`` it: their calls are counted in this one.
    """

    node: SimulatedNode
    between: dict[int, Any]
    began: int
    within: _Frame | None = None
    calls: int = 0
    struck: bool = False


class _Seeded:
    """Chooses by chance. Each seed has its own mix of steps and faults."""

    def __init__(self, seed: int, nodes: int, faults: Sequence[Fault]) -> None:
        self._chance = chance = Random(seed)
        self._nodes = nodes
        self._boots: list[Step] = [("boot", place, 0, {}) for place in reversed(range(nodes))]
        self._left = chance.randint(15, 60)
        # Few kinds of requests in each run, again and again: so they meet.
        self._wanted = [chance.random() for _ in range(chance.randint(2, 8))]

        def some(fault: Fault, *weights: float) -> float:
            return chance.choice(weights) if fault in faults else 0.0

        self._error, self._death = some("error", 0, 0.01, 0.06), some("kill", 0, 0.005, 0.02)
        self._others = chance.choice((0.0, 0.03, 0.12))
        weights = {
            "ask": chance.choice((10, 20)),
            "round": 30,
            "start": chance.choice((10, 25)),
            "execute": chance.choice((6, 20)),
            "finish": 4,
            "pass": chance.choice((4, 12)),
            "boot": 8,
            "kill": some("kill", 0, 1, 3),
            "stop": some("stop", 0, 0, 1),
            "late": some("late", 0, 1, 3),
            "clock": some("clock", 0, 0, 1),
        }
        self._verbs, self._weights = [*weights], [*weights.values()]

    def next(self, asks: int) -> Step | None:
        """Return the next step; None at the end. ``asks`` is the number of requests."""
        if self._boots:
            return self._boots.pop()
        self._left -= 1
        return None if self._left < 0 else self._step(asks)

    def _step(self, asks: int) -> Step:
        chance = self._chance
        (verb,) = chance.choices(self._verbs, self._weights)
        number: float = 0
        if verb == "ask":
            number = int(chance.choice(self._wanted) * asks)
        elif verb in ("execute", "start"):
            number = chance.randrange(2)
        elif verb == "pass":
            number = chance.choice(_PAUSES)
        elif verb == "clock":
            number = chance.choice(_SHIFTS)
        return (verb, chance.randrange(self._nodes), number, {})

    def between(self, depth: int, asks: int) -> Any:
        """Return what comes before a call of the repository: None, a fault, or steps."""
        point = self._chance.random()
        if point < self._others:
            count = self._chance.randint(1, 4)
            return [self._step(asks) for _ in range(count)] if depth < _DEEPEST else None
        point -= self._others
        if point < self._error:
            return self._chance.choice(("fails", "fails after"))
        return "dies" if point - self._error < self._death else None


class _Scripted:
    """Chooses by a script."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = iter(steps)

    def next(self, asks: int) -> Step | None:
        step = next(self._steps, None)
        return None if step is None else (*step, *(0, 0, {})[len(step) - 1 :])


class Simulation:
    """One run: a repository, its nodes, and what happens to them.

    Args:
        program: as of :func:`simulate`.
        chooser: chooses the steps.
        nodes: the number of nodes.
        config: the config of the queues.
        log: the logger of the queues.
    """

    def __init__(
        self,
        program: Any,
        chooser: _Seeded | _Scripted,
        nodes: int,
        config: Config | None,
        log: logging.Logger,
    ) -> None:
        self._outside = program() if isinstance(program, type) else None
        self._program: Program = self._outside or program
        self._chooser, self._config, self._log = chooser, config, log
        #: Nanoseconds since the begin.
        self.now = 0
        self._clock = ManualClock()
        self._began = self._clock.now_ms()
        self._store = MemoryRepository(self._clock)
        self.killed: set[str] = set()
        self._promises = Promises(self.broken, self._is_silent)
        self._places: list[SimulatedNode | None] = [None] * nodes
        self._booted = 0
        self._frames: list[_Frame] = []
        self._calm = False
        self._asks = 0
        #: What was chosen, as a script, and what happened.
        self.script: list[Step] = []
        self.trace: list[str] = []
        #: The promise that was broken first; empty if none was.
        self.problem = ""

    def run(self) -> str:
        """Run to the end; return the promise that was broken, empty if none was."""
        try:
            while not self.problem and (step := self._chooser.next(self._asks)) is not None:
                self._take(step, self.script)
            if not self.problem:
                self._come_to_an_end()
        except Killed:
            pass
        return self.problem

    def broken(self, text: str) -> None:
        """Note that a promise is broken, and end the simulation."""
        self.problem = self.problem or text

    # --- steps

    def _take(self, step: Step, script: list[Step], within: _Frame | None = None) -> None:
        verb, place, number, between = step
        script.append(step)
        if verb == "pass":
            self._note(verb, number)
            self.pass_time(number)
            return
        node = self._places[place]
        if verb == "boot":
            if node is not None:
                return
            self._booted += 1
            node = SimulatedNode(self, self._store, self._booted, self._config, self._log)
            self._places[place] = node
        elif node is None:
            return
        elif verb == "kill":
            self._kill(node)
            return
        elif not node.up or (verb != "late" and self._is_busy(node)):
            return  # its thread is in the middle of another step
        self._note(verb, place, number)
        self._frames.append(_Frame(node, between, self.now, within))
        try:
            with outside():
                getattr(self, f"_do_{verb}")(node, number)
        except Killed:
            pass
        except _EXPECTED as error:
            self._note("error", type(error).__name__)
        except Exception as error:  # noqa: BLE001  (whatever a node may not raise)
            self._log.debug("unexpected", exc_info=error)
            self.broken(f"{verb} on node {place} raised {type(error).__name__}: {error}")
        finally:
            self._frames.pop()
            if verb == "boot" and node.alive and not node.up:
                self._kill(node)

    def _do_boot(self, node: SimulatedNode, number: float) -> None:
        node.boot(self._program)
        self._asks = len(node.asks)

    def _do_round(self, node: SimulatedNode, number: float) -> None:
        node.housekeeper.tick()

    def _do_start(self, node: SimulatedNode, number: float) -> None:
        starts, rates, began = self._promises.starts, self._rates(), self.now
        for run in node.start(1 + int(number)):
            if run.token._reason is None:  # else its executor is not called
                self._promises.begins(node, run, self.now)
        if self.now == began and not self._frames[-1].struck:
            now = self._began + self.now // 1_000_000
            self._promises.went_on(starts, rates, self._rates(), now)

    def _rates(self) -> dict[str, str]:
        return {name: note.text for name, note in self._store.notes(RATE).items()}

    def _do_execute(self, node: SimulatedNode, number: float) -> None:
        if node.runs:
            for run in runs_of(node.runs[int(number) % len(node.runs)]):
                self._promises.executes(node, run)
            node.execute(int(number))

    def _do_finish(self, node: SimulatedNode, number: float) -> None:
        node.pool._finish()

    def _do_ask(self, node: SimulatedNode, number: float) -> None:
        if int(number) < len(node.asks):
            node.asks[int(number)]()

    def _do_stop(self, node: SimulatedNode, number: float) -> None:
        if not node.runs:
            # The process ends, perhaps before the last outcomes are written, or with its node recorded.
            node.queue._node.stop(0.0, cancel=False)
            self._kill(node)

    def _do_late(self, node: SimulatedNode, number: float) -> None:
        living, frames = node.door.living, self._frames
        # A node in the middle of a step may hold the lock that it would look under.
        others = [one for one in self._places if one and one.up and not self._is_busy(one)]
        self._frames = []  # no fault strikes those who look
        try:
            with living.stalled():
                for _ in range(_LONG_STALL):
                    self.pass_time(living.interval)
                    for other in others:
                        other.door.living.nodes()
                    if self.is_dead(node):
                        break
        finally:
            self._frames = frames

    def _do_clock(self, node: SimulatedNode, number: float) -> None:
        self._promises.a_clock_is_wrong()
        node.clock.shift(number)

    def _kill(self, node: SimulatedNode) -> None:
        self._note("kill", node.number)
        if node.up or hasattr(node, "pool"):
            self.killed.add(node.id)
        self._forget(node)

    def _forget(self, node: SimulatedNode) -> None:
        node.die()
        self._promises.forget(node)
        if node in self._places:
            self._places[self._places.index(node)] = None

    def _is_busy(self, node: SimulatedNode) -> bool:
        return any(frame.node is node for frame in self._frames)

    # --- what nodes need

    def enter(self, door: Door) -> str | None:
        """Let others go on before a node uses the repository; return the fault that strikes it then."""
        node = door.node
        if node is None or not node.alive or self.problem:
            raise Killed
        frame = self._frames[-1] if self._frames else None
        if self._calm or frame is None or frame.node is not node:
            return None
        counted = frame.within or frame
        counted.calls = call = counted.calls + 1
        if isinstance(self._chooser, _Scripted):
            what = counted.between.get(call)
        elif (what := self._chooser.between(len(self._frames), self._asks)) is not None:
            counted.between[call] = what
        if what is None:
            return None
        frame.struck = True
        if what == "dies":
            self._kill(node)
        elif what == "fails":
            raise RepositoryUnavailable("simulated: the call failed")
        elif what == "fails after":
            return "simulated: the answer was lost"
        else:
            steps: list[Step] = []
            scripted = _Scripted(what)
            while (step := scripted.next(0)) is not None:
                self._take(step, steps)
            counted.between[call] = steps
        if not node.alive:
            raise Killed
        return None

    def is_dead(self, node: SimulatedNode) -> bool:
        """Return True if a node counts as dead for the others."""
        return hasattr(node, "pool") and node.id in self._promises.dead

    def _is_silent(self, node_id: str) -> bool:
        """Return True if a node may count as dead: it was killed, or no heartbeat came for a lease."""
        if node_id in self.killed:
            return True
        node = next((one for one in self._places if one is not None and one.id == node_id), None)
        return node is None or node.door.living.silent_for(node_id) >= LEASE

    def lost(self, node: SimulatedNode) -> None:
        """Note that a node has lost its lease: its executions may go on beside others."""
        self._promises.forget(node)

    def applied(self, door: Door, writes: Sequence[Write], *, was_dead: bool) -> None:
        """Check writes that took place; ``was_dead`` if the node counted as dead before the call."""
        assert door.node is not None
        for write in writes:
            self.trace.append(f"{door.node.number} {write.move} {write.id} {write.changes}")
        began = next((f.began for f in self._frames[::-1] if f.node is door.node), self.now)
        now = self._began + self.now // 1_000_000
        self._promises.applied(door.node, writes, now, began, was_dead=was_dead)

    def noted(self, door: Door, changes: Sequence[NoteChange]) -> None:
        """Check changes of notes that took place."""
        self._note(*(one[::2] if one.name.startswith(PREFIX) else one for one in changes))
        self._promises.noted(changes)

    def accepted(self, task_ids: Iterable[str]) -> None:
        """Check that tasks are stored whose submit has returned."""
        self._promises.accepted(task_ids)

    def answered(self, task_id: str) -> None:
        """Check an answer of which somebody was told that it counts."""
        self._promises.answered(task_id)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, for all nodes that live."""
        self.now += round(seconds * _SECOND)
        self._clock.advance(seconds)
        for node in self._places:
            if node is not None:
                node.clock.move(seconds)
        frames, self._frames = self._frames, []  # no fault strikes the threads of leases
        try:
            for node in self._places:
                if node is not None:
                    node.door.living.go_on()
        finally:
            self._frames = frames

    def others_go_on(self, node: SimulatedNode, seconds: float) -> None:
        """Let all nodes do their work once, and time pass, while a thread of one of them waits.

        Another node that is in the middle of a step does nothing, because its thread may hold a lock.
        """
        frames = self._frames
        self._frames = [frame for frame in frames if frame.node is not node]
        waiting = next((frame for frame in frames[::-1] if frame.node is node), None)
        try:
            with outside():
                self._work(waiting and (waiting.within or waiting))
                self.pass_time(min(seconds, 0.5))
        finally:
            self._frames = frames
        if not node.alive:
            raise Killed

    def _note(self, *what: object) -> None:
        self.trace.append(str(what))

    # --- the end

    def _work(self, within: _Frame | None = None) -> None:
        """Have each node do what it has to do now."""
        for place, node in enumerate(self._places):
            if node is not None:
                self._take(("round", place, 0, {}), [], within)
                for _ in range(2 * node.work):
                    if node.work and not self.problem:
                        self._take(("start", place, 0, {}), [], within)
                        self._take(("execute", place, 0, {}), [], within)
                self._take(("finish", place, 0, {}), [], within)

    def _come_to_an_end(self) -> None:
        """Let no more fail, run what is left, stop all nodes, and check what is stored."""
        self._calm = True
        if not any(self._places):
            self._take(("boot", 0, 0, {}), [])
        for node in filter(None, self._places):
            node.clock.set_right(self._clock)
        self._settle()
        nodes = [node for node in self._places if node is not None]
        left = [text for node in nodes for text in _left_over(node)]
        for place in range(len(self._places)):
            self._take(("stop", place, 0, {}), [])
        if not self.problem:
            self._promises.ended(self._store.notes(""), left)
        check = getattr(self._outside, "check", None)
        if check is not None and not self.problem:
            try:
                check(list(self._store.get_many([*self._promises.rows]).values()))
            except AssertionError as error:
                self.broken(f"the check of the program failed: {error}")

    def _settle(self) -> None:
        """Work until all tasks have ended, and the audits have found nothing more."""
        pause, quiet, vain = 0.1, 0, 0
        for look in range(_MOST_LOOKS):
            if vain > _MOST_IN_VAIN:
                break
            before = len(self._promises.unfinished())
            self._work()
            if self.problem or quiet > 2:
                return
            if look == 2:
                self._let_end(next(filter(None, self._places)).queue)
            left = len(self._promises.unfinished())
            quiet = quiet + 1 if look > 2 and not left else 0
            vain = vain + 1 if left == before else 0
            pause = 2.5 if quiet else min(0.1 * 2**vain, 1000.0)
            if vain > 1:
                coming = self._promises.next_moment(self._began + self.now // 1_000_000)
                pause = max(pause, min(coming, 1000.0))
                if not coming:
                    self._give_answers()
            self.pass_time(pause)
        tasks = ", ".join(self._promises.unfinished()[:5])
        self.broken(f"these tasks never end: {tasks}")

    def _give_answers(self) -> None:
        """Say that nobody will answer any more what has no time-out."""
        queue = next(filter(None, self._places)).queue
        for answer_id in self._promises.unanswered():
            with suppress(InvalidTransition):  # it waits for other tasks first
                queue.finish(answer_id, error="nobody answers any more")

    def _let_end(self, queue: Queue) -> None:
        """Pause what never ends, and let run what the program has paused."""
        for schedule in queue.schedules().values():
            schedule.pause()
        for type in (None, *sorted(queue._controls.read_paused().types)):
            queue.resume(type)


def _left_over(node: SimulatedNode) -> list[str]:
    """Return what a node still holds, after all its tasks have ended."""
    pool, moves = node.pool, node.moves
    held: Mapping[str, object] = {
        "runs": pool.runs,
        "tasks in its buffer": len(pool.buffer),
        "reserved slots": pool.buffer.reserved,
        "runs to undo": pool.starter.unexecuted,
        "a suspect": pool.starter.suspects.item,
        "admitted tasks": pool.admission.admitted,
        "outcomes to write": moves.unsettled,
    }
    return [f"node {node.number} has {what} left over" for what, there in held.items() if there]


# --- many seeds


def simulate(
    program: Any,
    *,
    seeds: Iterable[int] = range(1000),
    nodes: int = 3,
    faults: Sequence[Fault] = FAULTS,
    config: Config | None = None,
) -> str:
    """Simulate several nodes that run a program, once for each seed, and check the promises of TaskX.

    All nodes run in this thread, on one repository in memory. The seed chooses which one does its next
    step, when time passes, and what fails. The same seed leads to the same run, in every process.

    Args:
        program: is called with the queue of each node before its start: it registers executors and
            schedules. It returns functions without arguments, such as submits. They are called at any
            time, any number of times, on any node. A class is made anew for each seed, and the object is
            called; if it has a method ``check``, that gets all tasks at the end.
        seeds: the seeds.
        nodes: the number of nodes.
        faults: what may go wrong: a node dies (``"kill"``) or is stopped (``"stop"``), a call of the
            repository fails before or after its work (``"error"``), a node counts as dead although it
            lives (``"late"``), the clock of a node is wrong (``"clock"``).
        config: the config of the queues.

    Returns:
        a digest of everything that happened. It is the same in every process.

    Raises:
        BrokenPromise: a seed broke a promise. The text has the shortest program found that shows it.
        ConfigurationError: an argument is not valid.
    """
    check_int(nodes, "nodes", 1)
    if unknown := sorted({*faults} - {*FAULTS}):
        raise ConfigurationError(f"no fault {unknown[0]!r}; known are: {', '.join(FAULTS)}")
    digest = hashlib.sha256()
    with _runs(program, nodes, config) as run:
        for seed in seeds:
            made = run(_Seeded(seed, nodes, faults))
            if made.problem:
                script = _shrunk(made, run)
                raise BrokenPromise(_told(made.problem, seed, script, program, nodes, config))
            digest.update("\n".join(made.trace).encode())
    return digest.hexdigest()


def replay(
    program: Any, steps: Sequence[Step], *, nodes: int = 3, config: Config | None = None
) -> None:
    """Repeat the steps that :func:`simulate` has printed, with the same arguments.

    Raises:
        BrokenPromise: a promise was broken again.
    """
    with _runs(program, nodes, config) as run:
        if problem := run(_Scripted(steps)).problem:
            raise BrokenPromise(problem)


@contextmanager
def _runs(
    program: Any, nodes: int, config: Config | None
) -> Iterator[Callable[[_Seeded | _Scripted], Simulation]]:
    """Give the block a function that makes a run, which is over when the function returns."""
    world: list[Simulation] = []
    log = logging.getLogger("taskx.simulated")
    log.setLevel(logging.CRITICAL + 1)  # faults are not news
    with virtual(lambda: world[0], log) as begin:

        def run(chooser: _Seeded | _Scripted) -> Simulation:
            begin()
            made = Simulation(program, chooser, nodes, config, log)
            world[:] = [made]
            made.run()
            return made

        yield run


# --- a failure


def _shrunk(made: Simulation, run: Callable[[_Seeded | _Scripted], Simulation]) -> Sequence[Step]:
    """Leave out steps, and what comes in between, as long as a promise of the same kind is broken.

    This is delta debugging. Hypothesis cannot begin with a failure that it has not found itself.
    """
    kind, script, tries = _kind(made.problem), made.script, _MOST_TRIES

    def fails(steps: Sequence[Step]) -> bool:
        nonlocal tries
        tries -= 1
        return tries > 0 and _kind(run(_Scripted(steps)).problem) == kind

    if not fails(script):
        raise BrokenPromise(f"the same steps did not lead to this again: {made.problem}")
    before = -1
    while len(str(script)) != before and tries > 0:
        before, size = len(str(script)), max(1, len(script) // 2)
        while size and tries > 0:
            for place in range(len(script) - size, -1, -size):
                shorter = [*script[:place], *script[place + size :]]
                if fails(shorter):
                    script = shorter
            size //= 2
        for place, step in enumerate(script):
            for calm in _calmer(step):
                if fails(calmed := [*script[:place], calm, *script[place + 1 :]]):
                    script = calmed
                    break
    return script


def _calmer(step: Step) -> Iterator[Step]:
    """Yield the step with less that comes in between: nothing, then one thing less."""
    verb, place, number, between = step
    if between:
        yield (verb, place, number, {})
    for call, what in between.items():
        less = {at: other for at, other in between.items() if at != call}
        yield (verb, place, number, less)
        for at in range(len(what) if isinstance(what, list) else 0):
            fewer = [*what[:at], *what[at + 1 :]]
            yield (verb, place, number, {**less, call: fewer})
            for calm in _calmer(what[at]):
                yield (verb, place, number, {**less, call: [*what[:at], calm, *what[at + 1 :]]})


def _kind(problem: str) -> str:
    """Return a problem without what differs from run to run: ids, times and numbers."""
    return re.sub(r"[0-9a-f]+", "", re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "", problem))


def _short(step: Step) -> Step:
    """Return a step as it is printed, without what is not needed."""
    verb, place, number, between = step
    inside = {
        call: [*map(_short, what)] if isinstance(what, list) else what
        for call, what in between.items()
    }
    if inside:
        return (verb, place, number, inside)
    return (verb, place, number) if number else (verb, place)


def _told(
    problem: str,
    seed: int,
    script: Sequence[Step],
    program: Any,
    nodes: int,
    config: Config | None,
) -> str:
    """Return the text for a failure: what was broken, and a program that breaks it again."""
    name = getattr(program, "__qualname__", type(program).__qualname__)
    steps = pprint.pformat([_short(step) for step in script], width=88, compact=False)
    return (
        f"seed {seed}: {problem}\n\n"
        f"from taskx.testing import replay\n\nsteps = {steps}\n"
        f"replay({name}, steps, nodes={nodes}{', config=config' if config else ''})\n"
    )
