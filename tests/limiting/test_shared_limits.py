"""Global limits, which all nodes share: in one process, in several, and when one of them dies."""

from __future__ import annotations

import itertools
import random
import threading
from contextlib import suppress
from functools import partial

import pytest
from helpers import (
    PATIENCE,
    eventually,
    frequent_checks,
    joined_node,
    node_of,
    pool_of,
    whole_round,
)
from strikes import strike_at

from taskx import (
    MemoryRepository,
    Queue,
    RepositoryUnavailable,
    SystemClock,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.node.admission import Admission, Asking, OwnBucket
from taskx.node.audit import Audit
from taskx.node.shared_limits import SharedBucket, SharedSlots
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle
from taskx.tasks.rate import NOTHING, Rate, Rates
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.testing import ManualClock

from .test_limits import Crowd, linger, started_by


def nodes(make_queue, count, crowd, worker_num=4, **options):
    """Make started queues on one repository that share a limit."""
    queues = [make_queue(worker_num=worker_num) for _ in range(count)]
    for queue in queues:
        queue.executor("t", limit_scope="global", **options)(crowd)
        queue.executor("other")(lambda: "other")
        queue.start()
    return queues


OF_T = ("type/t",)


def shares(repository, type="t"):
    from taskx.node.shared_limits import _shares_of

    note = repository.notes("limit/slots/").get(f"limit/slots/type/{type}")
    return _shares_of(note.text if note else None)


# Nodes of one process


def test_at_most_max_concurrency_tasks_run_at_once_on_all_nodes(make_queue, gate):
    crowd = Crowd(gate)
    queues = nodes(make_queue, 3, crowd, max_concurrency=4)
    for n in range(30):
        queues[n % 3].submit("t")
    gate.wait_for(4)
    assert sum(queue.running for queue in queues) == 4
    assert queues[0].submit("other").result(PATIENCE) == "other"
    gate.open()
    for queue in queues:
        assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (30, 4)


@pytest.mark.parametrize("most", [1, 3])
def test_many_short_tasks_stay_within_the_global_limit(make_queue, most):
    crowd = Crowd(linger)
    queues = nodes(make_queue, 3, crowd, max_concurrency=most)
    for n in range(120):
        queues[n % 3].submit("t")
    for queue in queues:
        assert queue.drain(PATIENCE)
    assert crowd.total == 120
    assert crowd.most <= most


@pytest.mark.timing(recover_every=3600)
def test_a_node_with_nothing_to_run_keeps_no_slots(make_queue, repository):
    """It gives back all slots at once, without waiting for a periodic check."""
    queues = nodes(make_queue, 2, Crowd(), max_concurrency=2)
    for _ in range(10):
        queues[0].submit("t")
    assert queues[0].drain(PATIENCE)
    eventually(lambda: shares(repository) == {})


@pytest.fixture
def idle_engine(make_queue):
    """The worker pool of a node that is not alone, and fetches only when the test calls it."""
    queue = make_queue(worker_num=1)
    queue.executor("t", max_concurrency=1, limit_scope="global")(lambda: None)
    node = joined_node(queue)
    node.pool.fetcher.alone = False
    yield node.pool
    node.pool.admission.end()


def just_before(monkeypatch, repository, name, happens):
    """Call ``happens`` once, before a method of the repository runs."""
    method = getattr(repository, name)

    def call(*args, **options):
        monkeypatch.undo()
        happens()
        return method(*args, **options)

    monkeypatch.setattr(repository, name, call)


def test_a_task_that_ends_during_a_fetch_from_other_nodes_is_noticed(
    idle_engine, repository, monkeypatch
):
    """Its slot is then free for the next task, or must be given back."""
    just_before(monkeypatch, repository, "distinct", idle_engine.agenda.fetch_soon)
    idle_engine.fetcher.refill()
    assert idle_engine.agenda.more_stored
    idle_engine.fetcher.refill()
    assert not idle_engine.agenda.more_stored


def test_a_node_that_loses_the_last_task_to_another_one_gives_back_its_slot(
    idle_engine, make_queue, repository, monkeypatch
):
    """It does so at its next fetch, which follows at once."""
    submitter = make_queue()
    submitter.declare("t")
    task_id = submitter.submit("t").id
    assert idle_engine.admission.admit({OF_T: [Asking("before")]}) == {"before"}
    idle_engine.admission.over("before", ran=True)

    def another_takes_it():
        assert repository.apply([lifecycle.take(task_id, "another")]) == [True]

    just_before(monkeypatch, repository, "apply", another_takes_it)
    idle_engine.fetcher.refill()
    assert shares(repository) == {idle_engine.node.id: 1}
    assert idle_engine.agenda.more_stored
    idle_engine.fetcher.refill()
    assert shares(repository) == {}


def test_a_stopped_node_gives_back_its_slots(make_queue, repository, gate):
    queue = make_queue(worker_num=2)
    queue.executor("t", max_concurrency=2, limit_scope="global")(lambda: gate())
    queue.start()
    queue.submit("t")
    gate.wait_for(1)
    assert sum(shares(repository).values()) >= 1
    gate.open()
    queue.stop(PATIENCE)
    assert shares(repository) == {}


@pytest.mark.parametrize("when", ["start", "hand back"])
def test_no_task_is_lost_if_its_token_cannot_be_put_back(make_queue, repository, monkeypatch, when):
    """The repository fails in the middle of the start, or of handing back."""
    queue = make_queue(worker_num=1)
    queue.executor("t", max_concurrency=50, rate="100/s", limit_scope="global")(lambda: None)
    handles = [queue.submit("t") for _ in range(5)]
    node = joined_node(queue)
    pool = node.pool
    pool.fetcher.refill()
    items = pool.buffer.take(5)

    def away(*args):
        monkeypatch.setattr(repository, "put_note", away)
        raise RepositoryUnavailable("away")

    if when == "start":
        repository.before = away
        with pytest.raises(RepositoryUnavailable):
            pool.start(items, "worker")
    else:
        pool.start(items, "worker")
        runs = list(pool.runs.values())
        repository.before = away
        monkeypatch.setattr(repository, "put_note", away)
        with pytest.raises(RepositoryUnavailable):
            pool.starter.hand_back(runs)
    assert (pool.runs, pool.admission.admitted) == ({}, {})
    repository.before = lambda writes: None
    monkeypatch.undo()
    audit = Audit(node.pool)
    audit.check()
    audit.check()
    assert {handle.task().status for handle in handles} == {TaskStatus.PENDING}


def test_idle_slots_are_given_back(make_queue, repository, gate):
    """All workers of the node are busy with other tasks. Another node can use its slots."""
    queue = make_queue(worker_num=1)
    queue.executor("t", max_concurrency=1, limit_scope="global")(lambda: None)
    queue.executor("hold")(lambda: gate())
    queue.submit("hold")
    queue.start()
    gate.wait_for(1)
    assert pool_of(queue).admission.admit({OF_T: [Asking("x")]}) == {"x"}
    assert shares(repository) == {node_of(queue).record.id: 1}
    pool_of(queue).admission.over("x", ran=True)
    crowd = Crowd()
    [other] = nodes(make_queue, 1, crowd, max_concurrency=1)
    other.submit("t").result(PATIENCE)


@pytest.mark.every_store
def test_all_nodes_share_a_global_rate(make_queue, clock):
    queues = [make_queue(worker_num=2, clock=clock) for _ in range(3)]
    ran = []
    for queue in queues:
        queue.ran = ran
        queue.executor("t", rate="60/m", burst=5, limit_scope="global")(lambda: ran.append(1))
        queue.start()
    for n in range(20):
        queues[n % 3].submit("t")
    assert started_by(queues[0], 5, *queues[1:]) == 5
    clock.advance(3)
    assert started_by(queues[0], 8, *queues[1:]) == 8
    clock.advance(3600)
    assert started_by(queues[0], 13, *queues[1:]) == 13


@pytest.mark.every_store
def test_a_global_rate_survives_a_restart(make_queue, clock):
    """The bucket of one node is full when the node starts; the global one is as it was left."""
    ran = []
    for expected in (2, 2, 4):
        queue = make_queue(worker_num=1, clock=clock)
        queue.ran = ran
        queue.executor("t", rate="2/h", limit_scope="global")(lambda: ran.append(1))
        queue.start()
        for _ in range(3):
            queue.submit("t")
        assert started_by(queue, expected) == expected
        queue.stop(PATIENCE)
        if expected == 2 and queue.list_tasks()[1] > 3:
            clock.advance(3600)


@pytest.mark.timing(recover_every=3600)  # each look for idle slots may give some back
def test_a_busy_type_writes_no_note_for_each_task(make_queue, repository, monkeypatch):
    """Its node keeps its slots from task to task."""
    puts, put = [], repository.put_note
    monkeypatch.setattr(repository, "put_note", lambda *note: (puts.append(note), put(*note))[1])
    queue = make_queue(worker_num=2)
    queue.executor("t", max_concurrency=2, limit_scope="global")(lambda: None)
    for _ in range(200):
        queue.submit("t")
    queue.start()
    assert queue.drain(3 * PATIENCE)
    assert 1 <= len(puts) <= 20


@pytest.mark.parametrize("limit", [{"max_concurrency": 1}, {"rate": "1/h"}])
def test_a_node_notices_at_its_next_poll_what_another_one_gave_back(limit):
    """It does not wait for a slower check. In memory, each poll finds a change."""
    with Queue(MemoryRepository(), timing=Timing(recover_every=3600)) as queue:
        queue.executor("t", limit_scope="global", **limit)(lambda: "done")
        whole_round(queue)  # the first round finds dead nodes, and "another" is no node
        first = Admission(
            queue._registry.limits,
            queue._registry.limited,
            queue.repository,
            "another",
            SystemClock(),
            freed=lambda: None,
            scheduled=lambda: None,
        )
        assert first.admit({OF_T: [Asking("x")]}) == {"x"}
        handle = queue.submit("t")
        eventually(lambda: not pool_of(queue).agenda.more_stored)
        assert handle.task().status is TaskStatus.PENDING
        first.over("x", ran=False)
        first.end()
        assert handle.result(PATIENCE) == "done"


def test_a_node_that_lost_its_lease_reads_the_note_before_it_starts_more(idle_engine, repository):
    """Other nodes may have taken its slots."""
    admission = idle_engine.admission
    assert admission.admit({OF_T: [Asking("x")]}) == {"x"}
    admission.over("x", ran=True)  # it keeps its slot
    [(name, note)] = repository.notes("limit/slots/").items()
    assert repository.put_note(name, '{"another": 1}', note.version)
    idle_engine.lose_lease()
    assert admission.admit({OF_T: [Asking("y")]}) == set()


# Slots and buckets by themselves


class Quarrel(MemoryRepository):
    """A repository in which another node changes a note before every second change, at random."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: set[str] = set()
        self.chance = random.Random(1)
        self.liveness.nodes = self.nodes

    def put_note(self, name, text, version):
        note = self.notes(name).get(name)
        if note and version and self.chance.random() < 0.5:
            assert super().put_note(name, note.text, note.version)
        return super().put_note(name, text, version)

    def nodes(self):
        return [Node(id=n, name=n, alive=n not in self.dead) for n in "abc"]


def test_all_nodes_together_never_take_more_slots_than_exist():
    """Takes, gives, rests, maintenance, conflicts and deaths happen in a random order, with a seed."""
    for seed in range(40):
        chance, repository = random.Random(seed), Quarrel()
        most = chance.randrange(1, 5)
        slots = {n: SharedSlots(repository, n, "type/t", most) for n in "abc"}
        taken = dict.fromkeys("abc", 0)
        full = 0
        for _ in range(200):
            name = chance.choice([n for n in "abc" if n not in repository.dead])
            move = chance.randrange(7)
            if move <= 2:
                slots[name].forget()
                taken[name] += slots[name].take(chance.randrange(1, 4))
            elif move == 3 and taken[name]:
                slots[name].give(1)
                taken[name] -= 1
            elif move == 4:
                slots[name].rest(chance.randrange(2))
            elif move == 5:
                slots[name].tend()
            elif move == 6 and len(repository.dead) < 2 and chance.random() < 0.1:
                repository.dead.add(name)
                taken[name] = 0  # its process has ended, and so have its tasks
            assert sum(taken.values()) <= most
            full += sum(taken.values()) == most
        assert full, "the slots were never all taken"


@pytest.mark.parametrize(
    ("what", "args"), [("free", ()), ("take", (1,)), ("rest", (0,)), ("tend", ()), ("leave", ())]
)
def test_an_interrupted_node_takes_no_slot_from_another_one(what, args):
    """A node never has the version of a note without its value."""
    for point in itertools.count():
        repository = Quarrel()
        repository.chance.random = lambda: 1.0  # no conflicts
        mine, others, dead = (SharedSlots(repository, node, "type/t", 3) for node in "abc")
        mine.take(1)
        mine.give(1)
        mine.tend()  # slots that are idle from now on are given back at the next tend()
        dead.take(1)
        repository.dead.add("c")
        others.take(1)
        mine.forget()
        struck = strike_at(point, partial(getattr(mine, what), *args))
        mine.take(3)
        assert shares(repository)["b"] == 1, struck
        if struck is None:
            break


@pytest.mark.parametrize(("what", "args"), [("tokens", ()), ("take", ([NOTHING],))])
def test_an_interrupted_node_takes_no_token_twice(clock, what, args):
    for point in itertools.count():
        repository, rate = MemoryRepository(), Rates([Rate(4, 3600.0, 4)])
        mine, others = (SharedBucket(repository, "type/t", rate, clock) for _ in range(2))
        assert mine.take([NOTHING] * 2) == 2
        assert others.take([NOTHING] * 1) == 1
        mine.forget()
        struck = strike_at(point, partial(getattr(mine, what), *args))
        assert mine.take([NOTHING] * 4) <= 1, struck
        if struck is None:
            break


def test_slots_unused_between_two_rounds_are_given_back():
    """This covers a node without fetches, which would otherwise show that no task needs the slot."""
    repository = Quarrel()
    slots = SharedSlots(repository, "a", "type/t", 3)
    slots.take(2)
    slots.give(1)
    slots.tend()
    assert shares(repository) == {"a": 2}
    slots.tend()
    assert shares(repository) == {"a": 1}
    slots.take(1)
    slots.give(1)
    slots.tend()
    assert shares(repository) == {"a": 2}  # it was in use in the meantime


def test_the_slots_of_a_dead_node_are_free(clock):
    repository = Quarrel()
    first, second = (SharedSlots(repository, name, "type/t", 3) for name in "ab")
    assert first.take(2) == 2
    assert second.take(3) == 1
    repository.dead.add("a")
    assert second.free() == 0
    second.tend()
    assert (second.free(), second.take(3)) == (2, 2)


def test_a_node_that_may_be_alive_keeps_its_slots():
    repository = Quarrel()
    repository.liveness.nodes = lambda: [
        Node(id="a", name="a", alive=None),
        Node(id="b", name="b", alive=True),
    ]
    first, second = (SharedSlots(repository, name, "type/t", 3) for name in "ab")
    first.take(3)
    for _ in range(20):  # even if no other change comes in between
        second.tend()
    assert shares(repository) == {"a": 3}
    assert second.take(1) == 0


def test_a_node_wrongly_declared_dead_reads_the_note_again():
    """Another node removed its slots from the note. So it reads the note before it takes a slot again."""
    repository = Quarrel()
    first, second = (SharedSlots(repository, name, "type/t", 2) for name in "ab")
    assert first.take(1) == 1
    repository.dead.add("a")
    second.take(1)
    second.tend()
    assert second.take(1) == 1
    first.forget()  # as when a lease is lost
    assert first.take(1) == 0


def test_a_slot_is_given_back_if_the_rate_cannot_be_read(make_queue, repository):
    """The repository fails between the two limits."""
    queue = make_queue()
    both = {"max_concurrency": 1, "rate": "9/s", "limit_scope": "global"}
    queue.executor("t", **both)(lambda: None)
    admission, put = joined_node(queue).pool.admission, repository.put_note

    def fail(name, *note):
        if "rate" in name:
            raise RepositoryUnavailable("down for a moment")
        return put(name, *note)

    repository.put_note = fail
    with pytest.raises(RepositoryUnavailable):
        admission.admit({OF_T: [Asking("x")]})
    repository.put_note = put
    assert admission.admit({OF_T: [Asking("x")]}) == {"x"}


def test_a_change_in_doubt_is_read_back():
    repository = Quarrel()
    slots = SharedSlots(repository, "a", "type/t", 3)
    slots.take(1)
    put = repository.put_note

    def lost(*note):
        put(*note)
        raise RepositoryUnavailable("the answer was lost")

    repository.put_note = lost
    with pytest.raises(RepositoryUnavailable):
        slots.take(2)
    repository.put_note = put
    assert slots.free() == 2
    assert slots.take(2) == 2


class Skewed(ManualClock):
    """Another host's clock, which is some seconds ahead or behind."""

    def __init__(self, clock, seconds):
        super().__init__()
        self._clock, self._seconds = clock, seconds

    def now_ms(self):
        return self._clock.now_ms() + int(self._seconds * 1000)

    def monotonic(self):
        return self._clock.monotonic() + 12345.0 * (1 + abs(self._seconds))


@pytest.mark.parametrize("skew", [0, 0.5, 3600, 1e8])
def test_in_any_interval_all_nodes_take_at_most_burst_plus_rate_times_time(skew):
    """This holds for any clocks, except for one burst when a clock that is ahead comes in."""
    for seed in range(10):
        chance, repository, clock = random.Random(seed), Quarrel(), ManualClock()
        rate = Rate(chance.randrange(1, 5), chance.choice([1.0, 7.0]), chance.randrange(1, 6))
        buckets = [
            SharedBucket(repository, "type/t", Rates([rate]), Skewed(clock, apart))
            for apart in (-skew, 0, skew)
        ]
        taken: list[tuple[float, int]] = []
        unused = []
        for _ in range(300):
            clock.advance(chance.choice([0, 0, 0.1, 1]))
            bucket = chance.choice(buckets)
            if chance.random() < 0.7:
                bucket.forget()
            at = bucket._clock.monotonic()
            got = bucket.take([NOTHING] * chance.randrange(1, 4))
            if got and chance.random() < 0.1:
                unused.append((bucket, at))
                got -= 1
            if unused and chance.random() < 0.3:
                bucket, at = unused.pop(chance.randrange(len(unused)))
                bucket.put_back(NOTHING, at)
            taken.append((clock.monotonic(), got))
        grace = rate.burst * 2 if skew else 0
        for first in range(0, len(taken), 7):
            total = 0
            for moment, got in taken[first:]:
                total += got
                allowed = rate.burst + (moment - taken[first][0] + 0.01) / rate.interval
                assert total <= allowed + grace
        whole = (taken[-1][0] - taken[0][0]) / rate.interval
        assert sum(got for _, got in taken) >= whole / 3  # and they make progress


@pytest.fixture(params=["own", "shared"])
def bucket(request, clock):
    """A bucket of two tokens that fills up in 20 seconds."""
    rate = Rates([Rate(1, 10.0, 2)])
    if request.param == "own":
        return OwnBucket(rate, clock)
    return SharedBucket(Quarrel(), "type/t", rate, clock)


def test_a_token_that_is_put_back_late_is_none_that_time_has_brought_already(clock, bucket):
    at = clock.monotonic()
    assert bucket.take([NOTHING] * 1) == 1
    clock.advance(20)  # the bucket is full again
    assert bucket.take([NOTHING] * 1) == 1
    bucket.put_back(NOTHING, at)
    assert bucket.take([NOTHING] * 2) == 1


def test_a_token_that_is_put_back_soon_can_be_taken_again(clock, bucket):
    at = clock.monotonic()
    assert bucket.take([NOTHING] * 2) == 2
    bucket.put_back(NOTHING, at)
    assert bucket.take([NOTHING] * 2) == 1


def test_of_a_token_that_is_put_back_a_part_may_have_come_with_time(clock, bucket):
    at = clock.monotonic()
    assert bucket.take([NOTHING]) == 1
    clock.advance(4)
    assert bucket.take([NOTHING]) == 1
    bucket.put_back(NOTHING, at)
    assert bucket.take([NOTHING] * 2) == 1
    clock.advance(6)
    assert bucket.take([NOTHING] * 2) == 0
    clock.advance(4)
    assert bucket.take([NOTHING] * 2) == 1


def test_a_clock_set_back_a_year_does_not_stop_the_rate(clock):
    repository, rate = Quarrel(), Rates([Rate(1, 10.0, 2)])
    bucket = SharedBucket(repository, "type/t", rate, clock)
    assert bucket.take([NOTHING] * 5) == 2
    clock.set_wall(clock.now().replace(year=2023))
    for _ in range(5):
        bucket.forget()
        assert bucket.take([NOTHING] * 5) == 0
        clock.advance(10)
        assert bucket.tokens() == (1,)
        assert bucket.take([NOTHING] * 5) == 1


# Several processes

WORK = """
@queue.executor("work", max_concurrency=3, limit_scope="global", max_crashes=100)
def work(ctx, n, seconds=0.0):
    note("begin", n, os.getpid())
    ctx.sleep(seconds)
    note("end", n, os.getpid())
"""


def at_once(log, dead=()):
    """Return the most tasks that ran at once, without those of processes that were killed."""
    now, most = 0, 0
    for event, _, who in log:
        if int(who) not in dead:
            now += 1 if event == "begin" else -1
            most = max(most, now)
    return most


def test_processes_share_a_global_limit(workers):
    """Three processes with four workers each run at most three tasks at once."""
    repository = workers.repository
    queue = Queue(repository)
    queue.declare("work")
    children = workers.start(WORK, 3)
    params = [{"n": n, "seconds": 0.02} for n in range(60)]
    queue.submit_many(Task(type="work", params=some) for some in params)
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 60)
    assert at_once(workers.log()) <= 3
    for child in children:
        child.tell()
        child.ends()
    eventually(lambda: shares(repository, "work") == {})


def test_the_slots_of_a_killed_process_are_free_for_others(workers):
    """It had all slots, and its node is found dead."""
    repository = workers.repository
    queue = Queue(repository)
    queue.declare("work")
    for n in range(3):
        queue.submit("work", {"n": n, "seconds": 600.0}, id=str(n))
    [child] = workers.start(WORK)
    eventually(lambda: repository.count(TaskFilter(status=TaskStatus.RUNNING)) == 3)
    [other] = workers.start(WORK)
    for n in range(3, 9):
        queue.submit("work", {"n": n}, priority=9)
    never = threading.Event()
    assert not never.wait(2 * DEFAULT_TIMING.recover_every)  # blocks on purpose: two checks
    assert repository.count(TaskFilter(status="completed")) == 0
    child.kill()
    for n in range(3):  # else they might take all slots again
        queue.cancel_task(str(n))
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 6)
    assert at_once(workers.log(), dead={child.process.pid}) <= 3
    other.tell()
    other.ends()


# Damaged notes


NO_SHARES = [
    "{",
    "[]",
    "7",
    '{"a": "x"}',
    '{"a": -1}',
    '{"a": 1.5}',
    '{"a": true}',
    "[" * 100_000,
    "",
]
NO_MARKS = [
    "[]",
    "{",
    "soon",
    "nan",
    "1e9",
    "[NaN]",
    "[1e300]",
    "[-1e300]",
    '["x"]',
    "[true]",
    "9" * 5000,
    "",
]


@pytest.mark.every_store
@pytest.mark.parametrize(
    ("name", "texts", "limit"),
    [
        ("limit/slots/type/t", NO_SHARES, {"max_concurrency": 2}),
        ("limit/rate/type/t", NO_MARKS, {"rate": "2/h"}),
    ],
    ids=["slots", "rate"],
)
def test_a_damaged_note_is_replaced(make_queue, repository, caplog, name, texts, limit):
    """The note is damaged before the queue starts. One warning is logged, and the limit holds again."""
    for text in texts:
        assert repository.put_note(name, text, 0)
        queue = make_queue(worker_num=4)
        queue.executor("t", limit_scope="global", **limit)(lambda: "done")
        queue.executor("other")(lambda: "other")
        caplog.clear()
        queue.start()
        assert queue.submit("other").result(PATIENCE) == "other"
        handles = [queue.submit("t") for _ in range(3)]
        runs = 2 if "rate" in limit else 3
        eventually(lambda: sum(handle.done() for handle in handles) == runs)  # noqa: B023
        left = [handle for handle in handles if not handle.done()]  # any: workers run side by side
        assert [handle.result(PATIENCE) for handle in handles if handle.done()] == ["done"] * runs
        for handle in left:
            assert handle.task().status is TaskStatus.PENDING
            handle.cancel()
        assert queue.drain(PATIENCE)
        queue.stop(PATIENCE)
        assert caplog.text.count(f"note {name} is damaged and is replaced") == (text != "")
        assert [r for r in caplog.records if r.levelname == "ERROR" or "fails" in r.msg] == []
        note = repository.notes(name).get(name)
        assert note is None or repository.put_note(name, None, note.version)


@frequent_checks
def test_running_tasks_are_counted_again_after_the_note_was_damaged(make_queue, repository, gate):
    """Otherwise another node would start as many tasks again."""
    crowd = Crowd(gate)
    first, second = nodes(make_queue, 2, crowd, max_concurrency=2)
    for _ in range(2):
        first.submit("t")
    gate.wait_for(2)
    name = "limit/slots/type/t"
    running = sum(shares(repository).values())
    assert running == 2
    eventually(lambda: damage(repository, name, "{"))

    def counted():  # for a moment the note may be gone
        with suppress(ValueError):
            return sum(shares(repository).values()) == 2

    eventually(counted)
    second.submit("t")
    gate.open()
    assert first.drain(PATIENCE)
    assert second.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (3, 2)


def damage(repository, name, text):
    """Overwrite a note; return its new version, or False if it was changed in the meantime."""
    version = repository.notes(name)[name].version
    return repository.put_note(name, text, version) and version + 1


def test_slots_in_use_are_recorded_again_if_others_removed_them():
    repository = MemoryRepository()
    slots = SharedSlots(repository, "a", "type/t", 2)
    assert slots.take(2) == 2
    version = repository.notes("limit/slots/type/t")["limit/slots/type/t"].version
    assert repository.put_note("limit/slots/type/t", None, version)
    slots.tend()
    assert shares(repository) == {"a": 2}
    assert SharedSlots(repository, "b", "type/t", 2).take(1) == 0
