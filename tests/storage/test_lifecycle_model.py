"""A model of the table of moves, against which every repository is tested with random moves.

The model was written from the table, independently of ``lifecycle``.
"""

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from helpers import earliest_due, held_on, those_with
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from taskx import (
    CancelReason,
    InvalidTransition,
    MongoRepository,
    TaskFilter,
    TaskNotFound,
    TaskStatus,
)
from taskx.node.housekeeper import unfinished
from taskx.stores.liveness.base import Node
from taskx.stores.queries import oldest_ready, owners
from taskx.tasks import lifecycle
from taskx.tasks.clock import to_ms
from taskx.testing import ManualClock

from .repositories import MAKERS

IDS = ("a", "b", "c")
TYPES = {"a": "t", "b": "t", "c": "u"}
NODES = ("n1", "n2")
FINISHED = ("completed", "failed", "cancelled")
BY_HAND = {
    ("pending", "running"),
    ("pending", "cancelled"),
    ("running", "pending"),
    ("running", "completed"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("failed", "pending"),
    ("cancelled", "pending"),
}


@dataclass
class Record:
    """The expected values of a record."""

    priority: int
    run_at: int | None
    max_attempts: int
    max_crashes: int
    order: int
    held: bool
    awaits: bool = False  # another task, in the middle of an attempt
    status: str = "pending"
    owner: str = ""
    starts: int = 0
    errors: int = 0
    crashes: int = 0
    interruptions: int = 0
    snoozes: int = 0
    progress: int = 0
    message: str = ""
    error: str = ""
    result: object = None
    dead_letter: bool = False
    cancel_requested: bool = False
    started: bool = False
    died: bool = False  # the log already holds the last attempt, as a crash
    log: list[str] = field(default_factory=list)

    @property
    def last_chance(self):
        return self.crashes > 0 and self.crashes + 1 >= self.max_crashes

    def end(self, status, told=None):
        self.status, self.owner = status, ""
        if told is not None:
            self.progress, self.message = told

    def back(self, owner, outcome):
        self.awaits = False
        self.status, self.owner, self.started = "pending", owner, False
        self.progress, self.message = 0, ""
        self.log.append(outcome)

    def requeue(self, order, now):
        self.order = order
        if self.started and not self.died:
            self.log.append(self.status)
        self.status, self.owner, self.held, self.run_at = "pending", "", False, now
        self.awaits = False
        self.errors = self.crashes = self.interruptions = self.snoozes = self.progress = 0
        self.message = self.error = ""
        self.result = None
        self.dead_letter = self.cancel_requested = self.started = self.died = False


ids = st.sampled_from(IDS)
nodes = st.sampled_from(NODES)
percents = st.integers(0, 100)
endings = st.sampled_from(
    [
        *("returned", "raised", "permanent", "snoozed", "died", "sleeps", "awaits"),
        *("timeout", "cancel", "stop", "lease lost"),
    ]
)


class Life(RuleBasedStateMachine):
    kind = ""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.clock = ManualClock()
        self.store = MAKERS[self.kind](self.folder, self.clock)
        if self.kind == "sqlite":
            self.store.durability = "process"
        for node in NODES:
            self.store.liveness.join(Node(id=node, name=node))
        self.model: dict[str, Record] = {}
        self.seen = {}  # tasks as they were last read, which may be outdated
        self.runs = []  # runs that were started, which may have ended
        self.resumed = set()  # those that went on with an attempt, as ids and fences
        self.created = 0

    def teardown(self):
        if hasattr(self, "store"):
            for node in NODES:
                self.store.liveness.leave(node)
            self.store.close()
            shutil.rmtree(self.folder)

    def apply(self, *writes):
        return list(self.store.apply(writes))

    def some_run(self, draw):
        """Return one of the latest runs, most often the last."""
        return self.runs[-draw(st.integers(1, min(3, len(self.runs))))]

    def alive(self, run):
        """Return the record of a run if its fence still holds, otherwise None."""
        record = self.model.get(run.id)
        alive = record and record.status == "running" and record.starts == run.starts
        return record if alive else None

    @rule(data=st.data())
    def move(self, data):
        """Make one of the moves that may have an effect now, the common ones more often.

        There is one rule for all moves, as Hypothesis leaves out many rules of a machine in each run.
        """
        moves = [self.wait, self.release, self.take, self.free, self.read, self.cancel, self.wake]
        moves += [self.requeue, self.set_status, self.die, self.die]
        moves += [self.create, self.create if len(self.model) < len(IDS) else self.delete]
        moves += [self.start] * 4 if self.startable() else []
        moves += [self.start_late] if self.seen else []
        moves += [self.progress, self.hand_back, *[self.conclude] * 4] if self.runs else []
        data.draw(st.sampled_from(moves))(data.draw)

    # --- creation, and moves before the start

    def create(self, draw):
        task_id = draw(ids)
        priority = draw(st.integers(-1, 1))
        delay = draw(st.sampled_from([None, None, -5, 0, 5]))
        max_attempts, max_crashes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        now = self.clock.now_ms()
        run_at = None if delay is None else now + delay * 1000
        held = run_at is not None and run_at > now
        owner = "" if held else draw(st.sampled_from(["", "n1"]))
        write = lifecycle.create(
            task_id=task_id,
            type=TYPES[task_id],
            params="{}",
            created_by="",
            now=now,
            priority=priority,
            run_at=run_at,
            max_attempts=max_attempts,
            max_crashes=max_crashes,
        )
        write.row["owner"] = owner
        assert self.apply(write) == [task_id not in self.model]
        if task_id not in self.model:
            self.created += 1
            self.model[task_id] = Record(
                priority, run_at, max_attempts, max_crashes, self.created, held, owner=owner
            )
            # Earlier reads and runs with this id belong to another task.
            self.seen.pop(task_id, None)
            self.runs = [run for run in self.runs if run.id != task_id]

    def wait(self, draw):
        self.clock.advance(draw(st.sampled_from([0.001, 1, 5])))
        if isinstance(self.store, MongoRepository):
            # The heartbeat thread uses the machine's clock, so the test sends the heartbeats itself.
            for node in NODES:
                self.store.liveness.beat(node)

    def release(self, draw):
        task_id = draw(ids)
        record = self.model.get(task_id)
        holds = record is not None and record.status == "pending" and record.held
        holds = holds and not record.awaits
        assert self.apply(lifecycle.release(task_id)) == [holds]
        if holds:
            record.held = False

    def wake(self, draw):
        """Let a task go on that awaits another one, which has ended, or that waits for its time."""
        task_id = draw(ids)
        record = self.model.get(task_id)
        if record is None:
            return
        task, now = self.store.get_by_id(task_id), self.clock.now_ms()
        awaits = record.status == "pending" and record.held and record.awaits
        sleeps = record.status == "pending" and record.held and not record.awaits
        ended = draw(st.booleans())
        statuses = {} if ended else {"another": "running"}
        if lifecycle.is_parked(task):
            writes = lifecycle.moved_on(task, "another", statuses, (), now)
            assert self.apply(*writes) == [awaits] * ended
            if awaits and ended:
                record.held = record.awaits = False
                record.run_at = now
        assert self.apply(lifecycle.wake_early(task, now, None)) == [sleeps]
        if sleeps:
            record.held, record.run_at = False, now

    def take(self, draw):
        task_id, node, owner = draw(ids), draw(nodes), draw(st.sampled_from(["", "", "n1", "n2"]))
        record = self.model.get(task_id)
        holds = record is not None and record.status == "pending" and not record.held
        holds = holds and record.owner == owner
        assert self.apply(lifecycle.take(task_id, node, owner)) == [holds]
        if holds:
            record.owner = node

    def free(self, draw):
        task_id, node = draw(ids), draw(nodes)
        record = self.model.get(task_id)
        holds = record is not None and record.status == "pending" and record.owner == node
        assert self.apply(lifecycle.free(task_id, node)) == [holds]
        if holds:
            record.owner = ""

    # --- running

    def start(self, draw):
        """Start a task that may start, as it is now. Keep an earlier read of it for ``start_late``."""
        task_id = draw(st.sampled_from(self.startable()))
        self.seen[task_id] = self.store.get_by_id(task_id)
        self.start_as_read(self.store.get_by_id(task_id), draw(nodes))

    def startable(self):
        return sorted(i for i, r in self.model.items() if r.status == "pending" and not r.held)

    def read(self, draw):
        task_id = draw(ids)
        if task_id in self.model:
            self.seen[task_id] = self.store.get_by_id(task_id)

    def start_late(self, draw):
        """Start a task as it was read before. It does not start if it was started since then."""
        task_id = draw(st.sampled_from(sorted(self.seen)))
        self.start_as_read(self.seen.pop(task_id), draw(nodes))

    def start_as_read(self, task, node):
        self.clock.advance(0.001)
        task_id = task.id
        write = lifecycle.start(task, self.clock.now_ms(), node)
        if task.status is not TaskStatus.PENDING:
            assert write is None
            return
        record = self.model.get(task_id)
        holds = (
            record is not None
            and record.status == "pending"
            and not record.held
            and record.starts == task.starts
        )
        assert self.apply(write) == [holds]
        if holds:
            lifecycle.mark_started([task], [write])
            self.runs.append(task)
            record.starts += 1
            if record.started:
                self.resumed.add((task_id, record.starts))
            record.status, record.owner, record.started = "running", node, True

    def progress(self, draw):
        percent = draw(percents)
        run = self.some_run(draw)
        record = self.alive(run)
        write = lifecycle.progress(run.id, run.starts, percent, f"{percent}")
        assert self.apply(write) == [record is not None]
        if record:
            record.progress, record.message = percent, f"{percent}"

    def conclude(self, draw):
        how, told = draw(endings), draw(st.none() | percents)
        wait = draw(st.sampled_from([0, 0, 5]))
        run = self.some_run(draw)
        returned = how == "returned"
        fired = how in ("timeout", "cancel", "stop", "lease lost")
        ending = lifecycle.Ending(
            returned=returned,
            result='{"n":1}' if returned else None,
            error="" if returned else how,
            permanent=how == "permanent",
            crashed=how == "died",
            delay=wait,
            snooze=wait if how == "snoozed" else None,
            parked=self.park(how, wait),
            reason=CancelReason(how) if fired else None,
            progress=told,
            message="" if told is None else "told",
        )
        held = self.apply(*lifecycle.conclude(run, ending, self.clock.now_ms()))
        record = self.alive(run)
        assert held.count(True) == (record is not None)
        if record:
            self.ended(record, how, None if told is None else (told, "told"), wait)

    def park(self, how, wait):
        if how == "awaits":
            return lifecycle.Park("another", None)
        return lifecycle.Park(None, self.clock.now_ms() + wait * 1000) if how == "sleeps" else None

    def ended(self, record, how, told, wait):
        if how in ("awaits", "sleeps") and not record.cancel_requested:
            record.status, record.owner, record.held = "pending", "", True
            record.awaits = how == "awaits"
            if told is not None:
                record.progress, record.message = told
            if how == "sleeps":
                record.run_at = self.clock.now_ms() + wait * 1000
        elif how == "returned":
            record.end("completed", told)
            record.progress, record.result, record.error = 100, {"n": 1}, ""
        elif how == "cancel":
            record.end("cancelled", told)
        elif how in ("stop", "lease lost"):
            if record.cancel_requested:
                record.end("cancelled", told)
            else:
                record.back("", "interrupted")
                record.interruptions += 1
        elif how == "died":
            self.crashed(record, record.owner, told)
        elif how in ("awaits", "sleeps"):
            record.end("cancelled", told)
        elif how != "snoozed" and (how == "permanent" or record.errors + 1 == record.max_attempts):
            record.end("failed", told)
            record.errors += 1
            record.error = how
            record.dead_letter = True
        elif record.cancel_requested:
            record.end("cancelled", told)
        else:
            self.put_off(record, "snoozed" if how == "snoozed" else "retried", wait)
            if how == "snoozed":
                record.snoozes += 1
            else:
                record.errors += 1
                record.error = how

    def put_off(self, record, outcome, wait):
        record.back("" if wait else record.owner, outcome)
        if wait:
            record.held, record.run_at = True, self.clock.now_ms() + wait * 1000

    def hand_back(self, draw):
        run = self.some_run(draw)
        record = self.alive(run)
        resumed = (run.id, run.starts) in self.resumed
        held = self.apply(*lifecycle.hand_back(run, self.clock.now_ms(), resumed=resumed))
        assert held.count(True) == (record is not None)
        if record and record.cancel_requested:
            record.end("cancelled")
        elif record:
            record.status, record.started = "pending", resumed

    def die(self, draw):
        """Let a node die, and rescue the tasks that it held."""
        node, stopping = draw(nodes), draw(st.booleans())
        owned = self.store.statuses(held_on(self.store, node))
        assert owned == {i: r.status for i, r in self.model.items() if r.owner == node}
        running = [task_id for task_id in owned if owned[task_id] == "running"]
        tasks = list(self.store.get_many(running).values())
        rescues = lifecycle.rescue(tasks, self.clock.now_ms(), stopping=stopping)
        freed = [[lifecycle.free(i, node)] for i in owned if owned[i] == "pending"]
        for alternatives in [*rescues, *freed]:
            assert self.apply(*alternatives).count(True) == 1
        suspects = any(self.model[task_id].last_chance for task_id in running)
        for task_id in owned:
            self.lost(self.model[task_id], suspects, stopping)

    def lost(self, record, suspects, stopping):
        if record.status == "pending":
            record.owner = ""
            return
        culprit = not stopping and (record.last_chance or not suspects)
        if culprit or record.max_crashes == 1:
            self.crashed(record, "")
        elif record.cancel_requested:
            record.end("cancelled")
        else:
            record.back("", "interrupted")
            record.interruptions += 1

    def crashed(self, record, owner, told=None):
        record.crashes += 1
        if record.cancel_requested:
            record.end("cancelled", told)
        elif record.crashes == record.max_crashes:
            record.end("failed", told)
            record.error, record.dead_letter, record.died = "died", True, True
            record.log.append("crashed")
        else:
            record.back(owner, "crashed")

    # --- from outside

    def cancel(self, draw):
        task_id = draw(ids)
        record = self.model.get(task_id)
        pending = record is not None and record.status == "pending"
        asked = record is not None and record.status == "running" and not record.cancel_requested
        held = self.apply(*lifecycle.cancel(task_id, self.clock.now_ms()))
        awaits = pending and record.held and record.awaits
        assert held == [pending and not awaits, awaits, False, asked]  # no task has a stuck thread
        if pending:
            record.end("cancelled")
        elif asked:
            record.cancel_requested = True

    def requeue(self, draw):
        task_id = draw(ids)
        record = self.model.get(task_id)
        if record is None:
            return
        task = self.store.get_by_id(task_id)
        if record.status in ("failed", "cancelled"):
            assert self.apply(lifecycle.requeue(task, self.clock.now_ms())) == [True]
            record.requeue(record.order, self.clock.now_ms())
        else:
            with pytest.raises(InvalidTransition):
                lifecycle.requeue(task, self.clock.now_ms())

    def delete(self, draw):
        task_id = draw(ids)
        record = self.model.get(task_id)
        holds = record is not None and record.status != "running"
        assert self.apply(lifecycle.delete(task_id)) == [holds]
        if holds:
            del self.model[task_id]

    def set_status(self, draw):
        task_id, status = draw(ids), draw(st.sampled_from(list(TaskStatus)))
        record = self.model.get(task_id)
        if record is None:
            with pytest.raises(TaskNotFound):
                self.store.update_status(task_id, status, "by hand")
            return
        same = record.status == status.value
        if not same and (record.status, status.value) not in BY_HAND:
            with pytest.raises(InvalidTransition):
                self.store.update_status(task_id, status, "by hand")
            return
        self.store.update_status(task_id, status, "by hand")
        if not same:
            self.moved_by_hand(record, status.value)
        elif status is TaskStatus.PENDING:  # a start of the record as it was must fail
            record.starts += 1
        record.message = "by hand"

    def moved_by_hand(self, record, status):
        if status == "running":
            record.status, record.started, record.held = "running", True, False
            record.awaits = False
            record.starts += 1
        elif status == "pending" and record.status == "running":
            record.status, record.owner, record.started = "pending", "", False
        elif status == "pending":
            record.requeue(record.order, self.clock.now_ms())
        else:
            record.end(status)
            record.progress = 100 if status == "completed" else record.progress

    # --- invariants after every move

    @invariant()
    def records_match_the_model(self):
        found = self.store.get_many(IDS)
        assert {i: self.as_record(found[i]) for i in found} == {
            i: replace(record, held=False, awaits=False, died=False)
            for i, record in self.model.items()
        }
        for task in found.values():
            assert task.damage == ""
            assert task.attempt == task.errors + 1
            assert (task.completed_at is not None) == task.status.finished

    def as_record(self, task):
        run_at = task.run_at
        return Record(
            priority=task.priority,
            run_at=None if run_at is None else round(run_at.timestamp() * 1000),
            max_attempts=task.max_attempts,
            max_crashes=task.max_crashes,
            order=self.model[task.id].order,
            held=False,
            status=task.status.value,
            owner=task.owner if task.status.value not in FINISHED else "",
            starts=task.starts,
            errors=task.errors,
            crashes=task.crashes,
            interruptions=task.interruptions,
            snoozes=task.snoozes,
            progress=task.progress,
            message=task.message,
            error="died" if "died" in task.error else task.error,
            result=task.result,
            dead_letter=task.dead_letter,
            cancel_requested=task.cancel_requested_at is not None,
            started=task.started_at is not None,
            log=[attempt.outcome for attempt in task.earlier_attempts],
        )

    @invariant()
    def indexes_match_the_records(self):
        records, now = self.model, self.clock.now_ms()
        pending = {i: r for i, r in records.items() if r.status == "pending"}
        for owner in ("", "n1", "n2"):
            ready = [i for i, r in pending.items() if not r.held and r.owner == owner]
            best_first = sorted(ready, key=lambda i: (-records[i].priority, records[i].order))
            assert [stub.id for stub in self.store.ready(["t", "u"], 9, owner)] == best_first
        ready = self.store.get_many([i for i, r in pending.items() if not r.held]).values()
        since = [to_ms(max(task.created_at, task.run_at or task.created_at)) for task in ready]
        assert oldest_ready(self.store) == min(since, default=None)
        held = sorted((r.run_at, i) for i, r in pending.items() if r.held and not r.awaits)
        awaiting = {i for i, r in pending.items() if r.awaits}
        assert {*those_with(self.store, "waiting_on", "another")} == awaiting
        assert earliest_due(self.store) == (held[0][0] if held else None)
        assert sorted(dict(self.store.due(now, 9))) == sorted(
            i for run_at, i in held if run_at <= now
        )
        left = {i: r for i, r in records.items() if r.status not in FINISHED}
        assert set(owners(self.store)) == {r.owner for r in left.values()} - {""}
        for kind in ("t", "u"):
            assert unfinished(self.store, [kind]) == any(
                bool(r.owner) if r.status == "running" else not r.held
                for i, r in left.items()
                if TYPES[i] == kind
            )
        for status in TaskStatus:
            of_status = {i for i, r in records.items() if r.status == status.value}
            filter = TaskFilter(status=status)
            assert {task.id for task in self.store.list(filter)} == of_status
            assert self.store.count(filter) == len(of_status)


def life_on(kind, examples):
    machine = type(f"LifeOn{kind.title()}", (Life,), {"kind": kind})
    machine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=50,
        phases=[Phase.explicit, Phase.generate],  # add Phase.shrink to investigate a failure
        suppress_health_check=list(HealthCheck),
    )
    return pytest.mark.slow(machine.TestCase)


TestMemoryLife = life_on("memory", 100)
TestSQLiteLife = life_on("sqlite", 40)
TestMongoMockLife = life_on("mongomock", 15)
TestMongoLife = pytest.mark.mongo(life_on("mongo", 3))
TestMongoSetLife = pytest.mark.mongo(life_on("mongo-set", 3))
TestAdapterLife = life_on("adapter", 12)
