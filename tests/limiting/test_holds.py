"""Refusals by the other side: a hold of a limit, for all its tasks and on all nodes. It is no failure."""

from __future__ import annotations

import itertools
import json
import logging
from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually, parts_of, pool_of
from storage.repositories import TinyRepository

from limiting import refused
from taskx import Config, ConfigurationError, MemoryRepository, Queue, Snooze, TaskStatus
from taskx.stores.controls import Controls
from taskx.testing import ManualQueue

pytestmark = pytest.mark.timing(audit_every=0.05, recover_every=0.05)


class Api:
    """An executor that is refused once, by the call with this number, and notes when it was called."""

    def __init__(self, clock, refusal, at=1):
        self.times: list[float] = []
        self._clock, self._refusal, self._at = clock, refusal, at
        self._began = clock.monotonic()

    def __call__(self):
        self.times.append(round(self._clock.monotonic() - self._began, 3))
        if len(self.times) == self._at:
            raise self._refusal

    def since(self, moment):
        return [time for time in self.times if time > moment]


def manual(clock, api, repository=None, config=None, limit="api", **options):
    """Return a queue whose type ``call`` has a limit, and whose tasks run when the test says so."""
    queue = ManualQueue(repository, config or Config(), clock=clock)
    if options:
        queue.limit("api", **options)
    queue.executor("call", limit=limit)(api)
    return queue


def pass_time(queue, clock, seconds, step=0.1):
    for _ in range(round(seconds / step)):
        clock.advance(step)
        queue.run_all()


# --- what a refusal does


def test_a_refused_task_spends_no_attempt_and_all_of_its_limit_wait(clock):
    api = Api(clock, Snooze(20, limit=True))
    with manual(clock, api, rate="1000/s") as queue:
        handles = [queue.submit("call") for _ in range(5)]
        queue.run_all()
        assert len(api.times) == 1
        pass_time(queue, clock, 19.8)
        assert len(api.times) == 1
        pass_time(queue, clock, 1)
        assert [handle.task().status for handle in handles] == [TaskStatus.COMPLETED] * 5
        first = handles[0].task()
        assert (first.snoozes, first.errors, first.starts) == (1, 0, 2)
        assert handles[1].task().starts == 1  # the others did not even start


def test_after_a_hold_work_goes_on_at_the_rate_without_a_burst(clock):
    api = Api(clock, Snooze(20, limit=True), at=3)
    with manual(clock, api, rate="10/s") as queue:
        for _ in range(30):
            queue.submit("call")
        queue.run_all()
        assert api.times == [0.0] * 3  # the burst of ten ends with the refusal
        pass_time(queue, clock, 22)
        starts = api.since(0)
        assert starts[0] == 20.1
        assert all(after - before >= 0.099 for before, after in itertools.pairwise(starts))


def test_a_burst_would_be_seen(clock, monkeypatch):
    """The test above can fail."""
    monkeypatch.setattr("taskx.tasks.rate.Rates.held", lambda self, marks, until: marks)
    api = Api(clock, Snooze(20, limit=True), at=3)
    with manual(clock, api, rate="10/s") as queue:
        for _ in range(30):
            queue.submit("call")
        queue.run_all()
        pass_time(queue, clock, 20.2)
        assert len(api.since(0)) >= 10


def test_an_idle_time_after_a_hold_fills_the_bucket_as_ever(clock):
    api = Api(clock, Snooze(20, limit=True))
    with manual(clock, api, rate="10/s", burst=5) as queue:
        queue.submit("call")
        queue.run_all()
        pass_time(queue, clock, 20.3)
        [limit] = queue.limits()
        assert limit.free == (2,)  # three have come, and the refused task has taken one
        clock.advance(10)
        assert [limit.free for limit in queue.limits()] == [(5,)]


@pytest.mark.parametrize("options", [{"rate": "9/s"}, {"max_concurrency": 3}, {}])
def test_the_own_limits_of_a_type_are_held_too(clock, options):
    api = Api(clock, Snooze(20, limit=True))
    queue = ManualQueue(clock=clock)
    queue.executor("call", **options)(api)
    queue.executor("other")(lambda: None)
    with queue:
        for _ in range(4):
            queue.submit("call")
        other = queue.submit("other")
        queue.run_all()
        assert other.done()
        assert len(api.times) == 1
        pass_time(queue, clock, 19.9)
        assert len(api.times) == 1
        pass_time(queue, clock, 1)
        assert len(api.times) == 5
        assert ("type/call" in queue._registry.limits) is bool(options)


def test_a_limit_is_held_by_its_name(clock):
    api = Api(clock, Snooze(20, limit="other"))
    queue = manual(clock, api, rate="1000/s")
    queue.limit("other", concurrency=9)
    queue.executor("also", limit=["other"])(lambda: None)
    with queue:
        for _ in range(3):
            queue.submit("call")
        queue.run_all()
        assert len(api.times) == 3  # only the task itself waits
        held = queue.submit("also")
        queue.run_all()
        assert not held.done()
        pass_time(queue, clock, 20.2)
        assert held.done()


def test_a_call_for_many_tasks_that_are_all_refused_holds_the_limit_once(clock):
    stored = []

    class Watched(MemoryRepository):
        def put_note(self, name, text, version):
            clock.advance(0.001)
            stored.append(name)
            return super().put_note(name, text, version)

    queue = ManualQueue(Watched(clock=clock), clock=clock)

    @queue.executor("call", batch=10)
    def call(tasks):
        return [Snooze(10 + task["n"], limit=True) for task in tasks]

    with queue:
        for n in range(10):
            queue.submit("call", {"n": n})
        began = clock.now()
        queue.run_all()
        assert stored.count("pause.holds") == 1
        (held,) = queue.limits()
        assert held.held_until == began + timedelta(seconds=19)


def test_a_key_is_held_and_other_keys_are_not(clock):
    api = Api(clock, Snooze(20, limit="key"))
    queue = ManualQueue(clock=clock)
    queue.limit("tenant:", concurrency=5)
    queue.executor("call")(api)
    with queue:
        mine = [queue.submit("call", key="tenant:a") for _ in range(3)]
        queue.run_all()
        other = queue.submit("call", key="tenant:b")
        queue.run_all()
        assert other.done()
        assert len(api.times) == 2
        pass_time(queue, clock, 19.8)
        assert len(api.times) == 2
        pass_time(queue, clock, 1)
        assert all(handle.done() for handle in mine)


def test_after_the_hold_of_a_key_its_rate_holds_without_a_burst(clock):
    api = Api(clock, Snooze(20, limit="key"))
    queue = ManualQueue(clock=clock)
    queue.limit("tenant:", concurrency=20, rate="2/s")
    queue.executor("call")(api)
    with queue:
        for _ in range(6):
            queue.submit("call", key="tenant:a")
        queue.run_all()
        pass_time(queue, clock, 25)
        starts = api.since(0)
        assert len(starts) == 6
        assert starts[0] >= 20.5
        assert all(after - before >= 0.499 for before, after in itertools.pairwise(starts))


@pytest.mark.parametrize("key", [None, "plain"])
def test_a_key_that_no_limit_can_have_holds_nothing(clock, key):
    api = Api(clock, Snooze(20, limit="key"))
    queue = ManualQueue(clock=clock)
    queue.executor("call")(api)
    with queue:
        handle = queue.submit("call", key=key)
        queue.run_all()
        assert queue.limits() == []
        assert handle.task().snoozes == 1


def test_a_later_hold_never_shortens_an_earlier_one(clock):
    queue = ManualQueue(clock=clock)

    @queue.executor("call")
    def call(seconds):
        raise Snooze(seconds, limit="api")

    queue.limit("api", concurrency=1)
    with queue:
        for seconds in (5, 60, 20):
            queue.submit("call", {"seconds": seconds})
            queue.run_all()
        [limit] = queue.limits()
        assert limit.held_until == clock.now() + timedelta(seconds=60)
        queue.hold("api", 10)
        assert queue.limits() == [limit]


def test_a_hold_is_capped_and_the_log_says_so(clock, caplog):
    api = Api(clock, Snooze(86_400, limit=True))
    with manual(clock, api, config=Config(max_hold="2m"), concurrency=1) as queue:
        handle = queue.submit("call")
        with caplog.at_level(logging.WARNING, "taskx"):
            queue.run_all()
        [limit] = queue.limits()
        assert limit.held_until == clock.now() + timedelta(minutes=2)
        assert limit.held_by == handle.id
        assert handle.task().run_at == clock.now() + timedelta(days=1)
    assert "limit api is held for 120 s by task" in caplog.text
    assert "which asked for 86400 s" in caplog.text


def test_a_time_out_is_no_refusal(clock):
    queue = ManualQueue(clock=clock)
    queue.limit("api", concurrency=1)

    @queue.executor("call", limit="api", timeout=5)
    def call(ctx):
        ctx.token.wait(9)
        raise Snooze(20, limit=True)

    with queue:
        handle = queue.submit("call")
        queue.run_all()
        task = handle.task()
        assert (task.snoozes, task.errors) == (0, 1)


def test_subclasses_of_snooze_hold_what_they_say(clock):
    class TooMany(Snooze):
        def __init__(self):
            super().__init__(20, limit="api")

    class Odd(Snooze):
        """One that sets only the seconds."""

        def __init__(self):
            self.seconds = 20

    class Wrong(Odd):
        limit = 5

    queue = ManualQueue(clock=clock)
    kinds = {"many": TooMany, "odd": Odd, "wrong": Wrong}

    @queue.executor("call")
    def call(kind):
        raise kinds[kind]()

    queue.limit("api", concurrency=1)
    with queue:
        for kind, held in (("odd", None), ("wrong", None), ("many", 20)):
            handle = queue.submit("call", {"kind": kind})
            queue.run_all()
            assert handle.task().snoozes == 1
            until = None if held is None else clock.now() + timedelta(seconds=held)
            assert [limit.held_until for limit in queue.limits()] == [until]


@pytest.mark.parametrize("limit", ["", 5, None, ["api"]])
def test_a_snooze_refuses_what_is_no_limit(limit):
    with pytest.raises(ConfigurationError, match="limit of Snooze must be True, 'key' or the name"):
        Snooze(5, limit=limit)


@pytest.mark.process
def test_a_child_process_holds_a_limit(make_queue):
    queue = make_queue()
    queue.limit("api", concurrency=1)
    queue.register_executor(refused.call, limit="api")
    queue.start()
    handle = queue.submit("call")
    eventually(lambda: handle.task().snoozes == 1)
    [limit] = queue.limits()
    assert limit.held_by == handle.id


# --- on all nodes, and in all stores


@pytest.mark.every_store
def test_a_hold_and_its_release_reach_all_nodes(make_queue):
    queues = [make_queue() for _ in range(2)]
    for queue in queues:
        queue.limit("api", concurrency=4)
        queue.executor("call", limit="api")(lambda: "done")
        queue.start()
    first, second = queues
    first.hold("api", 3600)
    eventually(lambda: parts_of(second).controls.held_until("api"))
    handles = [queue.submit("call") for queue in queues]
    admissions = [pool_of(queue).admission for queue in queues]
    eventually(lambda: all(admission.next_fetch() is not None for admission in admissions))
    assert [handle.task().status for handle in handles] == [TaskStatus.PENDING] * 2
    [limit] = second.limits()
    assert limit.held_until is not None
    assert second.release("api")
    assert [handle.result(PATIENCE) for handle in handles] == ["done", "done"]
    assert not first.release("api")


@pytest.mark.every_store
def test_a_refused_task_holds_the_limit_in_the_repository(make_queue):
    queue, other = make_queue(), make_queue()
    for each in (queue, other):
        each.limit("api", rate="9000/s")

    @queue.executor("call", limit="api")
    def call(ctx):
        if not ctx.task.snoozes:
            raise Snooze(0.05, limit=True)

    queue.start()
    handle = queue.submit("call")
    assert handle.result(PATIENCE) is None
    assert handle.task().snoozes == 1
    assert [*Controls(other.repository)._repository.notes("pause.holds")] == ["pause.holds"]


def test_a_hold_outlives_the_program(clock):
    repository = MemoryRepository(clock=clock)
    with manual(clock, Api(clock, Snooze(20, limit=True)), repository, rate="2/s") as queue:
        queue.submit("call")
        queue.run_all()
    api = Api(clock, Snooze(20), at=0)
    with manual(clock, api, repository, rate="2/s") as queue:
        for _ in range(3):
            queue.submit("call")
        queue.run_all()
        assert api.times == []
        pass_time(queue, clock, 22)
        assert api.times == [20.5, 21.0, 21.5, 22.0]


def test_a_hold_that_cannot_be_stored_is_logged_and_the_task_runs_later(clock, caplog):
    class Full(MemoryRepository):
        def put_note(self, name, text, version):
            if name == "pause.holds":
                raise ConfigurationError("the disk is full")
            return super().put_note(name, text, version)

    api = Api(clock, Snooze(20, limit=True))
    with manual(clock, api, Full(clock=clock), concurrency=1) as queue:
        handle = queue.submit("call")
        queue.run_all()
        assert handle.task().snoozes == 1
    assert "nothing is held: the disk is full" in caplog.text


def test_a_repository_of_eight_methods_only_lets_the_task_run_later(caplog):
    queue = Queue(TinyRepository())

    @queue.executor("call")
    def call(ctx):
        if not ctx.task.snoozes:
            raise Snooze(0.01, limit=True)
        return "done"

    with queue:
        assert queue.submit("call").result(PATIENCE) == "done"
    assert "nothing is held" in caplog.text
    for refused_call in (lambda: queue.hold("api", 5), lambda: queue.release("api")):
        with pytest.raises(ConfigurationError, match="holds of limits"):
            refused_call()


# --- by hand


def test_a_person_holds_and_releases_a_limit(clock):
    api = Api(clock, None, at=0)
    with manual(clock, api, rate="2/s") as queue:
        queue.hold("api", clock.now() + timedelta(hours=9))  # longer than a task may
        for _ in range(3):
            queue.submit("call")
        pass_time(queue, clock, 5)
        assert api.times == []
        assert queue.release("api")
        assert not queue.release("api")
        pass_time(queue, clock, 1.6)
        assert api.times == [5.5, 6.0, 6.5]  # without a burst


def test_what_a_run_spends_or_gives_back_during_a_hold_does_not_outlast_a_release(clock):
    queue = ManualQueue(clock=clock)
    queue.limit("api", rate=["5/s", "100 tokens/s"])

    @queue.executor("call", limit="api")
    def call(ctx):
        ctx.spent(tokens=5)
        raise Snooze(3000, limit=True)

    with queue:
        queue.submit("call", cost={"tokens": 50})
        queue.run_all()
        queue.release("api")
        clock.advance(1.5)
        assert [limit.free for limit in queue.limits()] == [(5, 100)]


def test_the_tasks_of_a_released_key_start_within_ten_seconds(clock):
    queue = ManualQueue(clock=clock)
    queue.limit("tenant:", concurrency=2)
    queue.executor("call")(lambda: None)
    with queue:
        queue.hold("tenant:", 3600)
        handles = [queue.submit("call", key=f"tenant:{name}") for name in "abc"]
        pass_time(queue, clock, 30, step=1)
        assert not any(handle.done() for handle in handles)
        assert queue.release("tenant:")
        pass_time(queue, clock, 11, step=1)
        assert all(handle.done() for handle in handles)


def test_a_misspelt_name_is_pointed_out(clock, caplog):
    with manual(clock, Api(clock, None, at=0), rate="2/s") as queue:
        for name in ("api", "type/call", "tenant:a"):
            queue.hold(name, 5)
        assert "no program declares" not in caplog.text
        queue.hold("apii", 5)
    assert "no program declares limit 'apii', which is held now" in caplog.text


@pytest.mark.parametrize("until", [-1, "soon", None, float("inf"), float("nan")])
def test_wrong_times_hold_nothing(queue, until):
    with pytest.raises(ConfigurationError, match="until"):
        queue.hold("api", until)
    assert queue.limits() == []


def test_a_damaged_note_holds_nothing(queue):
    for text in ("[", "[]", '{"api": 5}', '{"api": ["a", 1, ""]}', '{"api": [1e99, 1, ""]}'):
        note = queue.repository.notes("pause.holds").get("pause.holds")
        queue.repository.put_note("pause.holds", text, note.version if note else 0)
        assert queue.limits() == []
    queue.hold("api", 5)
    assert [limit.name for limit in queue.limits()] == ["api"]


def test_holds_that_are_over_leave_the_note(clock):
    repository = MemoryRepository(clock=clock)
    queue = ManualQueue(repository, clock=clock)
    queue.limit("api", rate="1/m", burst=5)
    queue.hold("api", 10)
    queue.hold("unknown", 10)
    clock.advance(60)
    names = lambda: [*json.loads(repository.notes("pause.holds")["pause.holds"].text)]  # noqa: E731
    queue.hold("now", 10)
    assert names() == ["api", "unknown", "now"]  # the bucket of api is full only in four minutes
    clock.advance(300)
    queue.hold("now", 10)
    assert names() == ["unknown", "now"]


# --- where it is shown


def test_why_says_until_when_a_task_is_held_and_by_whom(clock):
    api = Api(clock, Snooze(30, limit=True))
    with manual(clock, api, concurrency=5) as queue:
        handles = [queue.submit("call") for _ in range(2)]
        queue.run_all()
        for handle in handles:
            [reason] = [one for one in queue.why(handle.id) if one.kind == "hold"]
            assert str(reason) == (
                f"Limit 'api' is held until 2024-01-01 00:00:30 UTC by task {handles[0].id}."
            )
            assert reason.facts["by"] == handles[0].id
        queue.hold("type/call", 60)
        sentences = [str(reason) for reason in queue.why(handles[1].id)]
        assert sentences[0] == "Type 'call' is held until 2024-01-01 00:01:00 UTC by hand."


def test_why_names_the_hold_of_a_key(clock):
    queue = ManualQueue(clock=clock)
    queue.limit("tenant:", concurrency=2)
    queue.executor("call")(lambda: None)
    with queue:
        queue.hold("tenant:", 30)
        handle = queue.submit("call", key="tenant:a")
        queue.run_all()
        kinds = [reason.kind for reason in queue.why(handle.id)]
        assert "hold" in kinds


def test_limits_list_types_and_keys_only_while_they_are_held(clock):
    queue = ManualQueue(clock=clock)
    queue.executor("call", rate="5/s")(lambda: None)
    queue.limit("tenant:", rate="60/m")
    with queue:
        for name in ("type/call", "tenant:a"):
            queue.hold(name, 10)
        found = {limit.name: limit for limit in queue.limits()}
        assert [*found] == ["tenant:", "tenant:a", "type/call"]
        assert found["type/call"].rates == ("5/s",)
        assert found["type/call"].to_dict()["held_until"] == "2024-01-01T00:00:10Z"
        assert found["tenant:"].held_until is None
        clock.advance(10)
        assert [limit.name for limit in queue.limits()] == ["tenant:"]


def test_health_names_long_holds_only(queue):
    queue.hold("api", 50)
    assert not queue.health(nodes=0).problems
    queue.hold("api", 3600)
    [problem] = queue.health(nodes=0).problems
    assert problem.kind == "hold"
    assert "limit 'api' is held until" in str(problem)


def test_a_hold_of_which_nothing_is_left_costs_nothing(clock):
    api = Api(clock, Snooze(20, limit=True))
    with manual(clock, api, rate="1/s", burst=10) as queue:
        queue.submit("call")
        queue.run_all()
        clock.advance(29)
        queue.run_all()
        assert parts_of(queue).controls.holds
        clock.advance(2)
        queue.run_all()
        assert not parts_of(queue).controls.holds


def test_a_limit_of_a_key_that_is_looked_up_before_the_start_ends_no_hold(repository):
    """The start of a queue looks one up for a task of a dead node."""
    queue = Queue(repository)
    queue.executor("call")(lambda: None)
    queue.hold("type/call", PATIENCE)
    queue.submit("call", concurrency_key="customer:7")
    assert "call" in queue._registry.limited


def test_a_hold_that_is_found_while_an_old_one_is_forgotten_stays(repository):
    class Holds(dict):
        def values(self):
            found = [*super().values()]
            new["controls"].refresh()  # as another thread may do
            return found

    new = {}
    queue, controls = Queue(repository), Controls(repository)
    queue.limit("api", rate="1/s")
    queue.limit("other", rate="1/s")
    queue.hold("api", 1)
    controls.refresh()
    (old,) = controls.holds.values()
    queue.hold("other", PATIENCE)
    new["controls"], controls.holds = controls, Holds(controls.holds)
    assert controls.held(old.full) == ()
    controls.refresh()
    assert controls.held(old.full) == ("other",)
