"""Limits and numbers of workers that are changed while queues run, and kept."""

from __future__ import annotations

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, eventually, housekeeper_of, parts_of, pool_of, whole_round
from storage.repositories import TinyRepository

from taskx import ConfigurationError, NodeNotFound, Queue, Tuned, TunedType
from taskx.node.admission import Admission, Asking
from taskx.node.shared_limits import slots_by_node
from taskx.node.tuning import Tuning
from taskx.repository.example import ExampleRepository
from taskx.stores.controls import Overrides, from_text
from taskx.tasks.rate import NO_RATES, Limit, Rate, Rates

NOTE = "pause.overrides"


class Running:
    """An executor that reports at a gate and waits until it may end; it counts its calls."""

    def __init__(self, gate):
        self.gate, self.now, self.total = gate, 0, 0
        self._lock = threading.Lock()
        self._releases = threading.Semaphore(0)

    def __call__(self):
        with self._lock:
            self.now += 1
            self.total += 1
        self.gate()
        assert self._releases.acquire(timeout=PATIENCE)
        with self._lock:
            self.now -= 1

    def end(self, count):
        for _ in range(count):
            self._releases.release()


@pytest.fixture
def running(gate):
    """Tasks that report at the gate, and end when ``running.end(n)`` lets them."""
    made = Running(gate)
    gate.open()
    yield made
    made.end(1000)


def start(make_queue, running, worker_num=8, **options):
    queue = make_queue(worker_num=worker_num)
    queue.executor("t", **options)(running)
    queue.start()
    return queue


def stays(queue, running, number):
    """Give the queue two whole rounds to start too much."""
    for _ in range(2):
        parts_of(queue).agenda.expect_more()
        whole_round(queue)
    assert running.now == number


class TestLimits:
    def test_a_raised_limit_lets_more_tasks_start_at_once(self, make_queue, gate, running):
        queue = start(make_queue, running, max_concurrency=2)
        for _ in range(6):
            queue.submit("t")
        gate.wait_for(2)
        stays(queue, running, 2)
        queue.tune("t", max_concurrency=5)
        gate.wait_for(3)
        stays(queue, running, 5)
        queue.tune("t", max_concurrency=None)
        gate.wait_for(1)
        running.end(6)
        assert queue.drain(PATIENCE)

    def test_no_task_starts_until_a_lowered_limit_has_room(self, make_queue, gate, running):
        queue = start(make_queue, running, max_concurrency=4)
        for _ in range(8):
            queue.submit("t")
        gate.wait_for(4)
        queue.tune("t", max_concurrency=2)
        running.end(2)
        eventually(lambda: running.now == 2)
        stays(queue, running, 2)
        running.end(1)
        gate.wait_for(1)
        assert running.total == 5
        running.end(5)
        assert queue.drain(PATIENCE)

    @pytest.mark.parametrize("scope", ["node", "global"])
    def test_a_new_limit_counts_the_tasks_that_run_already(self, make_queue, gate, running, scope):
        queue = start(make_queue, running)
        for _ in range(5):
            queue.submit("t")
        gate.wait_for(5)
        queue.tune("t", max_concurrency=3, limit_scope=scope)
        for _ in range(3):
            queue.submit("t")
        running.end(2)
        eventually(lambda: running.now == 3)
        stays(queue, running, 3)
        running.end(1)
        gate.wait_for(1)
        running.end(100)
        assert queue.drain(PATIENCE)
        eventually(lambda: not pool_of(queue).admission.admitted)

    def test_an_untuned_type_has_the_limit_of_its_executor_again(self, make_queue, gate, running):
        queue = start(make_queue, running, max_concurrency=1)
        queue.tune("t", max_concurrency=3)
        for _ in range(5):
            queue.submit("t")
        gate.wait_for(3)
        queue.untune("t")
        assert not queue.tuned()
        running.end(2)
        eventually(lambda: running.now == 1)
        stays(queue, running, 1)
        running.end(3)
        assert queue.drain(PATIENCE)

    def test_a_rate_is_changed_and_removed(self, make_queue, clock):
        queue = make_queue(clock=clock)
        ran = []
        queue.executor("t", rate="1/h")(lambda: ran.append("t"))
        queue.start()
        for _ in range(8):
            queue.submit("t")
        eventually(lambda: len(ran) == 1)
        queue.tune("t", rate="2/m", burst=1)
        whole_round(queue)
        assert len(ran) == 1  # the bucket is as empty as it was
        clock.advance(31)
        eventually(lambda: len(ran) == 2)
        queue.tune("t", rate=None)
        eventually(lambda: len(ran) == 8)

    def test_another_scope_moves_the_tasks_to_the_shared_slots(
        self, make_queue, gate, running, repository
    ):
        first = start(make_queue, running, max_concurrency=2)
        second = start(make_queue, running, max_concurrency=2)
        for _ in range(8):
            first.submit("t")
        gate.wait_for(4)  # two on each node
        first.tune("t", limit_scope="global")
        eventually(lambda: sum(slots_by_node(repository, "type/t").values()) == 4)
        for queue in (first, second):
            pool_of(queue).admission.forget()  # as the next poll does
        running.end(2)
        eventually(lambda: running.now == 2)
        for queue in (first, second):
            stays(queue, running, 2)
        first.untune("t", only="limit_scope")
        gate.wait_for(2)
        running.end(8)
        assert first.drain(PATIENCE)

    @pytest.mark.every_store
    def test_shared_slots_are_given_back_when_the_limit_is_lowered(
        self, make_queue, gate, running, repository
    ):
        queues = [
            start(make_queue, running, max_concurrency=8, limit_scope="global") for _ in range(2)
        ]
        for _ in range(12):
            queues[0].submit("t")
        gate.wait_for(8)
        queues[0].tune("t", max_concurrency=3)
        eventually(lambda: pool_of(queues[1]).recorded.limits["type/t"].max_concurrency == 3)
        for queue in queues:
            pool_of(queue).admission.forget()  # as the next poll does
        running.end(5)
        eventually(lambda: running.now == 3)
        for queue in queues:
            stays(queue, running, 3)
        running.end(1)
        gate.wait_for(1)
        running.end(12)
        for queue in queues:
            assert queue.drain(PATIENCE)

    def test_a_type_without_a_limit_any_more_leaves_the_shared_slots(
        self, make_queue, repository, gate, running
    ):
        queue = start(make_queue, running, max_concurrency=2, limit_scope="global")
        queue.submit("t")
        gate.wait_for(1)
        assert repository.notes("limit/slots/type/t")
        queue.tune("t", max_concurrency=None)
        eventually(lambda: not repository.notes("limit/slots/type/t"))
        running.end(1)
        assert queue.drain(PATIENCE)

    def test_all_queues_follow_and_tell_their_limits(self, make_queue, gate, running):
        other = start(make_queue, running, max_concurrency=1)
        program = make_queue()  # never started, as a command line
        program.tune("t", max_concurrency=3)
        for _ in range(4):
            other.submit("t")
        gate.wait_for(3)
        eventually(lambda: pool_of(other).recorded.limits["type/t"].max_concurrency == 3)
        waits = next(t for t in other.list_tasks(status="pending")[0])
        [reason] = program.why(waits.id)
        assert (reason.kind, reason.facts["max_concurrency"]) == ("slot", 3)
        [node] = program.nodes()
        assert node.limits == {"t": {"max_concurrency": 3, "limit_scope": "node"}}
        assert node.own_limits == {"t": {"max_concurrency": 1, "limit_scope": "node"}}
        assert program.tuned().types["t"].own == node.own_limits["t"]
        program.untune("t")
        eventually(lambda: pool_of(other).recorded.limits["type/t"].max_concurrency == 1)
        running.end(4)
        assert other.drain(PATIENCE)

    def test_a_queue_that_starts_later_has_the_overrides_from_the_beginning(
        self, make_queue, gate, running
    ):
        program = make_queue()
        program.tune("t", max_concurrency=1)
        program.tune(workers=3)
        for _ in range(4):
            program.declare("t")
            program.submit("t")
        queue = start(make_queue, running)
        gate.wait_for(1)
        stays(queue, running, 1)
        [node] = program.nodes()
        assert (node.workers, node.worker_num, len(pool_of(queue).threads)) == (3, 8, 3)
        assert node.limits["t"]["max_concurrency"] == 1
        running.end(4)
        assert queue.drain(PATIENCE)

    def test_a_type_registered_after_the_start_has_its_overrides(self, make_queue, gate, running):
        queue = make_queue(worker_num=4)
        queue.start()
        queue.tune("t", max_concurrency=1)
        queue.executor("t")(running)
        for _ in range(3):
            queue.submit("t")
        gate.wait_for(1)
        stays(queue, running, 1)
        running.end(3)
        assert queue.drain(PATIENCE)


class TestWorkers:
    def test_added_workers_start_and_surplus_ones_end_after_their_task(
        self, make_queue, gate, running
    ):
        queue = start(make_queue, running, worker_num=1)
        pool = pool_of(queue)
        for _ in range(5):
            queue.submit("t")
        gate.wait_for(1)
        queue.tune(workers=4)
        gate.wait_for(3)
        stays(queue, running, 4)
        queue.tune(workers=2)
        assert running.now == 4
        running.end(2)
        eventually(lambda: pool.workers_left == len(pool.threads) == 2)
        assert running.now == 2
        queue.untune(workers=True)
        running.end(1)
        eventually(lambda: pool.workers_left == 1)
        running.end(2)
        assert queue.drain(PATIENCE)
        assert running.total == 5

    def test_idle_surplus_workers_end_at_once(self, make_queue, gate, running):
        queue = start(make_queue, running, worker_num=6)
        queue.tune(workers=2)
        eventually(lambda: pool_of(queue).workers_left == 2)
        queue.tune(workers=3)
        eventually(lambda: len(pool_of(queue).threads) == 3)
        for _ in range(4):
            queue.submit("t")
        gate.wait_for(3)
        stays(queue, running, 3)
        running.end(4)
        assert queue.drain(PATIENCE)

    def test_a_number_that_is_lowered_and_raised_at_once_is_reached(self, make_queue):
        queue = make_queue(worker_num=4)
        queue.start()
        pool = pool_of(queue)
        for number in (1, 6, 2, 3):
            queue.tune(workers=number)
        eventually(lambda: pool.workers_left == 3)
        queue.tune(workers=1)
        queue.tune(workers=5)
        eventually(lambda: pool.workers_left == len(pool.threads) == 5)

    def test_a_number_for_one_node_wins_over_that_of_all(self, make_queue):
        first, second = make_queue(worker_num=1), make_queue(worker_num=1)
        for queue in (first, second):
            queue.start()
        ids = [pool_of(queue).node.id for queue in (first, second)]
        first.tune(workers=2)
        first.tune(workers=4, node=ids[1])
        eventually(lambda: {n.id: n.workers for n in first.nodes()} == {ids[0]: 2, ids[1]: 4})
        eventually(lambda: len(pool_of(second).threads) == 4)
        assert first.tuned() == Tuned(workers=2, nodes={ids[1]: 4})
        first.untune(workers=True, node=ids[1])
        eventually(lambda: {n.id: n.workers for n in first.nodes()} == {ids[0]: 2, ids[1]: 2})

    def test_the_number_of_a_node_that_has_left_is_forgotten(self, make_queue):
        queue, left = make_queue(), make_queue()
        left.start()
        node = pool_of(left).node.id
        queue.tune(workers=7, node=node)
        left.stop()
        queue.tune(workers=3)
        assert queue.tuned() == Tuned(workers=3)
        with pytest.raises(NodeNotFound):
            queue.tune(workers=7, node=node)


def test_workers_that_cannot_be_added_are_logged(started, caplog, monkeypatch):
    def unstartable(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", unstartable)
        started.tune(workers=4)
        eventually(lambda: "cannot start more worker threads" in caplog.text)
    assert started.submit("fine").result(PATIENCE) == "fine"
    assert pool_of(started).workers_left == len(pool_of(started).threads) == 2


# The stored overrides


def test_overrides_add_up_and_are_shown_beside_the_own_values(queue, repository):
    queue.executor("t", max_concurrency=2, rate="100/m")(lambda: None)
    queue.tune("t", max_concurrency=5)
    queue.tune("t", rate=(10, timedelta(minutes=90)), burst=3)
    limits = {"max_concurrency": 5, "rate": (10, 5400.0), "burst": 3}
    own = {"max_concurrency": 2, "rate": "100/m", "burst": 100, "limit_scope": "node"}
    queue.declare("web")
    queue.tune("web", limit_scope="global", max_concurrency=None)
    web = TunedType(limits={"max_concurrency": None, "limit_scope": "global"}, own=None)
    again = Queue(repository)
    assert queue.tuned() == Tuned(types={"t": TunedType(limits=limits, own=own), "web": web})
    assert again.tuned().types["t"].limits == limits
    queue.tune("t", **again.tuned().types["t"].limits)
    assert again.tuned().types["t"].limits == limits
    queue.untune("t", only=["rate", "burst"])
    assert queue.tuned().types["t"].limits == {"max_concurrency": 5}
    queue.untune("t", only="max_concurrency")
    queue.untune("web")
    queue.untune("never tuned")
    assert queue.tuned() == Tuned()
    assert repository.notes("pause") == {}
    assert queue.tuned().to_dict() == {"types": {}, "workers": None, "nodes": {}, "limits": {}}


def test_tuning_succeeds_while_others_tune(queue, repository, monkeypatch):
    put = repository.put_notes

    def disturbed(changes):
        monkeypatch.setattr(repository, "put_notes", put)
        Queue(repository).tune(workers=9)
        return put(changes)

    monkeypatch.setattr(repository, "put_notes", disturbed)
    queue.declare("t")
    queue.tune("t", rate="1/s")
    assert queue.tuned() == Tuned(
        types={"t": TunedType(limits={"rate": "1/s"}, own=None)}, workers=9
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"types": {}, "workers": 0, "nodes": {}}',
        '{"types": {}, "workers": null, "nodes": {"n": "many"}}',
        '{"types": {"t": 5}, "workers": null, "nodes": {}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_note_of_overrides_overrides_nothing(started, repository, text):
    repository.put_note(NOTE, text, 0)
    assert started.tuned() == Tuned()
    assert started.submit("fine").result(PATIENCE) == "fine"
    whole_round(started)
    started.tune(workers=3)
    assert started.tuned() == Tuned(workers=3)


def test_overrides_of_a_newer_version_are_left_out():
    text = (
        '{"types": {"a": {"max_concurrency": 2, "new": 1}, "b": {"rate": "1/year"}}, '
        '"workers": null, "nodes": {}, "more": []}'
    )
    assert from_text(text) == Overrides({"a": {"max_concurrency": 2}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "requires a type, or workers"),
        ({"type": "t"}, "requires a limit"),
        ({"type": "", "rate": "1/s"}, "must not be empty"),
        ({"type": "t", "max_concurrency": 0}, "max_concurrency must be a whole number"),
        ({"type": "t", "rate": "fast"}, "rate must be text like"),
        ({"type": "t", "burst": 0}, "burst must be a whole number"),
        ({"type": "t", "limit_scope": "host"}, "limit_scope must be"),
        ({"type": "t", "workers": 3}, "make a call for each"),
        ({"workers": 0}, "workers must be a whole number from 1"),
        ({"workers": 3, "rate": "1/s"}, "must be of a type"),
        ({"rate": "1/s"}, "requires a type"),
        ({"node": "n"}, "requires a type, or workers"),
        ({"workers": 3, "node": ""}, "must not be empty"),
    ],
)
def test_wrong_arguments_of_tune_change_nothing(queue, given, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.tune(**given)
    assert queue.tuned() == Tuned()


def test_tune_refuses_unknown_limits(queue):
    with pytest.raises(TypeError, match=r"tune\(\) has no option max_workers"):
        queue.tune("t", max_workers=3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "requires a type, or workers"),
        ({"type": "t", "workers": True}, "make a call for each"),
        ({"type": "t", "only": ["workers"]}, "only must name limits"),
        ({"workers": True, "only": ["rate"]}, "name the type, too"),
        ({"node": "n"}, "requires a type, or workers"),
    ],
)
def test_wrong_arguments_of_untune_change_nothing(queue, given, words):
    queue.tune(workers=4)
    with pytest.raises(ConfigurationError, match=words):
        queue.untune(**given)
    assert queue.tuned() == Tuned(workers=4)


def test_a_misspelt_type_is_tuned_with_a_warning(started, caplog):
    started.tune("fyne", max_concurrency=1)
    assert "type 'fyne' is tuned, but no running queue has an executor for it" in caplog.text
    assert "fyne" in started.tuned().types


def test_repositories_of_eight_methods_refuse_and_those_of_primitives_tune(tmp_path):
    tiny, example = Queue(TinyRepository()), Queue(ExampleRepository(tmp_path / "example"))
    for call in (
        lambda: tiny.tune("t", rate="1/s"),
        lambda: tiny.tune(workers=2),
        lambda: tiny.untune("t"),
        tiny.tuned,
    ):
        with pytest.raises(ConfigurationError, match="use SQLiteRepository"):
            call()
    example.tune(workers=2)
    assert example.tuned() == Tuned(workers=2)
    example.close()


# The parts


OF_T = ("type/t",)


class Gates(Admission):
    def __init__(self, clock):
        self.limits = {}
        about = (self.limits, {"t": OF_T}, None, "n", clock)
        super().__init__(*about, freed=lambda: None, scheduled=lambda: None)


def test_a_bucket_keeps_its_tokens_when_the_rate_changes(clock):
    admission = Gates(clock)
    admission.limits["type/t"] = Limit(None, Rates([Rate(10, 60.0, 10)]), "node")
    ids = [str(n) for n in range(10)]
    assert len(admission.admit({OF_T: [Asking(one) for one in ids[:4]]})) == 4
    admission.limits["type/t"] = Limit(None, Rates([Rate(20, 60.0, 8)]), "node")
    admission.follow_limits()
    assert admission.room(OF_T, ()) == (6, 0)
    admission.limits["type/t"] = Limit(None, Rates([Rate(20, 60.0, 5)]), "node")
    admission.follow_limits()
    assert admission.room(OF_T, ()) == (5, 0)
    clock.advance(300)
    assert admission.room(OF_T, ()) == (5, 0)


def test_a_run_that_ended_before_it_was_counted_holds_no_slot(clock):
    admission = Gates(clock)
    admission.limits["type/t"] = Limit(1, NO_RATES, "node")
    admission.adopt("t", "ended", {})
    assert admission.room(OF_T, ()) == (1, 0)
    admission.adopt("t", "runs", {"runs": 1})
    admission.adopt("t", "runs", {"runs": 1})
    assert admission.room(OF_T, ()) == (0, 0)
    admission.over("runs", ran=True)
    assert admission.room(OF_T, ()) == (1, 0)


def test_a_queue_that_tunes_nothing_parses_nothing(started, monkeypatch):
    def fails(*args):
        raise AssertionError("called")

    monkeypatch.setattr("taskx.stores.controls.from_text", fails)
    monkeypatch.setattr(pool_of(started).tuning, "_follow_overrides", fails)
    monkeypatch.setattr(pool_of(started).tuning, "_count_unadmitted", fails)
    for duty in housekeeper_of(started).duties:
        monkeypatch.setattr(duty, "every", 0.0)
    whole_round(started)
    assert started.submit("fine").result(PATIENCE) == "fine"


def test_a_pause_is_followed_although_a_change_of_the_workers_fails(queue):
    queue.declare("t")
    queue.pause("t")
    queue.tune(workers=3)
    followed = []

    def cannot_start(number):
        raise RuntimeError("can't start new thread")

    pool = SimpleNamespace(
        **parts_of(queue)._asdict(),
        node=SimpleNamespace(id="n"),
        fetcher=SimpleNamespace(follow_pauses=lambda: followed.append("t")),
        set_workers=cannot_start,
    )
    with pytest.raises(RuntimeError):
        Tuning(pool, 1).refresh()
    assert followed == ["t"]
