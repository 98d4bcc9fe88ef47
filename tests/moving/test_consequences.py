"""Each move of a task is reported to the parts that need to know, and to no others."""

from __future__ import annotations

import ast
import itertools
import logging
import threading
from collections import defaultdict
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from helpers import PATIENCE, eventually, frequent_checks, parts_of, pool_of, those_with

import taskx
from taskx import Hook, Retry, Snooze, TaskFailed
from taskx.attempt.failures import ChildDied
from taskx.node.buffer import Buffer
from taskx.node.hooks import Hooks
from taskx.node.moving import Moves
from taskx.node.ordering import Dependents, Turns
from taskx.node.pool import WorkerPool
from taskx.node.starter import Starter
from taskx.tasks import lifecycle
from taskx.tasks.bell import Agenda
from taskx.tasks.errors import CancelReason
from taskx.tasks.log import GuardedLogger
from taskx.tasks.moves import MOVES

PACKAGE = Path(taskx.__file__).parent
PENDING, RUNNING, COMPLETED = "pending", "running", "completed"
FAILED, CANCELLED = "failed", "cancelled"

ENDED = {"hook finished", "dependents", "turns", "handles"}
OVER = {"limits", "log"}
#: The parts that hear of each move.
HEARD = {
    ("create", None): {"hook submitted", "waiting", "turns", "due"},
    ("create", RUNNING): {"hook submitted"},
    ("start", RUNNING): set(),
    ("progress", None): {"hook progressed"},
    ("checkpoint", None): set(),
    ("complete", COMPLETED): ENDED | OVER,
    ("fail", FAILED): {"hook stuck"} | ENDED | OVER,  # "hook stuck" if the thread runs on
    ("retry", PENDING): {"hook stuck", "hook retried", "buffer", "due"} | OVER,
    ("snooze", PENDING): {"hook snoozed", "due"} | OVER,
    ("park", PENDING): {"waiting", "due"} | OVER,
    ("interrupt", PENDING): {"hook interrupted", "more"} | OVER,
    ("hand back", PENDING): {"buffer"},
    ("cancelled", CANCELLED): ENDED | OVER,
    ("crash", PENDING): {"hook rescued", "buffer"} | OVER,
    ("crash", FAILED): {"hook rescued"} | ENDED | OVER,
    ("crash", CANCELLED): {"hook rescued"} | ENDED | OVER,
    ("rescue", PENDING): {"hook rescued", "more", "log"},
    ("rescue", FAILED): {"hook rescued", "log"} | ENDED,
    ("rescue", CANCELLED): {"hook rescued", "log"} | ENDED,
    ("cancel", CANCELLED): {"out of the buffer"} | ENDED,
    ("request cancel", None): {"token"},
    ("expire", CANCELLED): {"out of the buffer", "log"} | ENDED,
    ("orphan", CANCELLED): {"log"} | ENDED - {"turns"},
    ("orphan", FAILED): {"log"} | ENDED - {"turns"},
    ("parents moved", None): {"waiting", "turns", "more"},
    ("wake", None): {"more"},
    ("finish", COMPLETED): {"out of the buffer", "log"} | ENDED - {"turns"},
    ("finish", FAILED): {"out of the buffer", "log"} | ENDED - {"turns"},
    ("give turn", None): {"more", "due"},
    ("release", None): {"more"},
    ("lift bar", None): {"more", "turns"},
    ("requeue", PENDING): {"hook requeued", "more", "turns"},
    ("replace", None): {"out of the buffer", "more"},
    ("take", None): set(),
    ("free", None): set(),
    ("release key", None): set(),
    ("delete", None): {"out of the buffer"} | ENDED - {"hook finished"},
    ("prune", None): set(),
    ("discard", None): set(),
}


ROWS = {(move.name, move.target): move for move in MOVES}


def key(write):
    return write.move, write.changes.get("status")


def test_each_move_has_one_row():
    assert len(ROWS) == len(MOVES)
    assert HEARD.keys() == ROWS.keys()
    for move in MOVES:
        assert move.ends or move.target not in lifecycle.FINISHED
        assert move.has_consequences == bool(HEARD[move.name, move.target])


def calls(path, *names):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names:
            yield node


def test_each_write_of_the_core_names_a_move_that_has_a_row():
    named = {move.name for move in MOVES} | {"by hand"}
    found = set()
    for path in (PACKAGE / "tasks").glob("*.py"):
        for call in calls(path, "Update", "Delete"):
            given = [word.value for word in call.keywords if word.arg == "move"]
            most = 5 if call.func.id == "Update" else 4
            [move] = given or call.args[most - 1 : most]
            found.add(move.value if isinstance(move, ast.Constant) else "retry")
    assert found <= named
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name not in ("tasks", "testing"):
            assert not [*calls(path, "Update", "Delete")], path


#: Calls that report a move. The other modules tell hooks of what is no move.
TOLD = {
    "dependents.parent_ended": {"node/moving.py"},
    "dependents.waits": {"node/moving.py"},
    "watcher.resolve": {"node/moving.py"},
    "watcher.complete": {"node/moving.py"},
    "hooks.tell": {
        "node/moving.py",
        "node/pool.py",
        "node/ticker.py",
        "queue/intake.py",
        "node/node.py",
    },
}


def test_all_moves_are_reported_through_the_table():
    told = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                for call in TOLD:
                    if ast.unparse(node).endswith(call):
                        told[call].add(path.relative_to(PACKAGE).as_posix())
    assert told == TOLD


class Ears:
    """Record which parts hear of something during the consequences of each move."""

    def __init__(self, monkeypatch):
        self.heard = defaultdict(set)
        self.followed = {}
        self.applied = {}
        self._local = threading.local()
        self._patch = monkeypatch.setattr
        for name in ("follow", "_created", "_moved"):
            self._patch(Moves, name, self._heard(getattr(Moves, name)))
        self.listen(Dependents, "parent_ended", "dependents")
        self.listen(Dependents, "waits", "waiting")
        self.listen(Turns, "advance", "turns")
        self.listen(Turns, "scan_all_soon", "turns")
        self.listen(Agenda, "fetch_soon", "more")
        self.listen(Agenda, "check_due_soon", "due")
        self.listen(Starter, "strike", "limits")
        self.listen(Starter, "rebuffer", "buffer")
        self.listen(Buffer, "discard", "out of the buffer")
        self.listen(WorkerPool, "fire", "token")
        self.listen(GuardedLogger, "log", "log")
        self.listen_to_hooks()

    def _heard(self, call):
        """Return the function, made to record the writes that it gets, and who is told meanwhile."""

        def heard(moves, writes, *args):
            writes = [*writes]
            self.followed.update((id(write), write) for write in writes)
            keys = {key(write) for write in writes}
            move = keys.pop() if len(keys) == 1 else None  # else the parts cannot be told apart
            self._during(move, call, moves, writes, *args)

        return heard

    def _during(self, move, call, *args, **options):
        outer = getattr(self._local, "move", None)
        self._local.move = move
        try:
            call(*args, **options)
        finally:
            self._local.move = outer

    def hear(self, name):
        if (move := getattr(self._local, "move", None)) is not None:
            self.heard[move].add(name)

    def listen(self, owner, method, name):
        """Record that a method is called."""
        call = getattr(owner, method)

        def heard(*args, **options):
            if name != "turns" or method != "advance" or (args := (args[0], [*args[1]]))[1]:
                self.hear(name)
            return call(*args, **options)

        self._patch(owner, method, heard)

    def listen_to_hooks(self):
        tell = Hooks.tell

        def heard(hooks, listeners, *args):
            self.hear(f"hook {listeners[0][0].rpartition('.')[2]}")
            tell(hooks, listeners, *args)

        self._patch(Hooks, "tell", heard)

    def watch(self, repository):
        """Record the writes that are applied, except by ``elsewhere``, which acts as another process."""
        self.elsewhere = apply = repository.apply

        def applied(writes, **options):
            results = apply(writes, **options)
            for write, held in zip(writes, results, strict=True):
                if held:
                    self.applied[id(write)] = write
            return results

        self._patch(repository, "apply", applied)


class Everybody:
    """A stand-in for the watcher and its tasks: somebody waits for each task."""

    def __init__(self, ears):
        self._ears = ears
        self.watched, self.reported = self, ()

    def __contains__(self, task_id):
        return True

    def resolve(self, task_id):
        self._ears.hear("handles")

    def complete(self, task, result):
        self._ears.hear("handles")


class Listener(Hook):
    """Overrides every event."""


for event in [name for name in vars(Hook) if not name.startswith("_")]:
    setattr(Listener, event, lambda self, *args: None)


@pytest.fixture
def ears(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "taskx")
    return Ears(monkeypatch)


@pytest.mark.every_store
@frequent_checks
def test_exactly_the_right_parts_hear_of_each_move(ears, make_queue, repository, gate, monkeypatch):
    ears.watch(repository)
    queue = make_queue(worker_num=2, hooks=[Listener()])
    monkeypatch.setattr(parts_of(queue).moves, "_watcher", Everybody(ears))
    Life(queue, ears, gate, make_queue).live()
    assert not queue.stop(timeout=PATIENCE)  # what follows from the last moves is done, too
    assert {key(write) for write in ears.applied.values()} == ROWS.keys()
    for write_id, write in ears.applied.items():
        assert write_id in ears.followed, write
    assert {move: ears.heard.get(move, set()) for move in ROWS} == HEARD


class Life:
    """Make a queue do every move; most tasks have a concurrency key of their own."""

    def __init__(self, queue, ears, gate, make_queue):
        self.queue, self.ears, self.gate, self.make_queue = queue, ears, gate, make_queue
        self.repository = queue.repository
        self.tries = defaultdict(int)
        self.keys = itertools.count()
        self.asked = threading.Semaphore(0)
        self.may_end = defaultdict(threading.Event)
        queue.declare("remote")
        for name, options in {
            "fine": {},
            "wrong": {},
            "again": {"max_attempts": 3},
            "nap": {},
            "asks": {},
            "died": {},
            "heeds": {},
            "tells": {},
            "parent": {},
            # A slow machine may not even call it before the time-out: then there is another attempt.
            "hangs": {"grace": 0.01, "timeout": 0.05, "max_attempts": 1000},
        }.items():
            queue.executor(name, **options)(getattr(self, f"_{name}"))

    def live(self):
        self.submit("remote", id="awaited")
        self.submit("remote", depends_on=["awaited"])  # so that ends are reported
        self.queue.start()
        for part in (
            self.ends,
            self.waits,
            self.parks,
            self.cancels,
            self.dies,
            self.hands,
            self.keeps,
            self.goes,
        ):
            part()

    def submit(self, type, own=True, **options):
        if own:
            options["concurrency_key"] = f"its own {next(self.keys)}"
        return self.queue.submit(type, {}, **options).id

    def until(self, status, task_id):
        eventually(lambda: self.repository.statuses([task_id]).get(task_id) == status)
        return task_id

    def starts_elsewhere(self, task_id, *more):
        """Start a task on a node that is dead. Return False if its rescue came before the other writes."""
        start = lifecycle.start(self.repository.get_by_id(task_id), 1, "a dead node")
        return all(self.ears.elsewhere([start, *more]))

    def ends(self):
        for own in (True, False):
            eventually(lambda: pool_of(self.queue).idles)  # one without a key is started at once
            self.until(COMPLETED, self.submit("fine", own))
            self.until(FAILED, self.submit("wrong", own))
            self.until(COMPLETED, self.submit("again", own))
            self.until(COMPLETED, self.submit("nap", own))
            self.until(COMPLETED, self.submit("fine", own, delay=0.05))
        self.until(COMPLETED, self.submit("tells"))

    def waits(self):
        parents = ["one", "another"]
        first = lifecycle.unfinished_parent(parents, dict.fromkeys(parents, PENDING))
        parents.sort(key=[first].count, reverse=True)
        for parent in parents:
            self.submit("parent", id=parent)
        children = {self.submit("fine", own, depends_on=parents) for own in (True, False)}
        for parent in parents:  # after the end of the first one, the children wait for the other
            eventually(
                lambda it=parent: {*those_with(self.repository, "waiting_on", it)} == children
            )
            self.may_end[parent].set()
        for child in children:
            self.until(COMPLETED, child)
        for policy, status in (("cancel", CANCELLED), ("fail", FAILED)):
            parent = self.submit("remote")
            child = self.submit("remote", depends_on=[parent], on_parent_failure=policy)
            self.queue.cancel_task(parent)
            self.until(status, child)

    def parks(self):
        for own in (True, False):
            asking = self.submit("asks", own)
            for answer, given in (("first", {"result": 1}), ("second", {"error": "no"})):
                self.until(PENDING, f"{asking}/{answer}")
                self.queue.finish(f"{asking}/{answer}", **given)
            eventually(lambda it=asking: self.queue.wake(it))  # from its sleep
            self.until(COMPLETED, asking)

    def cancels(self):
        running = self.submit("heeds")
        assert self.asked.acquire(timeout=PATIENCE)
        self.queue.cancel_task(running)
        self.until(CANCELLED, running)
        self.until(CANCELLED, self.submit("remote", expires=0.01))
        for own in (True, False):
            interrupted = self.submit("heeds", own)
            assert self.asked.acquire(timeout=PATIENCE)
            pool_of(self.queue).runs[interrupted].token.fire(CancelReason.STOP)
            assert self.asked.acquire(timeout=PATIENCE)  # it runs again
            self.queue.cancel_task(interrupted)
            self.until(CANCELLED, interrupted)

    def dies(self):
        self.until(COMPLETED, self.submit("died", id="once"))
        self.until(FAILED, self.submit("died", max_crashes=1))
        unheard = (f"unheard {n}" for n in itertools.count())
        while ("crash", CANCELLED) not in map(key, [*self.ears.applied.values()]):
            self.until(CANCELLED, self.submit("died", id=next(unheard)))
        for status, options in ((PENDING, {}), (FAILED, {"max_crashes": 1}), (CANCELLED, {})):
            task_id = self.submit("remote", **options)
            cancel = lifecycle.cancel(task_id, 1)[-1:] if status == CANCELLED else []
            eventually(lambda task_id=task_id, more=cancel: self.starts_elsewhere(task_id, *more))
            self.until(status, task_id)
        for own in (True, False):
            stuck = self.submit("hangs", own)
            self.gate.wait_for()
            eventually(lambda stuck=stuck: self.repository.get_by_id(stuck).stuck_on)
            self.gate.open()
            self.until(COMPLETED, stuck)
            self.gate.close()
        while "hook stuck" not in self.ears.heard["fail", FAILED]:
            stuck = self.until(FAILED, self.submit("hangs", max_attempts=1))
            self.gate.open()
            eventually(lambda stuck=stuck: not self.repository.get_by_id(stuck).stuck_on)
            self.gate.close()

    def hands(self):
        pool = pool_of(self.queue)
        task = self.repository.get_by_id(self.submit("heeds", False))
        assert self.asked.acquire(timeout=PATIENCE)
        other = self.submit("heeds", False)
        assert self.asked.acquire(timeout=PATIENCE)  # all workers are at work
        waiting = self.submit("fine", False)
        runs = pool.starter.start(pool.buffer.take(1), "worker")
        pool.buffer.started()
        pool.starter.hand_back(runs)
        self.queue.pause("fine")
        for running in (task.id, other):
            self.queue.cancel_task(running)
        self.queue.resume("fine")
        self.until(COMPLETED, waiting)
        self.make_queue().start()  # a node without executors
        eventually(lambda: not pool.fetcher.alone)  # a node that is alone takes nothing from others
        web = self.make_queue()
        web.declare("fine")
        self.until(COMPLETED, web.submit("fine").id)

    def keeps(self):
        unique = {"unique_key": "one", "own": False}
        held = self.submit("remote", **unique)
        assert self.submit("remote", on_conflict="replace", **unique) == held
        short = {"unique_key": "short", "unique_scope": 0.001, "on_conflict": "return"}
        first = self.submit("remote", **short)
        eventually(lambda: self.submit("remote", **short) != first)

    def goes(self):
        for own in (True, False):
            again = self.until(FAILED, self.submit("wrong", own))
            before = self.repository.get_by_id(again).starts  # more than one if it was handed back
            self.queue.requeue(again)
            eventually(lambda it=again, n=before: self.repository.get_by_id(it).starts > n)
            self.until(FAILED, again)
        self.queue.delete(self.submit("remote"))
        assert self.queue.discard_dead_letters()
        assert self.queue.prune(datetime.now(timezone.utc) + timedelta(days=1))

    # --- executors

    def _fine(self):
        pass

    def _wrong(self):
        raise ValueError("wrong")

    def _again(self, ctx):
        self.tries[ctx.task.id] += 1
        if self.tries[ctx.task.id] < 3:
            raise Retry(delay=0.01 * (self.tries[ctx.task.id] - 1))

    def _nap(self, ctx):
        self.tries[ctx.task.id] += 1
        if self.tries[ctx.task.id] == 1:
            raise Snooze(0.01)

    def _asks(self, ctx):
        ctx.ask("first")
        with suppress(TaskFailed):
            ctx.ask("second")
        ctx.sleep(timedelta(days=1), step="sleep")

    def _died(self, ctx):
        self.tries[ctx.task.id] += 1
        if ctx.task.id.startswith(
            "unheard"
        ):  # another process requests the cancel, in rare cases heard
            self.ears.elsewhere(lifecycle.cancel(ctx.task.id, 1)[-1:])
        if ctx.task.id != "once" or self.tries[ctx.task.id] == 1:
            raise ChildDied("killed", "")

    def _heeds(self, ctx):
        self.asked.release()
        assert ctx.token.wait(PATIENCE)
        ctx.token.raise_if_cancelled()

    def _tells(self, ctx):
        ctx.cursor = 1
        ctx.progress(50, "half")
        eventually(lambda: self.ears.heard["progress", None])

    def _parent(self, ctx):
        assert self.may_end[ctx.task.id].wait(PATIENCE)

    def _hangs(self, ctx):
        self.tries[ctx.task.id] += 1
        if self.tries[ctx.task.id] == 1:
            self.gate()
