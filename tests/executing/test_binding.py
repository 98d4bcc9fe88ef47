"""Executors bound with options and queues, and executors in the place of a task."""

from __future__ import annotations

import functools

import pytest
from helpers import PATIENCE

import taskx
from taskx import (
    BoundExecutor,
    ConfigurationError,
    DuplicateTask,
    MemoryRepository,
    PayloadError,
    Queue,
    QueueStopped,
    Task,
    TaskExecutor,
    TaskStatus,
    UnknownTaskType,
    chain,
    every,
    group,
)
from taskx.attempt.executors import Queues
from taskx.testing import ManualQueue, manual


@pytest.fixture
def mail(queue):
    return queue.executor("mail", priority=1)(lambda to, text="": f"{to}: {text}")


@pytest.fixture
def beat(queue):
    return queue.executor("beat")(lambda at=0: at)


# Options


def test_bound_options_are_those_of_each_submit(make_queue, clock):
    mail = make_queue(clock=clock).executor("mail")(lambda to, text="": f"{to}: {text}")
    urgent = mail.using(delay=60, priority=5, created_by="me", unique_key="k", on_conflict="return")
    first, second = urgent.submit(to="a"), urgent.submit("b", text="x")
    assert first.id == second.id
    task = first.task()
    assert task.params == {"to": "a"}
    assert (task.priority, task.created_by, task.unique_key) == (5, "me", "k")
    assert (task.run_at - task.created_at).total_seconds() == 60


def test_a_bound_executor_never_changes(queue, mail):
    parents = [mail.submit(to="a")]
    low = mail.using(priority=-1, depends_on=parents)
    parents.append(mail.submit(to="b"))
    high = low.using(priority=7, created_by="me")
    assert (low.submit(to="x").task().priority, high.submit(to="x").task().priority) == (-1, 7)
    assert low.submit(to="x").task().depends_on == high.task(to="x").depends_on == [parents[0].id]
    assert low.options == {"priority": -1, "depends_on": (parents[0].id,)}
    with pytest.raises(TypeError):
        low.options["priority"] = 5
    assert mail.submit(to="x").task().priority == 1
    assert repr(high.using(depends_on=[])).startswith("<BoundExecutor 'mail' with priority=7, ")


def test_a_bound_priority_of_zero_wins_over_the_executors(mail):
    assert mail.using(priority=0).submit(to="x").task().priority == 0


def test_a_bound_option_of_none_is_left_out(mail):
    bound = mail.using(timeout=5, delay=None).using(timeout=None)
    assert bound.options == {"timeout": 5}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"prioritty": 5},
            TypeError,
            "no option prioritty .did you mean 'priority'..; params are given to submit",
        ),
        ({"to": "me"}, TypeError, "no option to"),
        ({"countdown": 5}, TypeError, "no option countdown .for countdown write delay=….; params"),
        ({"priority": "high"}, ConfigurationError, "priority must be a whole number"),
        ({"delay": -1}, ConfigurationError, "delay must be"),
        ({"timeout": 0}, ConfigurationError, "timeout must be more than 0"),
        ({"on_conflict": "return"}, ConfigurationError, "requires unique_key; .* DuplicateTask"),
        ({"unique_key": "k", "on_conflict": "x"}, ConfigurationError, "on_conflict must be"),
        ({"depends_on": "an id"}, ConfigurationError, "depends_on must be a list"),
        ({"id": ""}, ConfigurationError, "id"),
    ],
)
def test_a_wrong_option_is_refused_when_it_is_bound(mail, options, error, text):
    with pytest.raises(error, match=text):
        mail.using(**options)
    with pytest.raises(error, match=text):
        mail.using(created_by="me").using(**options)


def test_the_connection_of_a_transaction_is_given_to_the_queue(mail):
    call = r"; write queue\.submit\(executor, \{…\}, connection=…\)$"
    with pytest.raises(PayloadError, match=call):
        mail.submit(to="a", connection="session")
    with pytest.raises(TypeError, match=call):
        mail.using(connection="session")


def test_a_bound_executor_makes_tasks_with_its_options(queue, mail):
    task = mail.using(priority=5, timeout=7, unique_key="k", unique_scope="ever").task("a")
    assert (task.params, task.priority, task.timeout) == ({"to": "a"}, 5, 7)
    assert (task.unique_key, task.unique_scope) == ("k", "ever")
    queue.submit(task)
    with pytest.raises(DuplicateTask):
        queue.submit(task)


@pytest.mark.parametrize("option", [{"delay": 5}, {"unique_key": "k", "on_conflict": "return"}])
def test_an_option_that_only_a_submit_has_is_not_lost_on_a_task(beat, option):
    bound = beat.using(**option)
    with pytest.raises(ConfigurationError, match=f"a Task cannot hold {[*option][-1]}"):
        bound.task(5)
    with pytest.raises(ConfigurationError, match=f"a Task cannot hold {[*option][-1]}"):
        chain(bound)


# An executor in the place of a task


def test_submit_takes_an_executor_and_its_params(queue, mail, beat):
    handle = queue.submit(mail, {"to": "a"}, created_by="me")
    assert handle.task().params == {"to": "a"}
    assert (handle.task().type, handle.task().created_by) == ("mail", "me")
    assert queue.submit(beat).task().params == {}
    queue.start()
    assert handle.result(PATIENCE) == "a: "


def test_an_option_of_a_call_wins_over_a_bound_one(queue, mail):
    bound = mail.using(priority=5, created_by="me")
    handle = queue.submit(bound, {"to": "a"}, priority=0, created_by=None)
    assert (handle.task().priority, handle.task().created_by) == (0, "me")
    assert queue.submit(bound, {"to": "a"}).task().priority == 5


def test_a_bound_conflict_rule_is_heeded_by_the_queues_submit(queue, mail):
    once = mail.using(unique_key="k", on_conflict="return")
    assert queue.submit(once, {"to": "a"}).id == queue.submit(once, {"to": "b"}).id


@pytest.mark.parametrize("bound", [False, True])
def test_an_executor_without_its_params_is_refused_with_the_way_out(queue, mail, bound):
    executor = mail.using(priority=5) if bound else mail
    for call in (queue.submit, chain, group, functools.partial(queue.schedule, "s", every(5))):
        with pytest.raises(PayloadError, match=r"'mail' requires to: write executor\.task\(to=…\)"):
            call(executor)


def test_the_way_out_names_the_function(queue):
    @queue.executor()
    def resize(image, *, width, height=5):
        return image

    with pytest.raises(PayloadError, match=r"write resize\.task\(image=…, width=…\)"):
        chain(resize)


def test_params_that_do_not_fit_an_executor_are_refused(queue, mail):
    with pytest.raises(PayloadError, match="'mail' does not take 'too'"):
        queue.submit(mail, {"to": "a", "too": "b"})
    with pytest.raises(TypeError, match="no option to; params are given as a dict"):
        queue.submit(mail, to="a")


def test_an_executor_of_another_queue_is_refused_by_its_type(queue):
    with pytest.raises(UnknownTaskType, match="'stranger'"):
        queue.submit(taskx.executor("stranger")(lambda: 1))


class Sync(TaskExecutor):
    type = "sync"

    def execute(self, ctx, task):
        return None


def some_function():
    return None


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (5, "not 5$"),
        (None, "not None$"),
        (["mail"], r"not \['mail'\]$"),
        (some_function, r"decorate some_function\(\) with @queue.executor\(\)$"),
        (Sync(), "give its type, 'sync'$"),
    ],
)
def test_what_a_call_takes_is_said_of_a_wrong_argument(queue, thing, text):
    for what, call in (
        ("submit", queue.submit),
        ("schedule", functools.partial(queue.schedule, "s", every(5))),
    ):
        with pytest.raises(
            ConfigurationError, match=f"{what} requires a type, an executor or a Task, .*{text}"
        ):
            call(thing)
    with pytest.raises(
        ConfigurationError, match=f"a chain requires tasks, executors and flows, .*{text}"
    ):
        chain(thing)
    with pytest.raises(ConfigurationError, match=f"map requires a type or an executor, .*{text}"):
        queue.map(thing, [1])
    with pytest.raises(ConfigurationError, match=r"expected a Task, .*executor\.task"):
        queue.submit_many([thing])


def test_a_call_that_takes_only_a_type_says_which_one_an_executor_has(queue, beat):
    for call in (queue.pause, lambda kind: queue.count_tasks(type=kind)):
        with pytest.raises(ConfigurationError, match=r"not PlainExecutor; give its type, 'beat'$"):
            call(beat)


@pytest.mark.every_store
def test_flows_take_executors(queue, beat):
    flow = chain(beat, group(beat.using(priority=3), beat.task(at=5))).then(beat)
    queue.start()
    handle = queue.submit_flow(flow)
    assert handle.result(PATIENCE) == 0
    assert [one.result() for one in handle.handles] == [0, 0, 5, 0]
    assert [one.task().priority for one in handle.handles] == [0, 3, 0, 0]


def test_map_takes_a_bound_executor(queue, beat):
    queue.start()
    assert list(queue.map(beat.using(created_by="me", priority=2), [1, 2], priority=3)) == [1, 2]
    tasks, _ = queue.list_tasks()
    assert {(task.created_by, task.priority) for task in tasks} == {("me", 3)}
    with pytest.raises(TypeError, match=r"map\(\) has no option delay: the executor is bound"):
        queue.map(beat.using(delay=5), [1])


def test_schedules_take_executors(queue, mail, beat):
    assert queue.schedule("a", every(60), beat).type == "beat"
    made = queue.schedule(
        "b", every(60), mail.using(timeout=5, priority=0), {"to": "a"}, priority=2
    )
    assert (made.type, made.params) == ("mail", {"to": "a"})
    task = made.trigger().task()
    assert (task.timeout, task.priority) == (5, 2)
    with pytest.raises(TypeError, match=r"schedule\(\) has no option delay: the executor is bound"):
        queue.schedule("c", every(60), mail.using(delay=5), {"to": "a"})


# Queues


@pytest.fixture
def ping():
    return taskx.executor("ping")(lambda: "pong")


def new_queue(executor, name: str = "") -> Queue:
    queue = Queue(MemoryRepository())
    queue.register_executor(executor)
    return queue


def test_an_executor_of_two_queues_must_be_told_which(ping):
    one, two = new_queue(ping), new_queue(ping)
    for call in (ping.submit, ping.using(priority=5).submit):
        with pytest.raises(ConfigurationError, match="registered with 2 queues") as caught:
            call()
        assert repr(one) in str(caught.value)
        assert repr(two) in str(caught.value)
        assert "executor.on(queue).submit" in str(caught.value)
    ping.on(one).submit()
    ping.on(two).using(priority=5).submit()
    ping.using(priority=6).on(two).submit()
    assert [task.priority for task in one.list_tasks()[0]] == [0]
    assert sorted(task.priority for task in two.list_tasks()[0]) == [5, 6]


def test_registering_with_the_same_queue_again_keeps_it_the_only_one(ping):
    queue = new_queue(ping)
    ping._bind(queue)
    assert ping.submit().task().status is TaskStatus.PENDING


def test_an_executor_submits_to_a_queue_that_only_declares_its_type(ping):
    queue = Queue(MemoryRepository())
    queue.declare("ping")
    assert ping.on(queue).submit().task().type == "ping"
    with pytest.raises(ConfigurationError, match="not registered with a queue"):
        ping.submit()


@pytest.mark.parametrize("thing", [None, "queue", MemoryRepository()])
def test_an_executor_can_only_be_bound_to_a_queue(ping, thing):
    with pytest.raises(ConfigurationError, match=r"on\(\) requires a Queue, not"):
        ping.on(thing)


def test_a_stopped_queue_does_not_count(ping):
    first = new_queue(ping)
    first.stop()
    second = new_queue(ping)
    assert ping.submit().task() in second.list_tasks()[0]
    third = new_queue(ping)
    with pytest.raises(ConfigurationError, match="2 queues"):
        ping.submit()
    second.stop()
    assert ping.submit().task() in third.list_tasks()[0]
    third.stop()
    with pytest.raises(QueueStopped):
        ping.submit()


def test_a_queue_that_no_code_holds_does_not_count(ping):
    queue = new_queue(ping)
    for _ in range(3):
        new_queue(ping)
    assert ping.submit().task() in queue.list_tasks()[0]


def test_an_executor_keeps_its_only_queue(ping):
    new_queue(ping)
    assert ping.submit().task().status is TaskStatus.PENDING


def test_a_queue_in_a_test_kit_block_stays_the_executors_queue(ping):
    queue = new_queue(ping)
    with manual(queue) as driven:
        handle = ping.submit()
        driven.run_all()
        assert handle.result(0) == "pong"
    assert queue.list_tasks() == ([], 0)
    ping.submit()
    assert queue.list_tasks()[1] == 1


def test_a_test_queue_does_not_take_the_applications_tasks(ping):
    application = new_queue(ping)
    test = ManualQueue()
    test.register_executor(ping)
    with pytest.raises(ConfigurationError, match="2 queues"):
        ping.submit()
    ping.on(test).submit()
    test.stop()
    ping.submit()
    assert (application.list_tasks()[1], test.list_tasks()[1]) == (1, 1)


def test_two_threads_can_register_an_executor_at_once():
    class Interrupted(Queues):
        """Another thread adds a queue while this one does."""

        later: list[Queue]

        def _alive(self):
            alive = super()._alive()
            if self.later:
                self.add(self.later.pop())
            return alive

    for number in range(1, 4):
        queues, known = [Queue(MemoryRepository()) for _ in range(number + 1)], Interrupted()
        known.later = queues[1:]
        known.add(queues[0])
        assert known.only is None
        with pytest.raises(ConfigurationError, match=f"registered with {number + 1} queues"):
            known.choose("ping")


def test_a_bound_executor_cannot_be_registered(queue, ping):
    with pytest.raises(
        ConfigurationError, match="bound with options of submits: register the executor"
    ):
        queue.register_executor(ping.using(priority=5))


def test_a_bound_executor_is_of_its_own_class(mail):
    assert isinstance(mail.using(), BoundExecutor)
    assert mail.using().type == "mail"
    assert isinstance(mail.using().task("a"), Task)


@pytest.mark.parametrize("call", ["submit", "map", "schedule"])
def test_a_queue_refuses_an_executor_that_is_bound_to_another_queue(queue, beat, call):
    other = Queue(MemoryRepository())
    bound = beat.on(other)
    arguments = {"submit": (bound,), "map": (bound, [1]), "schedule": ("s", every(60), bound)}[call]
    with pytest.raises(ConfigurationError, match="bound to another queue: call its own submit"):
        getattr(queue, call)(*arguments)
    assert queue.count_tasks() == 0
    assert queue.submit(beat.on(queue)).task().type == "beat"
