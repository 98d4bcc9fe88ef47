"""Keys that share the workers: turns go round by key, each key gets its part, and one alone gets all."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, eventually
from strikes import every_strike

from taskx import ConfigurationError, MemoryRepository, Queue
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending
from taskx.testing import ManualClock, ManualQueue

pytestmark = pytest.mark.timing(audit_every=0.05, recover_every=0.05)


#: Every how many points a strike comes; each one was struck by hand.
STEP = 17


class Site:
    """The workers of one node in virtual time: each task takes as long as its params say."""

    def __init__(self, plant: Plant, number: int, workers: int):
        self.plant, self.workers = plant, workers
        self.node = Node(id=f"n{number}", name=f"n{number}", types=("t",), workers=workers)
        self.runs, self.stopping = {}, False
        self.taker, self.taken = self.node.id, []
        self.closed = set()  # the types that may not start
        self.queue = Queue(plant.repository, clock=plant.clock)
        self.queue.declare("t", "u")
        plant.limit(self.queue)
        self.moves = self.queue._moves
        self.moves.serve(self)

    def may_start(self, type, key):
        return type not in self.closed

    def holds(self, task_id):
        return any(stub.id == task_id for stub in self.taken)

    def take_in(self, stub):
        if not (stub.id in self.runs or self.holds(stub.id)):
            self.taken.append(stub)

    def discard(self, task_ids):
        pass

    def work(self):
        """Start tasks, the best first, as long as there are workers and tasks."""
        while len(self.runs) < self.workers:
            self.moves.turns.share_out()
            types = {"t", "u"} - self.closed
            stubs = [*self.taken, *self.plant.repository.ready(types, 1)]
            if not stubs:
                return
            stub = min(stubs, key=lambda one: (one.created_at, one.id))
            self.taken = [one for one in self.taken if one is not stub]
            task = self.plant.repository.get_by_id(stub.id)
            start = lifecycle.start(task, self.plant.clock.now_ms(), self.node.id)
            assert all(self.moves.commit([start], {task.id: task}))
            task = self.plant.repository.get_by_id(stub.id)
            self.runs[task.id] = SimpleNamespace(task=task, state="executing")
            self.plant.clock.call_later(task.params["seconds"], partial(self._end, task))

    def _end(self, task):
        clock, key = self.plant.clock, task.concurrency_key
        self.runs[task.id].state = "concluding"
        writes = lifecycle.conclude(task, Ending(returned=True), clock.now_ms())
        passed = () if key is None else self.moves.turns.next_turn(key, task.id)
        self.moves.commit([*writes, *passed], {task.id: task})
        del self.runs[task.id]
        self.plant.done[key].append(clock.monotonic() - self.plant.began)
        self.plant.work()


class Plant:
    """Some nodes with workers, on one repository, in virtual time."""

    def __init__(self, *workers, **shares):
        self.clock = ManualClock()
        self.repository = MemoryRepository(clock=self.clock)
        self.shares = {"k:": {"share": True}, **shares}
        #: The times at which the tasks of each key have ended.
        self.done = defaultdict(list)
        self.began = self.clock.monotonic()
        self.sites = [Site(self, number, n) for number, n in enumerate(workers)]
        self.repository.nodes = lambda: [site.node for site in self.sites]

    def limit(self, queue):
        for name, options in self.shares.items():
            queue.limit(name, **options)

    def submit(self, key, number, seconds=0.01, type="t"):
        self.store(key, number, seconds, type)
        self.work()

    def store(self, key, number, seconds=0.01, type="t"):
        """Submit tasks while no worker looks for some."""
        sites, self.sites[0].stopping = self.sites, True
        for _ in range(number):
            sites[0].queue.submit(type, {"seconds": seconds}, key=key)
        sites[0].stopping = False

    def work(self):
        for site in self.sites:
            site.work()

    def run(self, seconds):
        """Let time pass; return how many tasks of each key have ended in it."""
        before = Counter({key: len(some) for key, some in self.done.items()})
        self.clock.advance(seconds)
        return Counter({key: len(some) for key, some in self.done.items()}) - before

    @property
    def running(self):
        keys = (run.task.concurrency_key for site in self.sites for run in site.runs.values())
        return Counter(keys)


def test_each_key_gets_its_part_however_much_another_one_has_submitted():
    """Each of the ten ends within 1.3 times its fair time; they are younger than all tasks of the first."""
    plant = Plant(4, 4)
    plant.submit("k:a", 800)
    plant.run(0.2)
    others = [f"k:{n}" for n in range(10)]
    for key in others:
        plant.submit(key, 40)
    plant.run(2)
    began, fair = 0.2, 40 * 11 * 0.01 / 8
    assert all(len(plant.done[key]) == 40 for key in others)
    assert max(plant.done[key][-1] for key in others) - began <= 1.1 * fair
    assert sum(t > began for t in plant.done["k:a"] if t <= began + fair) >= 36


def test_a_key_that_is_alone_has_all_workers():
    plant = Plant(4, 4)
    plant.submit("k:a", 300)
    for _ in range(20):
        assert plant.running["k:a"] == 8
        plant.run(0.01)
    assert len(plant.done["k:a"]) == 160


@pytest.mark.parametrize("workers", [(1,), (2,), (4, 4), (3, 5), (16,)])
def test_weights_are_kept(workers):
    """Whether there are fewer workers than keys, or more."""
    plant = Plant(*workers, **{"k:a": {"share": 3}})
    for key in ("k:a", "k:b"):
        plant.submit(key, 600)
    done = plant.run(3 if workers == (1,) else 0.3)
    assert done["k:a"] / done["k:b"] == pytest.approx(3, rel=0.1)
    assert done.total() >= sum(workers) * (300 if workers == (1,) else 30) - 16


def test_large_weights_come_in_small_portions():
    plant = Plant(1, **{"k:a": {"share": 50}, "k:b": {"share": 30}, "k:c": {"share": 20}})
    for key in ("k:c", "k:b", "k:a"):
        plant.submit(key, 50)
    assert plant.run(0.1) == {"k:a": 5, "k:b": 3, "k:c": 2}


def test_with_more_keys_than_workers_no_key_comes_twice_before_another():
    """The first keys have older tasks: by age, they would have all workers."""
    plant = Plant(2, 2)
    for n in range(60):
        plant.store(f"k:{n:02}", 3)
    plant.work()
    for _ in range(40):
        plant.run(0.01)
        numbers = [len(plant.done[f"k:{n:02}"]) for n in range(60)]
        assert max(numbers) - min(numbers) <= 1


def test_the_workers_are_divided_if_the_tasks_of_a_key_are_longer():
    plant = Plant(4, 4)
    plant.submit("k:short", 400)
    plant.submit("k:long", 50, seconds=1)
    plant.run(0.1)
    for _ in range(15):
        plant.run(0.05)
        assert plant.running == {"k:short": 4, "k:long": 4}


def test_a_newcomer_waits_for_the_first_end_of_a_task_only():
    plant = Plant(4)
    for n in range(40):
        plant.submit("k:long", 1, seconds=10 + n)
    plant.submit("k:new", 3)
    plant.run(10.005)
    assert plant.running["k:new"] == 1
    plant.run(1)
    assert len(plant.done["k:new"]) == 3


def test_all_keys_with_a_share_divide_the_workers_whatever_is_between_them():
    limits = {"m:": {"concurrency": 1}, "m:n:": {"share": 2}, "k:own": {"concurrency": 1}}
    plant = Plant(4, **limits, **{"z:one": {"share": 1}})
    others = ["j", "k9", "k9\uffff", "k:own", "l:", "m:m", "m:o", "z:on", "z:onf", "\U0010ffff"]
    keys = ["k:", "k:a", "k:\U0010ffff", "m:n:", "m:n:a", "z:one"]
    for key in (*others, *keys):
        plant.store(key, 30)
    shared, turns = Counter(), plant.sites[0].moves.turns
    names = [turn for key in keys for turn in lifecycle.turns_of(key, 10)]
    for _ in range(20):
        assert turns.share_out()
        found = plant.repository.find("turn", names, ("turn", "id"))
        shared.update(lifecycle.key_of(turn) for turn, _ in found)
        assert len(found) == 4
        plant.repository.apply([w for _, task_id in found for w in lifecycle.cancel(task_id, 0)])
        plant.sites[0].taken.clear()
    fair = {key: 20 if key.startswith("m:") else 10 for key in keys}
    assert dict(shared) == pytest.approx(fair, abs=1)


def test_a_key_that_has_rested_gets_no_more_than_its_part():
    plant = Plant(1)
    plant.submit("k:a", 200)
    plant.run(1)
    plant.submit("k:b", 50)
    done = plant.run(0.2)
    assert abs(done["k:a"] - done["k:b"]) <= 2


def test_a_worker_is_free_for_whoever_has_tasks():
    """A key that may have one task at a time leaves the rest of its part to the others."""
    plant = Plant(8, **{"k:one": {"share": 7, "concurrency": 1}})
    plant.submit("k:one", 50)
    plant.submit("k:a", 200)
    plant.run(0.1)
    assert plant.running == {"k:one": 1, "k:a": 7}


def test_a_type_that_may_not_start_holds_up_nobody():
    plant = Plant(2, 2)
    for site in plant.sites:
        site.closed.add("u")
    for n in range(30):
        plant.submit(f"k:{n}", 2, type="u")
    plant.submit("k:t", 100)
    plant.submit("k:29", 1)  # behind those of its key that wait
    assert plant.run(0.1)["k:t"] >= 36
    plant.sites[0].closed.clear()
    plant.work()
    plant.run(1)
    assert sum(map(len, plant.done.values())) == 161


def test_tasks_without_a_key_start_by_age_beside_the_others():
    plant = Plant(4)
    plant.submit("k:a", 20)
    plant.store(None, 20)
    plant.submit("k:b", 20)
    plant.run(0.2)
    assert {key: len(some) for key, some in plant.done.items()} == {"k:a": 20, "k:b": 20, None: 20}


# --- with threads, and on all stores


@pytest.mark.every_store
def test_a_key_that_comes_later_gets_its_part_on_several_nodes(make_queue):
    """The second key is behind 20 tasks by age. Each node has two workers, and every second turn is its."""
    order, ends = [], threading.Semaphore(0)

    def work(ctx):
        order.append(ctx.task.concurrency_key)
        assert ends.acquire(timeout=PATIENCE)

    queues = [make_queue(worker_num=2) for _ in range(2)]
    for queue in queues:
        queue.limit("k:", share=True)
        queue.executor("t")(work)
    for key in ("k:a", "k:b"):
        for _ in range(20 if key == "k:a" else 6):
            queues[0].submit("t", key=key)
    for queue in queues:
        queue.start()
    for begun in range(4, 16):  # a task ends when all workers are busy
        eventually(lambda begun=begun: len(order) == begun)
        ends.release()
    eventually(lambda: len(order) == 16)
    # The first node may have started four before the second key had a turn.
    assert order.count("k:b") >= 5
    ends.release(26)
    for queue in queues:
        assert queue.drain(PATIENCE)
    assert Counter(order) == {"k:a": 20, "k:b": 6}


@pytest.mark.every_store
def test_shares_respect_the_other_limits_of_a_key(make_queue, gate):
    now, most, lock = Counter(), Counter(), threading.Lock()

    def work(ctx):
        key = ctx.task.concurrency_key
        with lock:
            now[key] += 1
            most[key] = max(most[key], now[key])
        gate()
        with lock:
            now[key] -= 1

    queues = [make_queue(worker_num=4) for _ in range(2)]
    for queue in queues:
        queue.limit("k:", share=True, concurrency=2)
        queue.limit("k:rated", share=3, rate="2/h")
        queue.executor("t")(work)
        queue.start()
    handles = [queues[n % 2].submit("t", key=f"k:{n % 3}") for n in range(12)]
    rated = [queues[0].submit("t", key="k:rated") for _ in range(4)]
    gate.wait_for(8)
    gate.open()
    for handle in handles:
        handle.result(timeout=PATIENCE)
    eventually(lambda: sum(handle.done() for handle in rated) == 2)
    assert most == {"k:0": 2, "k:1": 2, "k:2": 2, "k:rated": 2}


def test_a_program_that_only_submits_leaves_the_turns_to_the_nodes(make_queue):
    queue, submitter = make_queue(worker_num=2), make_queue()
    queue.limit("k:", share=True)
    queue.executor("t")(lambda: None)
    queue.start()
    submitter.declare("t")
    handles = [submitter.submit("t", key=f"k:{n}") for n in range(5)]
    for handle in handles:
        handle.result(timeout=PATIENCE)
    assert [handle.done() for handle in handles] == [True] * 5


def test_no_turn_is_given_before_there_are_workers(queue):
    queue.limit("k:", share=True)
    queue.declare("t")
    ids = [queue.submit("t", key="k:a").id for _ in range(3)]
    assert queue.repository.find("id", ids, ("turn",)) == [(None,)] * 3
    reason = queue.why(ids[0])[0]
    assert reason.facts["share"] == 1
    assert "the workers are divided between such keys (its weight is 1)" in str(reason)


def test_shares_are_changed_while_queues_run(make_queue, gate):
    queue = make_queue(worker_num=6)
    queue.limit("k:", concurrency=1)
    queue.executor("t")(gate)
    queue.start()
    handles = [queue.submit("t", key="k:a") for _ in range(8)]
    gate.wait_for(1)
    queue.tune(limit="k:", share=2, concurrency=None)
    gate.wait_for(5)
    queue.tune(limit="k:", share=False)
    assert [limit.share for limit in queue.limits()] == [None]
    gate.open()
    assert queue.drain(PATIENCE)
    assert all(handle.done() for handle in handles)


def test_retries_and_delays_keep_their_turns_and_no_worker():
    clock = ManualClock()
    queue, ran = ManualQueue(clock=clock), []
    queue.limit("k:", share=True)

    @queue.executor("t", max_attempts=2)
    def t(ctx, fails: bool = False):
        ran.append(ctx.task.concurrency_key)
        if fails and ctx.task.attempt == 1:
            raise ValueError

    with queue:
        queue.submit("t", {"fails": True}, key="k:a")
        queue.submit("t", key="k:b", delay=3600)
        queue.submit("t", key="k:a")
        queue.submit("t", key="k:b")
        queue.run_all()
        assert sorted(ran) == ["k:a", "k:a", "k:a", "k:b"]
        queue.advance(3600)
        assert sorted(ran) == ["k:a", "k:a", "k:a", "k:b", "k:b"]


def test_a_turn_whose_write_was_lost_is_given_again():
    plant = Plant(1)
    plant.submit("k:a", 1, seconds=1)
    plant.submit("k:a", 1)
    [site] = plant.sites
    turns, [running] = site.moves.turns, [*site.runs]
    site.runs[running].state = "concluding"
    assert turns.next_turn("k:a", running)
    assert not turns.share_out()  # it may be committed yet
    site.runs.clear()  # the outcome is committed without it
    assert turns.share_out()


def test_a_worker_starts_the_next_task_in_the_commit_that_ends_the_last_one():
    """So a task with a share costs one commit, as one of a backlog does, and no fetch."""
    queue, commits = ManualQueue(), []
    queue.limit("k:", share=True)
    queue.executor("t")(lambda: None)
    apply = queue.repository.apply
    with queue:
        for _ in range(2):
            queue.submit("t", key="k:a")
        pool = queue._moves._pool
        pool.execute(pool.start(pool.buffer.take(1), "worker"), "worker")
        queue.repository.apply = lambda writes: commits.append(writes) or apply(writes)
        run = pool.start(pool.buffer.take(1), "worker")
        queue.repository.apply = apply
        assert [[write.move for write in writes] for writes in commits] == [
            ["complete", "give turn", "start"]
        ]
        pool.execute(run, "worker")
        queue.run_all()
        assert queue.count_tasks(status="completed") == 2


def test_a_key_that_is_held_gets_no_turns():
    clock, ran = ManualClock(), Counter()
    queue = ManualQueue(clock=clock)
    queue.limit("k:", share=True)
    queue.executor("t")(lambda ctx: ran.update([ctx.task.concurrency_key]))
    with queue:
        queue.hold("k:a", 60)
        for n in range(6):
            queue.submit("t", key="k:a" if n % 2 else "k:b")
        queue.run_all()
        assert ran == {"k:b": 3}
        assert not queue.repository.find("turn", lifecycle.turns_of("k:a", 9), ("id",))
        queue.advance(65)
    assert ran == {"k:a": 3, "k:b": 3}


def test_an_interrupted_submit_holds_up_nobody():
    clock, ran = ManualClock(), []
    queue = ManualQueue(clock=clock)
    queue.limit("k:", share=True)
    queue.executor("t")(lambda ctx: ran.append(ctx.task.id))
    with queue:
        for _ in every_strike(lambda n: queue.submit("t", key=f"k:{n % 3}"), step=STEP):
            assert not queue._moves.turns._shares.lock._is_owned()
            queue.submit("t", key="k:next")
            queue.advance(3)
            assert queue.count_tasks(status="pending") == 0
    assert len({*ran}) == len(ran) == queue.count_tasks(status="completed") > 20


# --- the option


@pytest.mark.parametrize("share", [0, 1001, 1.5, "3"])
def test_a_share_is_a_small_whole_number(queue, share):
    with pytest.raises(ConfigurationError, match="share must be a whole number"):
        queue.limit("k:", share=share)


def test_only_keys_share(queue):
    queue.limit("k:", share=True)
    queue.limit("k:big", share=3)
    queue.limit("other:", concurrency=2)
    assert {limit.name: limit.share for limit in queue.limits()} == {
        "k:": 1,
        "k:big": 3,
        "other:": None,
    }
    with pytest.raises(ConfigurationError, match="'api' is no limit of keys"):
        queue.limit("api", share=True)
    with pytest.raises(ConfigurationError, match="requires concurrency or rate, or share"):
        queue.limit("k:", share=False)


def test_other_nodes_hear_of_shares(make_queue):
    first = make_queue()
    first.limit("k:", share=4)
    first.executor("t")(lambda: None)
    first.start()
    other = make_queue()
    assert [limit.share for limit in other.limits()] == [4]
    [node] = other.repository.nodes()
    assert node.limits["k:"].share == node.declared["k:"].share == 4
