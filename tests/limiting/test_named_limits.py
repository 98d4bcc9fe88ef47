"""Limits with names: shared by types and by all nodes, declared in code and changed live."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually, pool_of
from storage.repositories import TinyRepository

from limiting.costly import costly
from limiting.test_limits import Crowd
from taskx import ConfigurationError, MemoryRepository, Queue, TaskStatus
from taskx.node.admission import Admission, Asking
from taskx.node.shared_limits import SharedBucket, SharedSlots
from taskx.tasks.rate import NOTHING, Limit, Rate, Rates, rates_of
from taskx.testing import ManualQueue

API = ("api",)
pytestmark = pytest.mark.timing(audit_every=0.05, recover_every=0.05)


@contextmanager
def often():
    """Let threads take turns at nearly every bytecode."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def tokens(queue, name="api"):
    """Return what is left of the rates of a limit."""
    [limit] = [each for each in queue.limits() if each.name == name]
    return limit.free


# --- one limit for several types


@pytest.mark.every_store
def test_types_share_the_slots_of_a_limit_on_all_nodes(make_queue, gate):
    crowd = Crowd(gate)
    queues = [make_queue(worker_num=4) for _ in range(2)]
    for queue in queues:
        queue.limit("api", concurrency=3)
        queue.executor("a", limit="api")(crowd)
        queue.executor("b", limit=["api"])(crowd)
        queue.start()
    for n in range(20):
        queues[n % 2].submit("ab"[n % 2 if n < 10 else 0])
    gate.wait_for(3)
    gate.open()
    for queue in queues:
        assert queue.drain(PATIENCE)
    assert (crowd.total, crowd.most) == (20, 3)


def test_a_type_with_its_own_limit_too_keeps_both(make_queue, gate):
    crowd, own = Crowd(gate), Crowd(gate)
    queue = make_queue(worker_num=6)
    queue.limit("api", concurrency=3)
    queue.executor("a", limit="api")(crowd)
    queue.executor("b", limit="api", max_concurrency=1)(own)
    queue.start()
    for _ in range(10):
        queue.submit("a")
        queue.submit("b")
    gate.wait_for(3)
    gate.open()
    assert queue.drain(PATIENCE)
    assert (crowd.total, own.total, own.most) == (10, 10, 1)
    assert crowd.most <= 3


def test_no_more_than_the_limit_run_while_threads_take_turns_all_the_time(make_queue):
    lock, now, most = threading.Lock(), [0], [0]

    def work():
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        with lock:
            now[0] -= 1

    queues = [make_queue(worker_num=4) for _ in range(2)]
    with often():
        for queue in queues:
            queue.limit("api", concurrency=2)
            queue.executor("a", limit="api")(work)
            queue.executor("b", limit="api")(work)
            queue.start()
        for n in range(200):
            queues[n % 2].submit("ab"[n % 3 % 2])
        for queue in queues:
            assert queue.drain(3 * PATIENCE)
    assert most[0] <= 2


def test_a_broken_admission_lets_more_than_the_limit_run(make_queue, gate, monkeypatch):
    """The test above can fail."""
    monkeypatch.setattr(SharedSlots, "take", lambda self, count: count)
    crowd = Crowd(gate)
    queue = make_queue(worker_num=4)
    queue.limit("api", concurrency=2)
    monkeypatch.setattr(Admission, "room", lambda *_: (10, 0))
    queue.executor("a", limit="api")(crowd)
    queue.start()
    for _ in range(4):
        queue.submit("a")
    gate.wait_for(4)
    gate.open()
    assert crowd.most == 4


# --- rates and costs


def manual(repository=None, clock=None, **options):
    """Return a queue with a limit ``api``, whose tasks run when the test says so."""
    queue = ManualQueue(repository, clock=clock)
    queue.limit("api", **options)
    queue.executor("call", limit="api")(lambda: None)
    return queue


def test_each_of_several_rates_holds(clock):
    with manual(clock=clock, rate=["2/s", "3/m"]) as queue:
        handles = [queue.submit("call") for _ in range(5)]
        done = lambda: sum(handle.done() for handle in handles)  # noqa: E731
        queue.run_all()
        assert done() == 2
        clock.advance(1)
        queue.run_all()
        assert done() == 3
        clock.advance(10)
        queue.run_all()
        assert done() == 3
        clock.advance(10)
        queue.run_all()
        assert done() == 4


def test_a_task_waits_until_there_is_enough_for_its_cost(clock):
    with manual(clock=clock, rate="600 tokens/m") as queue:
        first, second, third = (
            queue.submit("call", cost={"tokens": number}) for number in (500, 300, 10)
        )
        queue.run_all()
        assert (first.done(), second.done(), third.done()) == (True, False, False)
        [reason] = [reason for reason in queue.why(second.id) if reason.kind == "token"]
        assert "It needs 300 tokens of limit 'api', which come in 20" in str(reason)
        clock.advance(19)
        queue.run_all()
        assert not second.done()
        assert not third.done()  # the cheap one does not overtake
        clock.advance(2)
        queue.run_all()
        assert (second.done(), third.done()) == (True, True)


@pytest.mark.every_store
def test_the_cost_is_kept_with_the_task(queue):
    queue.executor("call")(lambda: None)
    handle = queue.submit("call", cost={"tokens": 1200, "images": 2})
    assert handle.task().cost == {"tokens": 1200, "images": 2}
    assert queue.submit("call").task().cost is None
    assert handle.task().to_dict()["cost"] == {"tokens": 1200, "images": 2}


@pytest.mark.every_store
def test_a_task_with_a_cost_runs_and_keeps_it(make_queue):
    queue = make_queue()
    queue.limit("api", rate="1000 tokens/m")
    queue.executor("call", limit="api")(lambda ctx: dict(ctx.task.cost))
    queue.start()
    assert queue.submit("call", cost={"tokens": 10}).result(PATIENCE) == {"tokens": 10}


def test_a_cost_above_the_burst_is_refused(queue):
    queue.limit("api", rate=["5/s", "100 tokens/s"], burst=[None, 50])
    queue.executor("call", limit="api")(lambda: None)
    with pytest.raises(ConfigurationError, match="51 tokens is above the burst of limit 'api', 50"):
        queue.submit("call", cost={"tokens": 51})
    queue.submit("call", cost={"tokens": 50, "images": 1000})


@pytest.mark.parametrize(
    "cost", [5, {"tokens": -1}, {"tokens": 1.5}, {"": 1}, {"a b": 1}, {1: 1}, {"tokens": True}]
)
def test_invalid_costs_are_refused(queue, cost):
    queue.declare("call")
    with pytest.raises(ConfigurationError, match="cost"):
        queue.submit("call", cost=cost)


def test_a_task_that_costs_more_than_a_lowered_burst_starts_when_the_bucket_is_full(clock):
    with manual(clock=clock, rate="60 tokens/m") as queue:
        queue.submit("call", cost={"tokens": 60})
        queue.run_all()
        dear = queue.submit("call", cost={"tokens": 60})
        queue.tune(limit="api", burst=10)
        clock.advance(9)
        queue.run_all()
        assert not dear.done()
        clock.advance(60)
        queue.run_all()
        assert dear.done()
        cheap = queue.submit("call", cost={"tokens": 1})
        clock.advance(45)
        queue.run_all()
        assert not cheap.done()  # what the dear one took comes first
        clock.advance(20)
        queue.run_all()
        assert cheap.done()


@pytest.mark.parametrize(("actual", "left"), [(10, 90), (50, 50), (80, 20)])
def test_a_run_corrects_its_cost_in_either_direction(clock, actual, left):
    queue = ManualQueue(clock=clock)
    queue.limit("api", rate="100 tokens/h")

    @queue.executor("call", limit="api")
    def call(ctx):
        ctx.spent(tokens=999)
        ctx.spent(tokens=actual)  # the last value counts

    with queue:
        queue.submit("call", cost={"tokens": 50})
        queue.run_all()
        assert tokens(queue) == (left,)


def test_a_task_without_a_cost_waits_until_a_debt_is_paid(clock):
    queue = ManualQueue(clock=clock)
    queue.limit("api", rate="60 tokens/m")

    @queue.executor("call", limit="api")
    def call(ctx):
        ctx.spent(tokens=90)

    with queue:
        queue.submit("call", cost={"tokens": 60})
        queue.run_all()  # owes 30 tokens
        free = queue.submit("call")
        clock.advance(29)
        queue.run_all()
        assert not free.done()
        assert "rate" in str(queue.why(free.id))
        clock.advance(2)
        queue.run_all()  # owes 89
        assert free.done()
        next_one = queue.submit("call")
        clock.advance(88)
        queue.run_all()
        assert not next_one.done()
        clock.advance(2)
        queue.run_all()
        assert next_one.done()


@pytest.mark.process
def test_a_child_process_corrects_its_cost(make_queue):
    queue = make_queue()
    queue.limit("api", rate="100 tokens/h")
    queue.register_executor(costly, limit="api")
    queue.start()
    assert queue.submit("costly", cost={"tokens": 50}).result(PATIENCE) is None
    eventually(lambda: tokens(queue) == (93,))


def test_spent_takes_whole_numbers_only(queue):
    @queue.executor("call")
    def call(ctx):
        ctx.spent(tokens=-1)

    with queue:
        assert "cost in tokens" in str(queue.submit("call").exception(PATIENCE))


def test_a_task_that_never_ran_gives_back_its_cost(clock):
    with manual(clock=clock, rate=["10/h", "100 tokens/h"]) as queue:
        admission = queue._driven.pool.admission
        asking = Asking("x", {"tokens": 40})
        assert admission.admit({API: [asking]}) == {"x"}
        assert tokens(queue) == (9, 60)
        admission.over("x", ran=False)
        assert tokens(queue) == (10, 100)


def test_a_task_that_goes_on_takes_no_token(clock):
    with manual(clock=clock, concurrency=1, rate="1/h") as queue:
        admission = queue._driven.pool.admission
        assert admission.admit({API: [Asking("x")]}) == {"x"}
        admission.over("x", ran=True)
        waiting = {API: [Asking("y"), Asking("z", resumed=True)]}
        assert admission.admit(waiting) == set()
        assert admission.admit({API: [Asking("z", resumed=True)]}) == {"z"}
        assert admission.admit({API: [Asking("w", resumed=True)]}) == set()  # the slot


def test_a_refused_group_gives_back_what_it_took_at_other_gates(clock):
    queue = manual(clock=clock, concurrency=5)
    queue.limit("other", concurrency=1)
    queue.executor("both", limit=["api", "other"])(lambda: None)
    with queue:
        admission = queue._driven.pool.admission
        names = ("api", "other")
        asked = [Asking(one) for one in "xyz"]
        assert admission.admit({names: asked}) == {"x"}
        assert admission.admit({API: [Asking(str(n)) for n in range(9)]}) == {*"0123"}


@pytest.mark.parametrize("strikes", [1, 2, 3])
def test_a_failing_repository_leaves_nothing_taken(clock, monkeypatch, strikes):
    queue = manual(clock=clock, concurrency=3, rate="9/h")
    with queue:
        admission, calls = queue._driven.pool.admission, []
        inner = SharedBucket.take

        def fails(self, costs):
            calls.append(1)
            if len(calls) <= strikes:
                raise OSError("broken")
            return inner(self, costs)

        monkeypatch.setattr(SharedBucket, "take", fails)
        for _ in range(strikes):
            with pytest.raises(OSError, match="broken"):
                admission.admit({API: [Asking("x"), Asking("y")]})
        assert admission.admit({API: [Asking(one) for one in "xyz"]}) == {*"xyz"}


# --- declared in code, changed live


def test_nothing_is_stored_before_the_start(make_queue, repository):
    queue = make_queue()
    queue.limit("api", concurrency=2)
    assert repository.notes("") == {}
    assert [limit.concurrency for limit in queue.limits()] == [2]
    queue.start()
    assert json.loads(repository.notes("pause.limits")["pause.limits"].text) == {
        "api": {"max_concurrency": 2}
    }


@pytest.mark.every_store
def test_a_live_change_wins_until_it_is_reset(make_queue, repository, gate):
    first, second = make_queue(worker_num=4), make_queue(worker_num=4)
    for queue in (first, second):
        queue.limit("api", concurrency=1, rate="100/s")
        queue.executor("t", limit="api")(gate)
        queue.start()
    effective = lambda queue: queue._registry.limits["api"].max_concurrency  # noqa: E731
    second.tune(limit="api", concurrency=3)
    eventually(lambda: (effective(first), effective(second)) == (3, 3))
    [limit] = first.limits()
    assert (limit.concurrency, limit.rates, limit.tuned) == (3, ("100/s",), {"concurrency": 3})
    assert first.tuned().limits == {"api": {"concurrency": 3}}
    for _ in range(4):
        first.submit("t")
    gate.wait_for(3)
    gate.open()
    assert first.drain(PATIENCE)
    first.untune(limit="api")
    eventually(lambda: (effective(first), effective(second)) == (1, 1))
    assert first.tuned().limits == {}


def test_the_latest_start_holds_and_health_says_so(make_queue):
    first, second = make_queue(), make_queue()
    first.limit("api", concurrency=1)
    second.limit("api", concurrency=5)
    first.start()
    assert not [problem for problem in first.health().problems if problem.kind == "limit"]
    second.start()
    eventually(lambda: first._registry.limits["api"].max_concurrency == 5)
    [problem] = [problem for problem in first.health().problems if problem.kind == "limit"]
    assert "Limit 'api' is declared with different values" in str(problem)
    second.stop(PATIENCE)
    third = make_queue()
    third.limit("api", concurrency=2)
    third.start()
    eventually(lambda: first._registry.limits["api"].max_concurrency == 2)


def test_a_limit_that_nobody_declares_any_more_is_forgotten(make_queue):
    first = make_queue()
    first.limit("old", concurrency=1)
    first.start()
    first.stop(PATIENCE)
    second = make_queue()
    second.start()
    assert second.limits() == []


def test_a_limit_that_nobody_declares_holds_nothing_up_and_health_and_the_log_name_it(
    make_queue, caplog
):
    queue = make_queue()
    queue.executor("t", limit="apii")(lambda: "done")
    queue.executor("u", limit="api")(lambda: "done")
    queue.limit("api", concurrency=5)
    queue.start()
    warned = "'apii', which no program declares, so it runs without it; did you mean 'api'?"
    assert warned in caplog.text
    assert "'u'" not in caplog.text
    assert queue.submit("t").result(PATIENCE) == "done"
    [problem] = [problem for problem in queue.health().problems if problem.kind == "limit"]
    assert str(problem) == "Type 't' names the limit 'apii', which no program declares."


def test_a_limit_can_be_declared_while_the_queue_runs(make_queue, gate):
    crowd = Crowd(gate)
    queue = make_queue(worker_num=4)
    queue.executor("t", limit="api")(crowd)
    queue.start()
    queue.limit("api", concurrency=1)
    for _ in range(3):
        queue.submit("t")
    gate.wait_for(1)
    gate.open()
    assert queue.drain(PATIENCE)
    assert crowd.most == 1


def test_a_limit_that_appears_counts_the_tasks_that_run(make_queue, gate):
    """They were admitted by another limit of their type, or by none."""
    queue = make_queue(worker_num=4)
    queue.executor("t", limit=["api", "late"])(gate)
    queue.limit("api", concurrency=3)
    queue.start()
    for _ in range(2):
        queue.submit("t")
    gate.wait_for(2)
    queue.limit("late", concurrency=2)
    admission = pool_of(queue).admission
    eventually(lambda: admission._gate("late").slots.taken == 2)
    gate.open()
    assert queue.drain(PATIENCE)
    eventually(lambda: admission._gate("late").slots.taken == 0)


def test_the_state_of_a_limit_is_found_again_by_the_next_program(clock):
    repository = MemoryRepository(clock=clock)
    with manual(repository, clock, rate=["5/h", "100 tokens/h"]) as queue:
        queue.submit("call", cost={"tokens": 60})
        queue.run_all()
    with manual(repository, clock, rate=["5/h", "100 tokens/h"]) as queue:
        assert tokens(queue) == (4, 40)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("", {"concurrency": 1}, "must not be empty"),
        ("type/t", {"concurrency": 1}, "must not begin with 'type/'"),
        ("api", {}, "requires concurrency or rate"),
        ("api", {"concurrency": 0}, "max_concurrency"),
        ("api", {"rate": "fast"}, "rate must be text like"),
        ("api", {"rate": []}, "burst must have a number for each rate"),
        ("api", {"rate": ["1/s", "2/m"], "burst": 3}, "burst must have a number for each rate"),
        ("api", {"rate": "1/s", "burst": [3, 4]}, "burst must have a number for each rate"),
        ("api", {"burst": 3}, "requires"),
    ],
)
def test_invalid_limits_are_refused(queue, name, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.limit(name, **options)
    assert queue.limits() == []


@pytest.mark.parametrize("limit", ["", "type/t", 5, ["api", 5], {"api": 1}, "tenant:"])
def test_invalid_names_of_limits_are_refused(queue, limit):
    with pytest.raises(ConfigurationError, match="limit"):
        queue.executor("t", limit=limit)


def test_a_limit_has_no_scope(queue):
    with pytest.raises(TypeError, match=r"limit\(\) has no option limit_scope"):
        queue.limit("api", concurrency=1, limit_scope="node")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limit": "api"}, "requires a limit: one of concurrency, rate, burst"),
        ({"limit": "api", "type": "t", "rate": "1/s"}, "make a call for each"),
        ({"limit": "api", "workers": 2}, "make a call for each"),
        ({"limit": "type/t", "rate": "1/s"}, "must not begin with"),
    ],
)
def test_wrong_arguments_of_tune_change_nothing(queue, given, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.tune(**given)
    assert not queue.tuned()


@pytest.mark.parametrize(
    ("given", "burst", "rates"),
    [
        ("90000 tokens/m", None, [Rate(90000, 60.0, 90000, "tokens")]),
        (["5/s", (3, 0.5)], None, [Rate(5, 1.0, 5), Rate(3, 0.5, 3)]),
        (["5/s", "9 a/d"], [None, 4], [Rate(5, 1.0, 5), Rate(9, 86400.0, 4, "a")]),
    ],
)
def test_rates_can_be_given_in_these_forms(given, burst, rates):
    assert rates_of(given, burst) == Rates(rates)


def test_a_burst_of_other_rates_is_dropped_when_rates_are_changed(make_queue):
    queue = make_queue()
    queue.limit("api", rate=["5/s", "50 tokens/s"], burst=[2, 20])
    queue.start()
    queue.tune(limit="api", rate="7/s")
    assert queue._registry.limits["api"] == Limit(None, Rates([Rate(7, 1.0, 7)]), "global")


@pytest.mark.parametrize("of", [{"type": "t"}, {"limit": "api"}], ids=lambda of: next(iter(of)))
@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda queue, of: queue.tune(**of, rate="7/h"), {"rate": "7/h"}),
        (lambda queue, of: queue.tune(**of, rate=None), {"rate": None}),
        (lambda queue, of: queue.untune(**of, only=["rate"]), {}),
    ],
    ids=["other rates", "no rates", "the code's rates"],
)
def test_a_tuned_burst_of_other_rates_is_dropped_and_the_other_overrides_stay(
    queue, of, change, left
):
    concurrency = "max_concurrency" if "type" in of else "concurrency"
    queue.tune(**of, **{concurrency: 9}, rate=["5/s", "90 tokens/m"], burst=[1, 2])
    change(queue, of)
    tuned = queue.tuned()
    found = tuned.types["t"].limits if "type" in of else tuned.limits["api"]
    assert found == {concurrency: 9, **left}


def test_a_burst_that_does_not_fit_the_tuned_rates_is_refused(queue):
    queue.tune("t", max_concurrency=9, rate=["5/s", "90 tokens/m"])
    before = queue.tuned()
    with pytest.raises(ConfigurationError, match="burst must have a number for each rate"):
        queue.tune("t", burst=5)
    assert queue.tuned() == before


@pytest.mark.parametrize("period", ["1m", timedelta(minutes=1), 60])
def test_the_period_of_a_rate_can_be_given_in_each_way(make_queue, period):
    queue = make_queue()
    queue.limit("api", rate=[(5, period), "9 tokens/m"])
    queue.start()
    queue.tune("t", rate=(5, period))
    queue.tune(limit="api", rate=(7, period))
    assert queue.tuned().types["t"].limits["rate"] == (5, 60.0)
    assert queue._registry.limits["api"].rates == Rates([Rate(7, 60.0, 7)])


def test_buckets_keep_their_marks_by_their_places(clock):
    repository = MemoryRepository()
    two = Rates([Rate(4, 3600.0, 4), Rate(9, 3600.0, 9, "a")])
    bucket = SharedBucket(repository, "api", two, clock)
    assert bucket.take([NOTHING, {"a": 9}, {"a": 1}]) == 2
    assert bucket.tokens() == (2, 0)
    one = SharedBucket(repository, "api", Rates(two[:1]), clock)
    assert one.tokens() == (2,)
    assert one.take([NOTHING]) == 1


def test_status_of_waiting_tasks_is_pending(clock):
    with manual(clock=clock, rate="1/h") as queue:
        handles = [queue.submit("call") for _ in range(2)]
        queue.run_all()
        assert [handle.task().status for handle in handles] == [
            TaskStatus.COMPLETED,
            TaskStatus.PENDING,
        ]


def test_a_repository_of_eight_methods_refuses_limits_with_names():
    queue = Queue(TinyRepository())
    for refused in (
        lambda: queue.limit("api", concurrency=1),
        lambda: queue.executor("t", limit="api")(lambda: None),
        queue.limits,
    ):
        with pytest.raises(ConfigurationError, match="limits with a name"):
            refused()
