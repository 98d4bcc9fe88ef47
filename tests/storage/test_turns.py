"""Processes that write to one SQLite file take turns, in the order in which they arrive."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os

import pytest
from helpers import PATIENCE, eventually
from strikes import every_strike

from taskx import SQLiteRepository, Task
from taskx.stores.sqlite import turnstile
from taskx.stores.sqlite.file import DatabaseFile
from taskx.stores.sqlite.turnstile import NAMES, Turnstile
from taskx.tasks.timing import DEFAULT_TIMING

from .test_sqlite import start_program

TURN = DEFAULT_TIMING.turn


class Locks:
    """The lock files of a turnstile, opened by one more process: two places in a queue, and the turn."""

    def __init__(self, folder) -> None:
        self._open = {
            name: os.open(os.path.join(folder, f"{name}.lock"), os.O_RDWR) for name in NAMES
        }

    def take(self, *names: str) -> bool:
        """Lock some. Return False if another process has one of them."""
        try:
            for name in names:
                fcntl.flock(self._open[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def leave(self, *names: str) -> None:
        """Unlock some, or all."""
        for name in names or NAMES:
            fcntl.flock(self._open[name], fcntl.LOCK_UN)

    def taken(self) -> list[str]:
        """Return the names of those that other processes have."""
        return [name for name in NAMES if not self.take(name) or self.leave(name)]

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)


class Clock:
    """A clock that sleeping moves forward. A test may do more while a process sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.steps: list = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if self.steps:
            self.steps.pop(0)()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(turnstile, "time", made)
    return made


@pytest.fixture
def join(path):
    """A function that makes the turnstile of one more process. It has had a turn."""
    with contextlib.ExitStack() as stack:

        def make():
            made = Turnstile(DatabaseFile(str(path), create=True), DEFAULT_TIMING)
            stack.callback(made.close)
            made.enter(0)
            made.leave()
            return made

        yield make


@pytest.fixture
def ours(join):
    return join()


@pytest.fixture
def others(path, ours):
    """The locks as other processes have them."""
    with contextlib.closing(Locks(f"{path}-nodes")) as made:
        yield made


@pytest.fixture
def watch(path, ours):
    """The locks as nobody has them: to look who has which."""
    with contextlib.closing(Locks(f"{path}-nodes")) as made:
        yield made


# --- turns


def test_a_process_keeps_its_turn_for_a_time(clock, ours, others):
    """It needs one lock then, and does not look who waits. Afterwards the next one writes."""
    ours.enter(0)
    ours.leave()
    assert others.take("queue", "outer")
    clock.now += 0.9 * TURN
    assert ours.enter(10.0) == 10.0
    ours.leave()
    clock.now += 0.2 * TURN
    assert ours.enter(10.0) == 0.0, "it has waited for them until the time-out"


def test_a_turn_ends_when_another_process_writes(clock, join, ours, others):
    theirs = join()
    assert theirs.enter(10.0) == 10.0
    assert others.take("outer")
    assert ours.enter(10.0) == 0.0


def test_a_process_with_nothing_to_write_keeps_nobody_waiting(clock, join, ours):
    for process in (join(), ours, join()):
        assert process.enter(10.0) == 10.0
        process.leave()


def test_a_process_that_waits_looks_for_its_turn_several_times_a_turn(clock, ours, others):
    ours.enter(0)
    assert others.take("inner") is False
    ours.leave()
    assert others.take("inner")
    clock.steps = [lambda: None, others.leave]
    assert 10.0 - TURN / 2 <= ours.enter(10.0) < 10.0


def test_processes_write_in_the_order_in_which_they_arrive(clock, ours, others, watch):
    """One that has just written comes after those that wait."""
    seen = []
    others.take("outer", "queue")  # the first process, and the second one
    clock.now += TURN

    def first_begins():
        assert others.take("inner")
        others.leave("outer")
        seen.append(watch.taken())

    def second_moves_up():
        assert others.take("outer")
        others.leave("queue")

    def first_has_written():
        seen.append(watch.taken())
        others.leave("inner")

    def second_begins():
        assert others.take("inner")
        others.leave("outer")

    def second_has_written():
        seen.append(watch.taken())
        others.leave("inner")

    clock.steps = [first_begins, second_moves_up, first_has_written]
    clock.steps += [second_begins, second_has_written]
    ours.enter(10.0)
    assert seen == [["queue", "inner"], ["queue", "outer", "inner"], ["outer", "inner"]]
    assert watch.taken() == ["inner"]
    assert not clock.steps


def test_both_places_and_the_turn_share_the_time_out(clock, ours, others):
    clock.now += TURN
    others.take(*NAMES)
    began = clock.now
    assert ours.enter(10.0) == 0.0
    assert clock.now - began == pytest.approx(10.0, abs=0.01)
    assert ours.enter(0.0) == 0.0


@pytest.mark.process
def test_each_process_waits_for_about_one_turn_of_the_other(path):
    """The transactions are so long that the busy handler alone would starve a process for seconds."""
    program = """
        import json, sys, threading, time
        from taskx import SQLiteRepository
        from taskx.tasks.writes import Update
        writes = [Update("a", {}, {"message": str(n)}) for n in range(5000)]
        stood_still = []

        def watch():
            before = time.monotonic()
            while True:
                time.sleep(0.01)  # blocks on purpose
                now = time.monotonic()
                if now > before + 0.1:
                    stood_still.append((before, now))
                before = now

        threading.Thread(target=watch, daemon=True).start()
        with SQLiteRepository(sys.argv[1], "process") as repository:
            repository.apply([])
            print("ready", flush=True)
            for line in sys.stdin:
                times = [time.monotonic()]
                while times[-1] < times[0] + 2:
                    repository.apply(writes)
                    times.append(time.monotonic())
                print(json.dumps([times, stood_still]), flush=True)
    """
    with SQLiteRepository(path) as repository:
        repository.create(Task(id="a", type="t"))
    children = [start_program(program, path) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
    turns: list[list[int]] = [[], []]  # commits of the other process during each wait
    while max(map(len, turns)) < 20:
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        told = [json.loads(child.stdout.readline()) for child in children]
        times, stalls = zip(*told, strict=True)
        began, ended = max(mine[0] for mine in times), min(mine[-1] for mine in times)
        for one, other in ((0, 1), (1, 0)):
            turns[one] += [
                sum(asked < time < done for time in times[other])
                for asked, done in itertools.pairwise(times[one])
                if began <= asked
                and done <= ended
                # A process that stands still on a busy machine misses its turns.
                and not any(asked < end and begin < done for begin, end in itertools.chain(*stalls))
            ]
    for child in children:
        child.communicate(timeout=PATIENCE)
        assert child.returncode == 0
    assert min(map(len, turns)) > max(map(len, turns)) / 2
    # Mostly one; with the busy handler alone the other process makes all of its commits first. A process
    # that stands still without the interpreter's lock is not seen to do so, and misses turns, too.
    *most, _ = sorted(itertools.chain(*turns))
    assert max(most) <= 10


# --- processes that are interrupted, killed or stopped


@pytest.mark.parametrize("rival", [None, *NAMES])
def test_an_interrupt_blocks_no_other_process(ours, others, rival):
    """Wherever it strikes: alone, or beside a process that has a place or the turn."""

    def enter(point):
        ours._turn_until = 0.0
        assert others.take(*[rival] if rival else [])
        try:
            ours.enter(0.001)
        finally:
            ours.leave()
            others.leave()

    left = [others.taken() for _ in every_strike(enter)]
    assert len(left) > 10
    assert not any(left)


@pytest.mark.process
@pytest.mark.parametrize(
    ("waits_for", "has"),
    [("queue", []), ("outer", ["queue"]), ("inner", ["outer"]), (None, ["inner"])],
)
def test_a_process_that_is_killed_blocks_nobody(path, others, watch, waits_for, has):
    """Wherever it is: it waits for one of the places or for its turn, or has its turn."""
    program = """
        import sys
        from taskx.stores.sqlite.file import DatabaseFile
        from taskx.stores.sqlite.turnstile import Turnstile
        from taskx.tasks.timing import DEFAULT_TIMING
        turn = Turnstile(DatabaseFile(sys.argv[1], create=True), DEFAULT_TIMING)
        print("comes", flush=True)
        turn.enter(600.0)
        sys.stdin.read()
    """
    blocked = [waits_for] if waits_for else []
    assert others.take(*blocked)
    with start_program(program, path) as child:
        assert child.stdout.readline() == "comes\n"
        eventually(lambda: {*watch.taken()} == {*blocked, *has})
        child.kill()
        child.wait(PATIENCE)
        assert watch.taken() == blocked


def test_without_its_lock_files_the_turnstile_lets_all_pass(tmp_path):
    """The turnstile is for fairness, not for safety."""
    (tmp_path / "file").touch()
    turn = Turnstile(DatabaseFile(str(tmp_path / "file" / "tasks.db"), create=True), DEFAULT_TIMING)
    turn.enter(0)
    turn.leave()
    turn.close()
