"""Chains and groups: submitted together, with one handle."""

from __future__ import annotations

import json
import sys
from concurrent import futures

import pytest
from helpers import PATIENCE, eventually, frequent_checks, ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage.repositories import TinyRepository

from taskx import (
    ConfigurationError,
    DuplicateTask,
    Flow,
    FlowHandle,
    FlowSummary,
    Hook,
    MongoRepository,
    PayloadError,
    Queue,
    QueueStopped,
    RepositoryUnavailable,
    Task,
    TaskFailed,
    TaskNotFound,
    TaskStatus,
    chain,
    group,
)
from taskx.node import buffer
from taskx.node.buffer import Line
from taskx.queue import flows as flows_module
from taskx.queue.flows import lay_out
from taskx.testing import ManualQueue


@pytest.fixture
def started(queue, gate):
    queue.ran = []

    @queue.executor("say")
    def say(ctx, text):
        queue.ran.append(text)
        return "".join([*(parent.result for parent in ctx.parents), text])

    @queue.executor("bad")
    def bad():
        raise ValueError("bad")

    @queue.executor("hold")
    def hold(ctx):
        gate()
        ctx.token.raise_if_cancelled()
        return "held"

    queue.say = lambda text: say.task(text=text)
    queue.start()
    return queue


BAD, HOLD = Task(type="bad"), Task(type="hold")


class TestChain:
    def test_the_steps_of_a_chain_get_the_results_before_them(self, started):
        handle = started.submit_flow(chain(*map(started.say, "abc")))
        assert handle.result(PATIENCE) == "abc"
        assert started.ran == ["a", "b", "c"]
        assert (handle.status(), handle.progress()) == (TaskStatus.COMPLETED, 100)

    def test_a_failure_cancels_the_later_steps(self, started):
        handle = started.submit_flow(
            chain(started.say("a"), BAD, started.say("b"), started.say("c"))
        )
        with pytest.raises(TaskFailed, match="bad"):
            handle.result(PATIENCE)
        assert [h.task().status for h in handle.handles] == [
            *("completed", "failed", "cancelled", "cancelled")
        ]
        assert (handle.status(), handle.progress()) == (TaskStatus.FAILED, 100)
        assert started.ran == ["a"]

    def test_a_chain_may_be_built_step_by_step(self, started):
        """Its length has no limit."""
        flow = chain(started.say("a"))
        for letter in "bc":
            flow = flow.then(started.say(letter))
        assert started.submit_flow(flow).result(PATIENCE) == "abc"
        for _ in range(2000):
            flow = flow.then(HOLD)
        assert len(lay_out(flow)[0]) == 2003

    def test_the_same_task_may_appear_twice_in_a_chain(self, started):
        task = started.say("a")
        assert started.submit_flow(chain(task, task)).result(PATIENCE) == "aa"
        assert (task.id, task.depends_on) == ("", ())


class TestGroup:
    def test_a_group_returns_results_in_order(self, started):
        handle = started.submit_flow(group(*map(started.say, "abc")))
        assert handle.result(PATIENCE) == ["a", "b", "c"]

    def test_a_step_after_a_group_gets_all_its_results(self, started):
        handle = started.submit_flow(group(*map(started.say, "abc")).then(started.say("!")))
        assert handle.result(PATIENCE) == "abc!"
        assert [h.task().params["text"] for h in handle.handles] == ["a", "b", "c", "!"]

    def test_a_failed_member_fails_the_group_and_the_others_run(self, started):
        handle = started.submit_flow(
            group(started.say("a"), BAD, started.say("b")).then(started.say("c"))
        )
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        assert handle.status() is TaskStatus.FAILED
        assert sorted(started.ran) == ["a", "b"]
        assert handle.handles[-1].cancelled()

    def test_a_cancelled_member_cancels_the_group(self, started, gate):
        handle = started.submit_flow(group(HOLD, started.say("a")))
        gate.wait_for(1)
        handle.handles[0].cancel()
        gate.open()
        with pytest.raises(futures.CancelledError):
            handle.result(PATIENCE)
        assert handle.status() is TaskStatus.CANCELLED


class TestNested:
    def test_flows_may_contain_flows(self, started):
        say = started.say
        flow = chain(
            say("a"),
            group(say("b"), chain(say("c"), say("d")), group(say("e"), say("f"))),
            say("g"),
        )
        handle = started.submit_flow(group(flow, say("h")))
        assert handle.result(PATIENCE) == ["abacdaeafg", "h"]
        assert len(handle.ids) == 8

    def test_a_group_at_the_end_returns_a_list(self, started):
        say = started.say
        handle = started.submit_flow(chain(say("a"), group(say("b"), group(say("c"), say("d")))))
        assert handle.result(PATIENCE) == ["ab", ["ac", "ad"]]


def shape(tree) -> Flow | Task:
    kind, parts = tree
    if kind == "task":
        return Task(type="t", params={"n": parts})
    return Flow(kind, [shape(part) for part in parts])


trees = st.recursive(
    st.tuples(st.just("task"), st.integers()),
    lambda inner: st.tuples(
        st.sampled_from(["chain", "group"]), st.lists(inner, min_size=1, max_size=4)
    ),
    max_leaves=25,
).filter(lambda tree: tree[0] != "task")


class NoQueue:
    """A stand-in for a queue, as these handles are only asked for their ids."""

    def handle(self, task_id):
        return None


@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
@given(trees)
def test_any_shape_of_flow_has_the_right_parents(tree):
    """Parents come first, group members share parents, and a step depends on the whole previous step."""
    tasks, laid = lay_out(shape(tree))
    position = {task.id: index for index, task in enumerate(tasks)}
    assert FlowHandle(laid, NoQueue()).ids == list(position)
    for task in tasks:
        assert all(position[parent] < position[task.id] for parent in task.depends_on)

    def check(laid, parents):
        """Check a step that begins after these parents; return the ids of its last tasks."""
        if isinstance(laid, str):
            assert tasks[position[laid]].depends_on == parents
            return [laid]
        [(kind, steps)] = laid.items()
        if kind == "group":
            return [end for step in steps for end in check(step, parents)]
        for step in steps:
            parents = check(step, parents)
        return parents

    check(laid, [])


class TestHandle:
    def test_status_and_progress_change_while_the_flow_runs(self, started, gate):
        handle = started.submit_flow(chain(started.say("a"), HOLD, started.say("b")))
        gate.wait_for(1)
        assert handle.status() is TaskStatus.RUNNING
        assert round(handle.progress()) == 33
        assert handle.wait(0.01) is False
        with pytest.raises(futures.TimeoutError):
            handle.result(0.01)
        gate.open()
        assert handle.wait(PATIENCE)

    def test_a_flow_is_pending_until_the_first_task_starts(self, queue):
        queue.executor("say")(lambda text: text)
        handle = queue.submit_flow(chain(Task(type="say", params={"text": "a"})))
        assert (handle.status(), handle.progress()) == (TaskStatus.PENDING, 0)

    def test_cancel_cancels_all_unfinished_tasks(self, started, gate):
        flow = chain(started.say("a"), HOLD, group(*map(started.say, "bcd")), started.say("e"))
        handle = started.submit_flow(flow)
        gate.wait_for(1)
        handle.cancel()
        gate.open()
        with pytest.raises(futures.CancelledError):
            handle.result(PATIENCE)
        assert [h.task().status.value for h in handle.handles] == ["completed", *["cancelled"] * 5]
        assert started.ran == ["a"]
        assert handle.status() is TaskStatus.CANCELLED
        handle.cancel()

    def test_cancel_begins_at_the_end(self, started, monkeypatch):
        """Else the end of an earlier task might start a later one before it is cancelled."""
        handle = started.submit_flow(chain(HOLD, started.say("a"), started.say("b")))
        asked = []
        with monkeypatch.context() as patched:
            patched.setattr(started, "cancel_many", asked.extend)
            handle.cancel()
        assert asked == handle.ids[::-1]

    def test_wait_waits_for_all_tasks_and_not_only_the_last(self, started, gate):
        handle = started.submit_flow(group(HOLD, started.say("a")))
        handle.handles[-1].result(PATIENCE)
        gate.wait_for(1)
        assert handle.wait(0.01) is False
        gate.open()
        assert handle.wait(PATIENCE)

    def test_a_deleted_task_counts_as_cancelled(self, started):
        """Another queue asks: a worker of this one may still be about to tell of the task's end."""
        for flow in (chain, group):
            handle = started.submit_flow(flow(started.say("a"), started.say("b")))
            handle.result(PATIENCE)
            started.delete(handle.ids[1])
            handle = Queue(started.repository).flow_handle(handle.shape)
            assert (handle.status(), handle.progress()) == (TaskStatus.CANCELLED, 100)
            with pytest.raises(TaskNotFound, match=handle.ids[1]):
                handle.result(PATIENCE)

    def test_a_deleted_step_counts_as_completed_if_a_later_step_has(self, started):
        say = started.say
        handle = started.submit_flow(chain(say("a"), group(say("b"), say("c")), say("d"), say("e")))
        assert handle.result(PATIENCE) == "abacde"
        for task_id in handle.ids[:3]:
            started.delete(task_id)
            for again in (handle, started.flow_handle(handle.shape)):
                assert (again.status(), again.progress()) == (TaskStatus.COMPLETED, 100)
                assert again.result(PATIENCE) == "abacde"

    def test_a_deleted_step_before_a_failed_step_raises_task_not_found(self, started):
        handle = started.submit_flow(chain(started.say("a"), Task(type="bad")))
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        started.delete(handle.ids[0])
        # Another queue asks: a worker of this one may still be about to tell of the task's end.
        again = Queue(started.repository).flow_handle(handle.shape)
        assert again.status() is TaskStatus.FAILED
        with pytest.raises(TaskNotFound, match=handle.ids[0]):
            again.result(PATIENCE)


class TestForkedChildren:
    """The children that a task of the flow has forked belong to it, also after that task has ended."""

    @pytest.fixture
    def queue(self):
        queue = ManualQueue()
        queue.wrong, queue.ran = set(), []

        @queue.executor()
        def part(n):
            queue.ran.append(n)
            if n in queue.wrong:
                raise ValueError(n)
            return n

        queue.executor("unpack")(
            lambda ctx: ctx.fork("parts", [part.task(n=n) for n in range(3)]) and None
        )
        queue.executor("total")(lambda ctx: sum(each.result for each in ctx.parents[1:]))
        return queue

    @staticmethod
    def statuses(queue, handle):
        return {(t.type, t.status.value) for t in queue.list_tasks(flow=handle.id).tasks}

    def test_they_are_cancelled_and_requeued_with_it(self, queue):
        handle = queue.submit_flow(chain(Task(type="unpack"), Task(type="total")))
        queue.run_next()
        handle.cancel()
        queue.run_all()
        ended = {("part", "cancelled"), ("total", "cancelled"), ("unpack", "completed")}
        assert (self.statuses(queue, handle), queue.ran) == (ended, [])
        assert handle.requeue() == 4
        queue.run_all()
        assert (handle.result(), queue.ran) == (3, [0, 1, 2])

    def test_those_that_failed_run_again_before_the_step_that_waits_for_them(self, queue):
        queue.wrong = {1}
        handle = queue.submit_flow(chain(Task(type="unpack"), Task(type="total")))
        queue.run_all()
        assert handle.status() is TaskStatus.CANCELLED
        queue.wrong.clear()
        assert handle.requeue() == 2
        queue.run_all()
        assert (handle.result(), queue.ran) == (3, [0, 1, 2, 1])

    def test_a_task_outside_of_the_flow_on_which_it_depends_stays_as_it_is(self, queue):
        queue.wrong = {7}
        outside = queue.submit("part", {"n": 7})
        first = Task(type="part", params={"n": 1}, depends_on=[outside.id])
        handle = queue.submit_flow(chain(first, Task(type="total")))
        handle.cancel()
        assert outside.task().status is TaskStatus.PENDING
        queue.run_all()
        assert handle.requeue() == 2
        assert outside.task().status is TaskStatus.FAILED


NO_SHAPES = [
    *({}, {"row": ["a"]}, {"chain": []}, {"chain": ["a"], "group": ["b"]}, {"chain": "ab"}),
    *({"group": [7]}, ["a"], None, "", {"chain": [""]}, {"chain": [{"group": [None]}]}),
]


class TestAgain:
    """A flow that did not complete and is continued."""

    @pytest.fixture
    def failing(self, started):
        """A queue whose executor ``mend`` fails for the texts in ``queue.failing``."""
        started.failing = {"b"}

        @started.executor("mend")
        def mend(ctx, text):
            started.ran.append(text)
            if text in started.failing:
                raise ValueError(text)
            return "".join([*(parent.result for parent in ctx.parents), text])

        return started

    @staticmethod
    def abc():
        a, b, c, d = (Task(type="mend", params={"text": text}) for text in "abcd")
        return chain(a, group(b, c), d)

    def test_requeue_runs_only_uncompleted_tasks_and_the_handle_follows(self, failing):
        handle = failing.submit_flow(self.abc())
        for _ in range(2):
            with pytest.raises(TaskFailed, match="ValueError: b"):
                handle.result(PATIENCE)
            assert handle.requeue() == 2
        assert handle.wait(PATIENCE)
        failing.failing.clear()
        assert handle.requeue() == 2
        assert handle.result(PATIENCE) == "abacd"
        assert (handle.status(), handle.progress()) == (TaskStatus.COMPLETED, 100)
        assert sorted(failing.ran) == list("abbbbcd")
        assert handle.requeue() == 0

    def test_a_cancelled_flow_can_be_requeued(self, failing, gate):
        handle = failing.submit_flow(chain(HOLD, failing.say("a"), failing.say("b")))
        gate.wait_for(1)
        handle.cancel()
        gate.open()
        with pytest.raises(futures.CancelledError):
            handle.result(PATIENCE)
        assert handle.requeue() == 3
        assert handle.result(PATIENCE) == "heldab"

    @pytest.mark.timing(batch=20)
    def test_a_long_flow_is_requeued_in_a_few_transactions(self, make_queue):
        queue, ran = make_queue(worker_num=2), []
        queue.executor("n")(lambda n: ran.append(n))
        tasks = [Task(type="n", params={"n": n}) for n in range(50)]
        handle = queue.submit_flow(chain(*tasks))
        handle.cancel()
        queue.repository.batches.clear()
        assert queue.requeue_many(reversed([*handle.ids, "nobody"])) == 50
        assert len(queue.repository.batches) <= 5
        queue.start()
        assert handle.wait(PATIENCE)
        assert ran == list(range(50))

    def test_a_stopped_queue_requeues_nothing(self, started):
        handle = started.submit_flow(chain(BAD))
        assert handle.wait(PATIENCE)
        started.stop()
        with pytest.raises(QueueStopped):
            handle.requeue()

    @frequent_checks
    def test_another_process_finds_a_flow_by_its_shape(self, started, repository):
        shape = started.submit_flow(
            chain(started.say("a"), group(started.say("b"), chain(started.say("c"))))
        ).shape
        again = Queue(repository).flow_handle(json.loads(json.dumps(shape)))
        assert again.result(PATIENCE) == ["ab", "ac"]
        assert (again.shape, len(again.ids)) == (shape, 3)

    @pytest.mark.parametrize("shape", NO_SHAPES)
    def test_an_invalid_shape_is_refused(self, queue, shape):
        with pytest.raises(ConfigurationError):
            queue.flow_handle(shape)


class TestStored:
    @pytest.mark.every_store
    def test_a_flow_is_stored_as_a_whole_or_not_at_all(self, started):
        started.submit("hold", id="x", delay=3600)
        again = Task(id="x", type="say", params={"text": "x"})
        with pytest.raises(DuplicateTask):
            started.submit_flow(group(started.say("a"), again))
        with pytest.raises(PayloadError):
            started.submit_flow(chain(started.say("a"), Task(type="say", params={"no": 1})))
        assert ids(started) == {"x"}

    @pytest.mark.slow
    def test_a_group_may_have_ten_thousand_members(self, make_queue):
        queue = make_queue()
        many = 200 if isinstance(queue.repository, MongoRepository) else 10_000  # a slow mock
        queue.executor("n")(lambda n: n)
        queue.executor("sum")(lambda ctx: sum(parent.result for parent in ctx.parents))
        members = [Task(type="n", params={"n": n}) for n in range(many)]
        handle = queue.submit_flow(group(*members).then(Task(type="sum")))
        queue.start()
        assert handle.result(5 * PATIENCE) == sum(range(many))
        assert handle.status() is TaskStatus.COMPLETED

    def test_a_flow_may_be_larger_than_the_buffer(self, make_queue, gate):
        """A flow is one unit, and most of its tasks must wait anyway."""
        queue = make_queue(worker_num=1, buffer_size=2)
        queue.executor("hold")(lambda n: gate() or n)
        queue.start()
        handle = queue.submit_flow(group(*(Task(type="hold", params={"n": n}) for n in range(20))))
        gate.wait_for(1)
        assert queue.buffered <= 2
        gate.open()
        assert handle.result(PATIENCE) == list(range(20))

    @pytest.mark.parametrize("make", [chain, group])
    @pytest.mark.parametrize("steps", [(), ("say",), (len,), (None,)])
    def test_chain_and_group_refuse_other_steps(self, make, steps):
        with pytest.raises(ConfigurationError, match=make.__name__):
            make(*steps)

    @pytest.mark.parametrize("flow", ["say", None, [HOLD]])
    def test_submit_flow_refuses_other_objects(self, queue, flow):
        with pytest.raises(ConfigurationError, match="chain"):
            queue.submit_flow(flow)

    def test_flows_nested_too_deep_are_refused(self, queue):
        flow = chain(HOLD)
        for _ in range(sys.getrecursionlimit()):
            flow = chain(flow)
        with pytest.raises(ConfigurationError, match="nested too deep"):
            queue.submit_flow(flow)

    def test_a_flow_of_one_task_works_with_eight_methods(self):
        queue = Queue(TinyRepository())
        queue.executor("say")(lambda text: text)
        with queue:
            handle = queue.submit_flow(chain(Task(type="say", params={"text": "a"})))
            assert handle.result(PATIENCE) == "a"
            assert (handle.status(), handle.progress()) == (TaskStatus.COMPLETED, 100)

    def test_two_large_groups_need_a_task_between_them(self, queue, monkeypatch):
        monkeypatch.setattr(flows_module, "MOST_EDGES", 8)
        three = [Task(type="n") for _ in range(3)]
        with pytest.raises(ConfigurationError, match="between two large groups"):
            lay_out(group(*three).then(group(*three)))
        lay_out(group(*three).then(Task(type="n"), group(*three)))


class TestCancelMany:
    def test_cancel_many_returns_how_many_never_run(self, started, gate):
        running = started.submit("hold")
        done = started.submit("say", {"text": "a"})
        done.result(PATIENCE)
        gate.wait_for(1)
        pending = [started.submit("hold", delay=3600) for _ in range(3)]
        wanted = [h.id for h in [running, done, *pending]]
        assert started.cancel_many([*wanted, "nobody"]) == 3
        gate.open()
        eventually(running.cancelled)
        assert {h.task().status for h in pending} == {TaskStatus.CANCELLED}
        assert done.task().status is TaskStatus.COMPLETED

    def test_delete_many_leaves_tasks_that_run(self, started, gate):
        started.executor("held")(gate)
        running = started.submit("held").id
        gate.wait_for(1)
        wanted = [started.submit("held", delay=60).id for _ in range(2)]
        assert started.delete_many([*wanted, running, "nobody"]) == 2
        assert [task.id for task in started.list_tasks()[0]] == [running]
        gate.open()

    def test_cancel_many_of_no_tasks_does_nothing(self, queue: Queue):
        assert queue.cancel_many([]) == 0

    @pytest.mark.timing(batch=100)
    def test_the_buffer_is_sorted_at_most_once_for_each_transaction(self, busy, gate, monkeypatch):
        """Once for each task would take minutes with many thousand tasks."""
        queue = busy(buffer_size=1000)
        handles = queue.submit_many(Task(type="note", params={"n": n}) for n in range(301))
        lines = []
        monkeypatch.setattr(buffer, "Line", lambda items: lines.append(Line(items)) or lines[-1])
        assert queue.cancel_many(handle.id for handle in handles[:-1]) == 300
        assert queue.buffered == 1
        assert 1 <= len(lines) <= 3
        gate.open()
        assert handles[-1].result(PATIENCE) is None
        assert queue.ran == [300]

    @pytest.mark.timing(batch=2)
    def test_cancelled_tasks_are_reported_even_if_a_later_batch_fails(self, make_queue, gate):
        """Each transaction is complete by itself, including tokens, hooks and the buffer."""
        finished = []

        class Listens(Hook):
            def finished(self, task):
                finished.append(task.id)

        queue = make_queue(worker_num=1, hooks=[Listens()])

        @queue.executor("hold")
        def hold(ctx):
            gate()
            ctx.token.wait(PATIENCE)
            ctx.token.raise_if_cancelled()

        queue.start()
        handles = [queue.submit("hold", id=str(n)) for n in range(4)]
        gate.wait_for(1)
        gate.open()

        def fail(writes):
            if any(write.id == "2" for write in writes):
                raise RepositoryUnavailable("away")

        queue.repository.before = fail
        with pytest.raises(RepositoryUnavailable):
            queue.cancel_many(handle.id for handle in handles)
        queue.repository.before = lambda writes: None
        eventually(lambda: sorted(finished) == ["0", "1"])
        assert [handle.task().status for handle in handles[:2]] == ["cancelled"] * 2
        assert queue.cancel_many(["2", "3"]) + len(finished) >= 3


class TestFlowIds:
    def test_the_tasks_of_a_flow_are_listed_by_its_id(self, queue):
        queue.declare("t")
        task = Task(type="t")
        first = queue.submit_flow(chain(task, group(task, task)))
        second = queue.submit_flow(group(task))
        queue.submit(task)
        assert first.id != second.id
        for flow in (first, second):
            tasks = queue.list_tasks(flow=flow.id).tasks
            assert {task.id for task in tasks} == {*flow.ids}
            assert {task.flow for task in tasks} == {flow.id}
        assert queue.count_tasks(flow=first.id) == 3
        assert queue.count_tasks(flow="none") == 0

    @pytest.mark.every_store
    def test_the_tags_of_a_flow_are_added_to_those_of_its_tasks(self, queue):
        queue.declare("t")
        flow = group(Task(type="t", tags=["a"]), Task(type="t"))
        handle = queue.submit_flow(flow, tags=["x", "a"])
        tagged = {task.id: task.tags for task in queue.iter_tasks(flow=handle.id)}
        assert [tagged[task_id] for task_id in handle.ids] == [("a", "x"), ("x", "a")]
        assert queue.count_tasks(tag="x", flow=handle.id) == 2
        with pytest.raises(ConfigurationError, match="white space"):
            queue.submit_flow(flow, tags=["a b"])

    def test_a_handle_of_a_shape_reads_the_id_of_its_flow(self, queue):
        queue.declare("t")
        task = Task(type="t")
        whole = queue.submit_flow(chain(task, task, task))
        other = queue.flow_handle(whole.shape)
        queue.delete(whole.ids[2])
        assert other.id == whole.id
        for task_id in whole.ids[:2]:
            queue.delete(task_id)
        assert (other.id, queue.flow_handle(whole.shape).id) == (whole.id, "")


class TestListOfFlows:
    @pytest.fixture
    def queue(self, make_queue):
        queue = make_queue()
        queue.declare("t")
        return queue

    def submit(self, queue, count):
        return queue.submit_flow(group(*(Task(type="t") for _ in range(count))))

    @pytest.mark.every_store
    def test_flows_are_listed_newest_first_with_counts_by_status(self, queue):
        handles = [self.submit(queue, count) for count in (3, 1, 2)]
        queue.submit("t", tags=["a"])
        queue.cancel_task(handles[0].ids[0])
        flows = queue.flows()
        assert [flow.id for flow in flows] == [handle.id for handle in reversed(handles)]
        assert [flow.total for flow in flows] == [2, 1, 3]
        assert flows[2].counts == {TaskStatus.PENDING: 2, TaskStatus.CANCELLED: 1}
        assert [flow.status for flow in flows] == ["pending", "pending", "running"]
        created = queue.list_tasks(flow=flows[0].id).tasks[0].created_at
        assert (flows[0].created_at, flows[0].exact) == (created, True)

    def test_pages_of_flows_cover_each_flow_once(self, queue):
        handles = [self.submit(queue, 2) for _ in range(5)]
        found, after = [], None
        while page := queue.flows(at_most=2, after=after):
            found += [flow.id for flow in page]
            after = found[-1]
            self.submit(queue, 1)  # newer flows are not in the pages that follow
        assert found == [handle.id for handle in reversed(handles)]

    def test_a_flow_is_listed_as_long_as_one_of_its_tasks_is_stored(self, queue):
        handle = self.submit(queue, 3)
        for left, task_id in zip((2, 1, 0), handle.ids, strict=True):
            queue.delete(task_id)
            assert [flow.total for flow in queue.flows()] == [left][:left]

    @pytest.mark.timing(most_of_flow=3)
    def test_a_list_counts_a_limited_number_of_tasks_of_each_flow(self, queue):
        self.submit(queue, 2)
        self.submit(queue, 5)
        assert [(flow.total, flow.exact) for flow in queue.flows()] == [(3, False), (2, True)]

    @pytest.mark.parametrize(
        "wrong", [{"at_most": 0}, {"at_most": "5"}, {"after": ""}, {"after": 5}]
    )
    def test_a_wrong_argument_of_a_list_is_refused(self, queue, wrong):
        with pytest.raises(ConfigurationError):
            queue.flows(**wrong)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (["pending"], "pending"),
        (["completed", "pending"], "running"),
        (["running", "failed"], "running"),
        (["completed", "failed", "cancelled"], "failed"),
        (["completed", "cancelled"], "cancelled"),
        (["completed"], "completed"),
    ],
)
def test_a_summary_has_the_status_of_the_whole_flow(statuses, status):
    counts = {TaskStatus(name): 1 for name in statuses}
    summary = FlowSummary(id="f", created_at=None, counts=counts, exact=True)
    assert (summary.status, summary.total) == (status, len(statuses))


def test_a_repository_of_eight_methods_lists_flows_of_one_task():
    """It cannot store several tasks at once, and so no larger flow."""
    queue = Queue(TinyRepository())
    queue.declare("t")
    handles = [queue.submit_flow(group(Task(type="t"))) for _ in range(3)]
    assert [flow.id for flow in queue.flows(at_most=2)] == [handles[2].id, handles[1].id]
    assert [flow.id for flow in queue.flows(after=handles[1].id)] == [handles[0].id]
    assert queue.flows()[0].counts == {TaskStatus.PENDING: 1}
