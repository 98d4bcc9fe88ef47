"""The way of a task: its length is what ``docs/design.rst`` says, for an idle and for a busy worker.

A way is counted in *hops*. A hop is a call from one of our functions into another one that leads to an
event of the task: a statement of SQL, its entry into or its exit from a place where it waits for a worker,
the first line of its executor. Functions that return before anything has happened to the task are no hops.
"""

from __future__ import annotations

import gc
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from helpers import PATIENCE, eventually, parts_of, pool_of, whole_round

import taskx
from taskx import Config, Queue, SQLiteRepository, Task, TaskHandle, TaskStatus
from taskx.node.ahead import Ahead
from taskx.tasks.timing import Timing

ROOT = Path(__file__).parents[2]
OURS = str(Path(taskx.__file__).parent)
#: A way is recorded several times, and one of the shorter ones counts: a check of the schema or the
#: housekeeper joins in now and then, on a busy machine often.
TIMES = 9

Hop = tuple[CodeType, CodeType]


class Page:
    """The numbers and the steps of the section *The way of a task*."""

    def __init__(self) -> None:
        page = (ROOT / "docs" / "design.rst").read_text("utf-8")
        section = page.split("\nThe way of a task\n")[1].split("\nHeld and free tasks\n")[0]
        rows = re.findall(r"^   (\w[\w ]+?) {2,}(\d+) +(\d+)$", section, re.MULTILINE)
        #: The most hops and files of each way.
        self.ways = {name: (int(hops), int(files)) for name, hops, files in rows}
        calls = re.findall(r"^   a (submit|run), (\w[\w ]+?) {2,}(\d+)$", section, re.MULTILINE)
        #: The most calls of our own functions in a submit.
        self.calls = {name: int(number) for what, name, number in calls if what == "submit"}
        #: The most calls in a run, from the start of the task to its outcome.
        [self.run] = [int(number) for what, _, number in calls if what == "run"]
        #: The steps in words: the caller, the called function, its file.
        self.steps = re.findall(r"``([\w.]+)`` → ``([\w.]+)`` \(``([\w/.]+)``\)", section)


class Way:
    """The hops of one task, and the files of their functions."""

    def __init__(self) -> None:
        self.hops: dict[Hop, None] = {}

    def add(self, stack: list[CodeType]) -> None:
        self.hops.update(dict.fromkeys(pairwise(stack)))

    def __len__(self) -> int:
        return len(self.hops)

    @property
    def files(self) -> set[str]:
        return {code.co_filename for hop in self.hops for code in hop} - {__file__}

    @property
    def names(self) -> set[tuple[str, str]]:
        return {(_name(caller), _name(called)) for caller, called in self.hops}

    def __str__(self) -> str:
        lines = (f"{_name(caller)} → {_name(called)}" for caller, called in self.hops)
        return f"{len(self)} hops, {len(self.files)} files\n" + "\n".join(lines)


def _name(code: CodeType) -> str:
    return getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no qualified names


def _stack(frame: FrameType | None) -> list[CodeType]:
    """Return our own functions that are being called, the outermost first."""
    stack = []
    while frame is not None:
        if _is_ours(frame.f_code):
            stack.append(frame.f_code)
        frame = frame.f_back
    return stack[::-1]


def _is_ours(code: CodeType) -> bool:
    # A comprehension is a function of its own before Python 3.12.
    return code.co_filename.startswith(OURS) and not code.co_name.endswith("comp>")


class Road:
    """A queue with one worker, and the ways that its tasks take."""

    def __init__(self, path: Path) -> None:
        # Each commit looks for other processes, as after a while. And no task counts as short, however
        # fast the machine is: a submit then looks at what is at work.
        timing = Timing(short_task=0.0, listeners_every=0.0)
        repository = SQLiteRepository(path, durability="process", timing=timing)
        self.queue = Queue(repository, Config(worker_num=1), timing=timing)
        self.gate, self.inside = threading.Event(), threading.Event()
        self.way = Way()
        self._recorded: set[int | None] = set()
        # Held in a submit: a worker that is called meanwhile goes on after it, also without the lock of the
        # interpreter. Else each of the two would see what the other one does.
        self._turn = threading.RLock()
        self._waiting = 0
        self._ran = self._deferred = False
        self.queue.executor("fine")(self._fine)
        self.queue.executor("hold")(self._hold)
        threading.setprofile(self._profile)
        try:
            self.queue.start()
        finally:
            threading.setprofile(None)
        [self.worker] = pool_of(self.queue).threads

    def _fine(self, n: int) -> None:
        if self._recorded:
            self.way.add([*_stack(sys._getframe()), Road._fine.__code__])
            self.there, self.way, self._ran = self.way, Way(), True

    def _hold(self) -> None:
        self.inside.set()
        assert self.gate.wait(PATIENCE)

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if threading.get_ident() not in self._recorded:
            return
        with self._turn:
            if event == "c_call" and getattr(called, "__name__", "").startswith("execute"):
                self.way.add(_stack(frame))
            elif (waiting := self._count()) != self._waiting:
                self._waiting = waiting
                self.way.add(_stack(frame.f_back if event == "call" else frame))

    def _count(self) -> int:
        """Count the tasks that wait for the worker, and an outcome that was left to a commit.

        The submitter sees that the worker is called; the worker's next event is its exit from there.
        """
        pool = pool_of(self.queue)
        self._deferred |= self._ran and bool(parts_of(self.queue).moves.unsettled)
        called = threading.get_ident() != self.worker.ident and not pool.ahead.waiting
        return len(pool.buffer) + len(pool.ahead.runs) + called + self._deferred

    def submit(self) -> TaskHandle[Any]:
        return self.queue.submit("fine", {"n": 1})

    def rest(self) -> None:
        """Wait until the worker sleeps, and nothing waits for it or for a commit."""
        eventually(lambda: self._has_nothing())
        whole_round(self.queue)  # the housekeeper takes no part for a while
        eventually(lambda: self._has_nothing() and self._sleeps())

    def _has_nothing(self) -> bool:
        return pool_of(self.queue).holds_nothing() and not parts_of(self.queue).moves.unsettled

    def _sleeps(self) -> bool:
        return sys._current_frames()[self.worker.ident].f_code is Ahead.wait.__code__

    @contextmanager
    def _recording(self, *threads: int | None) -> Iterator[None]:
        """Note what these threads do; the thread that calls this one gets a profile function, too."""
        gc.disable()  # finalizers are no part of the way
        sys.setprofile(self._profile)
        self._recorded = {*threads}
        try:
            yield
        finally:
            sys.setprofile(None)
            gc.enable()

    def _arrive(self, handle: Any) -> tuple[Way, Way]:
        """Return the way to the executor, and the way back to the outcome."""
        # No thread waits for the handle, because the worker would then read the task for it.
        eventually(lambda: self.queue.get_task_status(handle.id).status is TaskStatus.COMPLETED)
        self.rest()
        self._recorded = set()
        back, self.way = self.way, Way()
        self._ran = self._deferred = False
        return self.there, back

    def idle(self) -> tuple[Way, Way]:
        """Submit a task while the worker waits for one."""
        self.rest()
        with self._recording(threading.get_ident(), self.worker.ident), self._turn:
            handle = self.submit()
        return self._arrive(handle)

    def busy(self) -> tuple[Way, Way]:
        """Submit a task while the worker runs another one."""
        with self.held():
            with self._recording(threading.get_ident()):
                handle = self.submit()
            self._recorded = {self.worker.ident}
        return self._arrive(handle)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the worker busy."""
        self.inside.clear()
        self.gate.clear()
        self.queue.submit("hold")
        assert self.inside.wait(PATIENCE)
        yield
        self.gate.set()

    def close(self) -> None:
        self.gate.set()
        self.queue.close()


def calls_of(submit: Callable[[], object], before: Callable[[], object] = bool) -> int:
    """Return the number of calls of our own functions in a submit that helps no other thread."""
    counts: list[int] = []

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "call" and _is_ours(frame.f_code):
            counts[-1] += 1

    gc.disable()
    for _ in range(3 * TIMES):
        before()
        counts.append(0)
        sys.setprofile(profile)
        try:
            submit()
        finally:
            sys.setprofile(None)
    gc.enable()
    return sorted(counts)[len(counts) // 8]


@pytest.fixture(scope="module")
def page():
    return Page()


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    road = Road(tmp_path_factory.mktemp("way") / "tasks.db")
    yield road
    road.close()


@pytest.fixture(scope="module")
def ways(road):
    """The usual ways of some plain submits, from the call to the committed outcome."""
    idle, busy = ([take() for _ in range(TIMES)] for take in (road.idle, road.busy))
    found = {
        "to an idle worker": [there for there, _ in idle],
        "through the buffer": [there for there, _ in busy],
        "back to the outcome": [back for _, back in idle],
    }
    return {name: sorted(taken, key=len)[TIMES // 4] for name, taken in found.items()}


@pytest.mark.parametrize("name", ["to an idle worker", "through the buffer", "back to the outcome"])
def test_a_way_is_no_longer_than_the_design_page_says(ways, page, name):
    way = ways[name]
    hops, files = page.ways[name]
    assert 4 < len(way) <= hops, str(way)
    assert 2 < len(way.files) <= files, str(way)


def test_a_submit_makes_no_more_calls_than_the_design_page_says(road, page, tmp_path):
    with road.held():
        calls = {"worker busy": calls_of(road.submit)}
    calls["worker idle"] = calls_of(road.submit, road.rest)
    with SQLiteRepository(tmp_path / "tasks.db", durability="process") as repository:
        other = Queue(repository)
        other.declare("fine")
        calls["queue not started"] = calls_of(partial(other.submit, "fine", {"n": 1}))
        other.close()
    assert calls.keys() == page.calls.keys()
    for state, number in calls.items():
        assert 20 < number <= page.calls[state], state


def test_a_run_in_a_batch_makes_no_more_calls_than_the_design_page_says(page, tmp_path):
    """Counted on the thread that runs the tasks: how often others look for work depends on the time.

    On a busy machine a few calls join in, so it is counted again if there were too many.
    """
    calls, workers, counts, number = [0], set[int](), threading.Event(), 320

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "call" and counts.is_set() and _is_ours(frame.f_code):
            calls[0] += threading.get_ident() in workers

    # All tasks count as short. No audit comes in between, and no other process is looked for.
    seldom = dict.fromkeys(("audit_every", "recover_every", "listeners_every"), PATIENCE)
    timing = Timing(short_task=PATIENCE, hand_back_after=PATIENCE, **seldom)
    repository = SQLiteRepository(tmp_path / "tasks.db", durability="process", timing=timing)
    queue = Queue(repository, Config(worker_num=1, buffer_size=number), timing=timing)
    gate, inside = threading.Event(), threading.Event()

    @queue.executor("hold")
    def hold() -> None:
        workers.add(threading.get_ident())
        inside.set()
        assert gate.wait(PATIENCE)

    queue.executor("fine")(lambda n: None)
    threading.setprofile(profile)
    try:
        queue.start()
    finally:
        threading.setprofile(None)
    found: list[float] = []
    with repository:
        ahead = pool_of(queue).ahead
        for _ in range(TIMES):
            queue.submit("hold")
            assert inside.wait(PATIENCE)
            ahead._mean, ahead.short = 0.0, True
            queue.submit_many([Task(type="fine", params={"n": n}) for n in range(number)])
            calls[0] = 0
            counts.set()
            gate.set()
            assert queue.drain(PATIENCE)
            counts.clear()
            inside.clear()
            gate.clear()
            found.append(calls[0] / number)
            if found[-1] <= page.run:
                break
        queue.close()
    assert 10 < found[-1] <= page.run, found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="functions have no qualified names")
def test_each_step_of_the_design_page_is_a_hop(ways, page):
    taken = set().union(*(way.names for way in ways.values()))
    files = {
        _name(code): code.co_filename for way in ways.values() for hop in way.hops for code in hop
    }
    assert len(page.steps) > 8
    for caller, called, file in page.steps:
        assert (caller, called) in taken
        assert files[called] == str(Path(OURS, file))
