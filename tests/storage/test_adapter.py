"""The adapter on a user's eight-method repository that already holds tasks."""

import math

import pytest
from helpers import PATIENCE, held_on

from taskx import ConfigurationError, Task, TaskFailed, TaskFilter, TaskStatus
from taskx.node.housekeeper import unfinished
from taskx.stores.adapter import EightMethodAdapter
from taskx.stores.queries import matching, owners
from taskx.tasks.clock import to_datetime
from taskx.tasks.payload import DEFAULT_MAX_SIZE

from .repositories import MAKERS, TinyRepository, ids, insert


@pytest.fixture(params=["adapter", "adapter-13"])
def store(request, tmp_path, clock, timing):
    return MAKERS[request.param](tmp_path, clock, timing)


def test_tasks_found_running_at_start_count_as_left_behind(store, clock):
    """They do so even if they were read before the queue started."""
    store.inner.create(Task(id="a", type="t", created_at=clock.now()))
    store.inner.create(Task(id="b", type="t", created_at=clock.now()))
    store.inner.update_status("b", TaskStatus.RUNNING, "")
    assert store.get_by_id("b").status is TaskStatus.RUNNING
    store.house.prepare()
    assert ids(store.ready(["t"], 10)) == ["a"]
    [owner] = owners(store)
    assert owner not in {node.id for node in store.liveness.nodes()}
    assert held_on(store, owner) == ["b"]


def test_unfinished_tasks_are_read_in_pages(store, clock):
    for number in range(1003):
        store.inner.create(Task(id=f"{number:04}", type="t", created_at=clock.now()))
        clock.advance(0.001)
    store.house.prepare()
    assert ids(store.ready(["t"], 2000)) == [f"{number:04}" for number in range(1003)]


def test_stored_values_may_be_larger_than_the_default_limit(store, clock):
    """The limit is for what is submitted; what is stored was accepted before."""
    large = {"a": "x" * DEFAULT_MAX_SIZE}
    store.inner.create(Task(id="a", type="t", params=large, created_at=clock.now()))
    store.house.prepare()
    assert ids(store.ready(["t"], 10)) == ["a"]
    task = store.get_by_id("a")
    task.message = "by hand"
    store.update(task)
    assert (store.get_by_id("a").params, store.get_by_id("a").message) == (large, "by hand")


def test_a_stored_value_that_is_not_json_damages_its_task_alone(make_queue, clock):
    repository = TinyRepository()
    for name, value in (("bad", float("nan")), ("good", 1)):
        repository.create(Task(id=name, type="t", params={"a": value}, created_at=clock.now()))
    queue = make_queue(repository)
    queue.executor("t")(lambda a: a)
    queue.start()
    assert queue.handle("good").result(PATIENCE) == 1
    with pytest.raises(TaskFailed, match="the stored record is damaged"):
        queue.handle("bad").result(PATIENCE)
    assert math.isnan(repository.get_by_id("bad").params["a"])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_iteration_passes_over_no_task_without_a_date(store, clock, batch):
    """A user's program may have stored such tasks; here they come last."""
    dated = [Task(id=f"dated-{n}", type="t", created_at=clock.now()) for n in range(3)]
    dateless = [Task(id=f"dateless-{n}", type="t") for n in range(4)]

    def list_(filter):
        before = [
            task for task in dated if filter.end_date is None or task.created_at <= filter.end_date
        ]
        return [*before, *dateless][filter.offset : filter.offset + filter.limit]

    store.inner.list = list_
    assert ids(matching(store, TaskFilter())) == ids([*dated, *dateless])


@pytest.mark.timing(batch=1)
def test_an_iteration_passes_over_no_task_after_a_damaged_one(store, clock):
    """The date that a damaged record shows may not be the one that it is listed by."""
    clock.advance(1)
    early = clock.now()
    clock.advance(1)
    tasks = [
        Task(id="damaged", type="t", created_at=to_datetime(0), damage="created_at"),
        Task(id="late", type="t", created_at=clock.now()),
        Task(id="early", type="t", created_at=early),
    ]
    store.inner.list = lambda filter: [
        task
        for task in tasks
        if task.damage or filter.end_date is None or task.created_at <= filter.end_date
    ][: filter.limit]
    assert ids(matching(store, TaskFilter())) == ["damaged", "late", "early"]


def test_a_task_without_completed_at_can_have_ended(store, add):
    """A user's ``update_status`` need not set ``completed_at``."""
    add("a")
    store.inner.update_status("a", TaskStatus.CANCELLED, "")
    assert store.get_by_id("a").status is TaskStatus.CANCELLED
    assert ids(store.ready(["t"], 10)) == []
    assert not unfinished(store, ["t"])


def test_an_id_can_be_used_again_after_the_user_deleted_its_task(store, add, clock):
    """The user's code deletes it without the adapter."""
    add("a", owner="node")
    store.inner.delete("a")
    add("a")
    assert held_on(store, "node") == []
    assert ids(store.ready(["t"], 10)) == ["a"]
    store.inner.delete("a")
    assert store.get_many(["a"]) == {}
    assert ids(store.ready(["t"], 10)) == []


@pytest.mark.parametrize(
    "option", ["priority", "timeout", "max_attempts", "max_crashes", "expires_at"]
)
def test_an_option_that_is_not_kept_is_refused(tmp_path, clock, option):
    store = MAKERS["adapter-13"](tmp_path, clock)
    with pytest.raises(ConfigurationError, match=f"does not keep {option}"):
        store.apply([insert("a", clock, **{option: 7})])
    assert store.count(TaskFilter()) == 0


def test_a_class_without_all_eight_methods_is_refused():
    class Seven:
        create = get_by_id = update = update_status = update_progress = list = count = print

    with pytest.raises(ConfigurationError, match="lacks delete"):
        EightMethodAdapter(Seven())


def test_eight_methods_refuse_a_batch_in_one_transaction(store, clock):
    with pytest.raises(ConfigurationError, match="TinyRepository"):
        store.apply([insert("a", clock), insert("b", clock)], all_or_nothing=True)
    assert store.count(TaskFilter()) == 0
    assert list(store.apply([insert("a", clock)], all_or_nothing=True)) == [True]


@pytest.mark.parametrize(
    "option", [{"unique_key": "k"}, {"depends_on": ["a"]}, {"concurrency_key": "k"}]
)
def test_eight_methods_refuse_relations_between_tasks(store, clock, option):
    with pytest.raises(ConfigurationError, match=f"{next(iter(option))}; nothing was stored"):
        store.apply([insert("b", clock, **option)])
    assert store.get_many(["b"]) == {}


def test_eight_methods_refuse_notes(store):
    with pytest.raises(ConfigurationError, match="nothing was stored"):
        store.put_note("a", "one", 0)
    assert store.notes("") == {}
