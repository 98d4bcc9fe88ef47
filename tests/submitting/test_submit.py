"""Submitting: an accepted task is stored as given, a refused one leaves nothing behind."""

from __future__ import annotations

import logging
import threading
from datetime import datetime, timedelta, timezone

import attrs
import pytest
from helpers import PATIENCE, eventually, ids, pool_of, run_in_thread
from storage.repositories import TinyRepository

import taskx
from taskx import (
    Config,
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    MemoryRepository,
    PayloadError,
    Queue,
    QueueFull,
    QueueStopped,
    RepositoryError,
    RepositoryUnavailable,
    SQLiteRepository,
    SystemClock,
    Task,
    TaskStatus,
    TaskxError,
    UnknownTaskType,
)
from taskx.tasks.clock import to_datetime
from taskx.tasks.writes import Insert


@pytest.fixture
def narrow(busy):
    """A started queue with room for two tasks and one busy worker; ``strict`` takes a number and a text."""
    queue = busy(buffer_size=2, max_payload_size=1000)

    @queue.executor("strict")
    def strict(ctx, number, text="", **more):
        return number

    @queue.executor("closed")
    def closed(number):
        return number

    return queue


cycle: list = []
cycle.append(cycle)

BAD_PARAMS = {
    "not a dict": (["number"], "params"),
    "missing": ({"text": "x"}, "number"),
    "nan": ({"number": [1, float("nan")]}, r"params.number\[1\]"),
    "object": ({"number": {"deep": object()}}, r"params.number.deep: object is not JSON"),
    "key": ({"number": {1: 2}}, r"params.number\[1\]"),
    "cycle": ({"number": cycle}, "contains itself"),
    "surrogate": ({"number": "\ud800"}, r"params.number: contains a lone surrogate"),
    "64 bits": ({"number": 2**63}, r"params.number: integer does not fit into 64 bits"),
    "bytes": ({"number": b"x"}, r"params.number: bytes"),
    "too large": ({"number": "x" * 1001}, "max_payload_size"),
}

BAD_OPTIONS = [
    {"timeout": -1},
    {"timeout": 0},
    {"timeout": float("nan")},
    {"timeout": "5"},
    {"timeout": True},
    {"priority": True},
    {"priority": False},
    {"priority": 1.5},
    {"priority": 10**9},
    {"max_attempts": 0},
    {"max_attempts": True},
    {"max_attempts": 2.0},
    {"max_crashes": 0},
    {"delay": -1},
    {"delay": float("inf")},
    {"delay": 1e300},
    {"delay": "soon"},
    {"run_at": datetime(2030, 1, 1)},
    {"run_at": "2030-01-01T00:00:00Z"},
    pytest.param({"timeout": 10**400}, id="huge timeout"),
    pytest.param({"delay": 10**400}, id="huge delay"),
    pytest.param({"unique_key": "k", "unique_scope": 10**400}, id="huge scope"),
    {"id": ""},
    {"run_at": datetime(2030, 1, 1, tzinfo=timezone.utc), "delay": 1},
    {"id": 5},
    {"id": "x" * 256},
    {"id": "a\0b"},
    {"id": {"$ne": ""}},
    {"created_by": 5},
    {"created_by": "\ud800"},
]


class TestRefused:
    """Every kind of error leaves no record, and frees the slot in the buffer."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, narrow):
        before = ids(narrow)
        yield
        assert ids(narrow) - {"kept"} == before
        room = 1 if "kept" in ids(narrow) else 2
        for _ in range(room):
            narrow.submit("note")
        with pytest.raises(QueueFull):
            narrow.submit("note")

    def test_an_unknown_type_is_refused(self, narrow):
        with pytest.raises(UnknownTaskType, match=r"'nobody'.*note"):
            narrow.submit("nobody")

    @pytest.mark.parametrize("case", BAD_PARAMS)
    def test_invalid_params_are_refused(self, narrow, case):
        params, path = BAD_PARAMS[case]
        with pytest.raises(PayloadError, match=path):
            narrow.submit("strict", params)

    def test_params_that_the_function_does_not_take_are_refused(self, narrow):
        with pytest.raises(PayloadError, match=r"does not take 'nummer'; it takes number"):
            narrow.submit("closed", {"number": 1, "nummer": 2})

    def test_an_option_among_the_params_is_named_with_its_place(self, narrow):
        square = narrow.executor("square")(lambda n: n)
        text = (
            r"^params: 'square' does not take 'delay', 'm', 'priority'; it takes n; "
            r"options are given as using\(delay=…, priority=…\).submit\(…\)$"
        )
        with pytest.raises(PayloadError, match=text):
            square.submit(n=1, delay=60, priority=5, m=2)
        assert square.using(priority=5).task(n=1).priority == 5

    def test_an_error_names_all_params_that_do_not_fit(self, narrow):
        square = narrow.executor("square")(lambda n, *, unit="m": n)
        rest = narrow.executor("rest")(lambda a, **more: a)
        nothing = narrow.executor("nothing")(lambda: 1)
        text = r"^params: 'square' requires n and does not take 'm'; it takes n, unit$"
        for call in (
            lambda: square.submit(m=1),
            lambda: square.using(priority=5).task(m=1),
            lambda: narrow.submit(square, {"m": 1}),
            lambda: narrow.submit("square", {"m": 1}),
        ):
            with pytest.raises(PayloadError, match=text):
                call()
        with pytest.raises(PayloadError, match=r"'square' does not take 'm'; it takes n, unit$"):
            square.submit(1, m=1)
        with pytest.raises(
            PayloadError, match="'square': too many positional arguments; it takes n"
        ):
            square.submit(1, 2)
        with pytest.raises(PayloadError, match="'square': multiple values for argument 'n'"):
            square.submit(1, n=2)
        with pytest.raises(PayloadError, match=r"'rest' requires a; it takes a, \*\*more$"):
            rest.submit(b=1)
        with pytest.raises(PayloadError, match=r"'nothing' does not take 'a'; it takes no params$"):
            nothing.submit(a=1)

    @pytest.mark.parametrize("kind", ["strict", "closed"])
    def test_a_param_named_ctx_is_refused(self, narrow, kind):
        with pytest.raises(PayloadError, match="ctx"):
            narrow.submit(kind, {"number": 1, "ctx": 2})

    @pytest.mark.parametrize("options", BAD_OPTIONS, ids=repr)
    def test_invalid_options_are_refused(self, narrow, options):
        with pytest.raises(ConfigurationError):
            narrow.submit("note", **options)

    def test_params_given_as_options_are_refused(self, narrow):
        with pytest.raises(TypeError, match="no option number; params are given as a dict"):
            narrow.submit("strict", number=1)

    @pytest.mark.parametrize(
        ("run_at", "problem"),
        [
            ("2020", "run_at must be a datetime, not str"),
            (datetime(2030, 1, 1), "run_at must be an aware datetime, such as .* no time zone"),
            (
                datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-5))),
                "run_at must be before the year 10000 in UTC, not 9999-12-31 23:00:00-05:00",
            ),
        ],
    )
    def test_an_invalid_run_at_is_refused_with_the_reason(self, narrow, run_at, problem):
        for submit in (
            lambda: narrow.submit("note", run_at=run_at),
            lambda: narrow.submit(Task(type="note", run_at=run_at)),
        ):
            with pytest.raises(ConfigurationError, match=f"^{problem}$"):
                submit()

    def test_an_empty_id_option_is_refused(self, narrow):
        with pytest.raises(ConfigurationError, match="id must not be empty"):
            narrow.submit("note", id="")

    def test_an_empty_type_is_refused(self, narrow):
        for submit in (
            lambda: narrow.submit("", {}),
            lambda: narrow.submit(Task(params={})),
            lambda: narrow.submit_many([Task(type="note"), Task()]),
            lambda: next(narrow.map("", [{}])),
            lambda: narrow.declare("empty", ""),
        ):
            with pytest.raises(ConfigurationError, match="type must not be empty"):
                submit()
        with pytest.raises(UnknownTaskType, match="'empty'"):
            narrow.submit("empty")

    @pytest.mark.parametrize("type", [None, 5, [], {}])
    def test_a_type_that_is_no_text_is_refused(self, narrow, type):
        with pytest.raises(ConfigurationError, match="type must be a str, not"):
            narrow.submit(Task(type=type))

    @pytest.mark.every_store
    def test_a_misspelt_option_is_refused(self, narrow):
        with pytest.raises(TypeError, match="prioritty"):
            narrow.submit("note", prioritty=5)

    def test_params_together_with_a_task_are_refused(self, narrow):
        with pytest.raises(TypeError, match="params"):
            narrow.submit(Task(type="note"), {"n": 1})

    @pytest.mark.parametrize("status", [s for s in TaskStatus if s is not TaskStatus.PENDING])
    def test_a_task_that_is_not_pending_is_refused(self, narrow, status):
        with pytest.raises(InvalidTransition, match=status.value):
            narrow.submit(Task(type="note", status=status))

    def test_other_objects_are_refused(self, narrow):
        for thing in (None, 5, {"type": "note"}):
            with pytest.raises(ConfigurationError):
                narrow.submit(thing)

    def test_a_duplicate_id_is_refused(self, narrow):
        narrow.submit("note", id="kept")
        with pytest.raises(DuplicateTask, match="'kept'"):
            narrow.submit("note", id="kept")

    def test_a_submit_fails_if_the_repository_fails(self, narrow):
        narrow.repository.down = True
        try:
            with pytest.raises(RepositoryUnavailable):
                narrow.submit("note")
        finally:
            narrow.repository.down = False

    def test_a_full_buffer_refuses_all_tasks_of_a_batch(self, narrow):
        narrow.submit("note", id="kept")
        with pytest.raises(QueueFull) as caught:
            narrow.submit_many([Task(type="note"), Task(type="note")])
        for word in ("buffer_size=2", "overflow"):
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        ("middle", "error"),
        [
            (Task(type="note", id="twice"), DuplicateTask),
            (Task(type="nobody"), UnknownTaskType),
            (Task(type="note", params={"n": object()}), PayloadError),
            (Task(type="note", status=TaskStatus.COMPLETED), InvalidTransition),
            (Task(type="note", timeout=-1), ConfigurationError),
        ],
    )
    def test_one_bad_task_refuses_the_whole_batch(self, narrow, middle, error):
        with pytest.raises(error):
            narrow.submit_many([Task(type="note", id="twice"), middle])


def test_submit_many_stores_nothing_if_one_id_is_taken(queue):
    queue.executor("note")(lambda: None)
    queue.submit("note", id="b")
    with pytest.raises(DuplicateTask, match="'b'"):
        queue.submit_many([Task(type="note", id=name) for name in "abc"])
    assert ids(queue) == {"b"}


def test_a_stopped_queue_accepts_nothing(queue):
    queue.executor("note")(lambda: None)
    queue.start()
    queue.stop()
    for submit in (
        lambda: queue.submit("note"),
        lambda: queue.submit_many([Task(type="note")]),
    ):
        with pytest.raises(QueueStopped):
            submit()
    assert ids(queue) == set()


def test_a_queue_stopped_before_its_start_accepts_nothing(queue):
    queue.executor("note")(lambda: None)
    queue.stop()
    with pytest.raises(QueueStopped):
        queue.submit("note")
    with pytest.raises(QueueStopped):
        queue.start()


@pytest.mark.parametrize("started", [True, False])
def test_only_one_of_twenty_threads_stores_the_same_id(queue, started):
    ran = []
    queue.executor("note")(lambda who: ran.append(who))
    if started:
        queue.start()
    barrier = threading.Barrier(20)

    def submit(who):
        barrier.wait(PATIENCE)
        try:
            return queue.submit("note", {"who": who}, id="the one").id
        except DuplicateTask:
            return None

    results = [run_in_thread(lambda who=who: submit(who)) for who in range(20)]
    won = [who for who, result in enumerate(results) if result() is not None]
    assert len(won) == 1
    assert queue.get_task_status("the one").params == {"who": won[0]}
    queue.start()
    assert queue.drain(PATIENCE)
    assert ran == won


# Accepted


def test_a_record_has_the_values_of_the_submit(queue):
    queue.executor("note")(lambda n: None)
    moment = datetime(2040, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=2)))
    before = datetime.now(timezone.utc) - timedelta(milliseconds=1)
    handle = queue.submit(
        "note",
        {"n": [1, 2.5, "ü", None, {"a": True}]},
        id="mine",
        created_by="user123",
        priority=-7,
        run_at=moment,
        timeout=2.5,
        max_attempts=4,
        max_crashes=2,
    )
    assert handle.id == "mine"
    task = handle.task()
    assert task.status is TaskStatus.PENDING
    assert task.params == {"n": [1, 2.5, "ü", None, {"a": True}]}
    assert (task.created_by, task.priority, task.timeout) == ("user123", -7, 2.5)
    assert (task.max_attempts, task.max_crashes) == (4, 2)
    assert task.run_at == moment.replace(microsecond=678000)
    assert before <= task.created_at <= datetime.now(timezone.utc)
    assert (task.started_at, task.completed_at, task.result, task.error) == (None, None, None, "")


def test_a_delay_sets_run_at(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.declare("note")
    assert queue.submit("note", delay=90).task().run_at == clock.now() + timedelta(seconds=90)


def test_new_ids_sort_by_time(queue):
    queue.executor("note")(lambda: None)
    made = [queue.submit("note").id for _ in range(50)]
    assert made == sorted(made)
    assert len(set(made)) == 50


def test_a_task_with_an_empty_id_gets_a_new_one(queue):
    """Each of these tasks gets a new id, by which it is found."""
    queue.declare("note")
    mine = Task(type="note", id="")
    handles = [queue.submit(mine), queue.submit(mine, id=None), *queue.submit_many([mine, mine])]
    assert mine.id == ""
    assert ids(queue) == {handle.task().id for handle in handles}
    assert len(ids(queue) - {""}) == 4


ODD_PARAMS = [
    {"": 1, "$set": {"a.b": "~", "~": [None, {}]}, "x" * 300: []},
    {"numbers": [2**63 - 1, -(2**63), 2**53 + 1, 0.1, -0.0, 5e-324, 1.7976931348623157e308, True]},
    {"text": "\0\x7f\u2028'\"\\ %s {} \N{PILE OF POO}"},
    {"huge": "x" * 1_000_000},
]


@pytest.mark.parametrize("params", ODD_PARAMS, ids=lambda params: list(params)[-1][:9])
def test_unusual_params_reach_the_executor_unchanged(queue, params):
    came = []
    queue.executor("odd")(lambda **params: came.append(params))
    with queue:
        handle = queue.submit("odd", params)
        handle.result(PATIENCE)
    assert repr(came) == repr([params])  # compares 1, 1.0 and True as different values
    assert repr(handle.task().params) == repr(params)


def test_the_callers_task_is_never_changed(queue):
    @queue.executor("grow")
    def grow(items):
        items.append("grown")
        return items

    params = {"items": []}
    mine = Task(type="grow", params=params)
    copy = attrs.evolve(mine, params={"items": []})
    with queue:
        first = queue.submit(mine)
        second = queue.submit(mine, created_by="x", priority=3)
        [third] = queue.submit_many([mine])
        assert [h.result(PATIENCE) for h in (first, second, third)] == [["grown"]] * 3
    assert mine == copy
    assert params == {"items": []}


def test_params_are_stored_as_they_were_at_the_submit(queue):
    queue.executor("echo")(lambda items: items)
    params = {"items": [1]}
    handle = queue.submit("echo", params)
    params["items"].append(2)
    assert handle.task().params == {"items": [1]}


def test_the_defaults_of_config_are_the_original_ones():
    assert (Config().worker_num, Config().buffer_size) == (5, 100)
    assert Config().overflow == "reject"


@pytest.mark.parametrize(
    "settings",
    [
        {"worker_num": 0},
        {"worker_num": True},
        {"buffer_size": 0},
        {"overflow": "drop"},
        {"block_timeout": -1},
        {"max_payload_size": 0},
        {"ageing": 0},
        {"ageing": "1"},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        Config(**settings)


def test_config_must_be_a_config():
    with pytest.raises(ConfigurationError):
        Queue(MemoryRepository(), {"worker_num": 3})


def test_a_repository_class_is_refused():
    with pytest.raises(ConfigurationError, match="got the class SQLiteRepository: use Queue"):
        Queue(SQLiteRepository)


@pytest.mark.parametrize("clock", ["x", None, 5, SystemClock, datetime])
@pytest.mark.parametrize("repository", [MemoryRepository, TinyRepository])
def test_clock_must_be_a_clock(repository, clock):
    with pytest.raises(ConfigurationError, match="clock must have now_ms"):
        Queue(repository(), clock=clock)


@pytest.mark.parametrize(
    "logger",
    ["x", "", 5, print, logging.Logger, logging.LoggerAdapter(logging.getLogger("mine"), {})],
)
def test_logger_must_be_a_logger(logger):
    with pytest.raises(ConfigurationError, match="logger must be a Logger"):
        Queue(MemoryRepository(), logger=logger)


def test_executor_options_are_the_defaults_of_its_tasks(queue):
    @queue.executor("set", max_attempts=3, max_crashes=2, timeout=9, priority=4)
    def set_():
        pass

    plain = queue.submit("set").task()
    assert (plain.max_attempts, plain.max_crashes, plain.timeout, plain.priority) == (3, 2, 9, 4)
    own = queue.submit("set", max_attempts=1, max_crashes=1, timeout=1, priority=0).task()
    assert (own.max_attempts, own.max_crashes, own.timeout, own.priority) == (1, 1, 1, 0)
    task = queue.submit(Task(type="set", timeout=2, priority=5)).task()
    assert (task.max_attempts, task.timeout, task.priority) == (3, 2, 5)


def test_options_at_registration_override_the_executors_own(queue):
    @taskx.executor("set", max_attempts=3, timeout=9)
    def set_():
        pass

    queue.register_executor(set_, timeout=1)
    task = queue.submit("set").task()
    assert (task.max_attempts, task.timeout) == (3, 1)


def test_submit_many_stores_tasks_in_one_transaction_and_in_order(queue):
    ran = []
    queue.executor("n")(lambda n: ran.append(n))
    handles = queue.submit_many(Task(type="n", params={"n": n}) for n in range(50))
    assert [len(batch) for batch in queue.repository.batches] == [50]
    with queue:
        for handle in handles:
            handle.result(PATIENCE)
    assert sorted(ran) == list(range(50))


def test_submit_many_of_no_tasks_stores_nothing(queue):
    assert queue.submit_many([]) == []
    assert queue.repository.batches == []


def test_one_submit_is_one_transaction_with_one_write(queue):
    queue.executor("note")(lambda: None)
    for _ in range(10):
        queue.submit("note")
    assert [len(batch) for batch in queue.repository.batches] == [1] * 10


def test_every_error_is_a_taskx_error():
    for error in (UnknownTaskType, DuplicateTask, QueueFull, QueueStopped, PayloadError):
        assert issubclass(error, TaskxError)


def test_every_task_is_either_rejected_or_run(make_queue):
    """Fifty threads make a thousand submits with a small buffer."""
    queue = make_queue(worker_num=2, buffer_size=10)
    ran = []
    queue.executor("n")(lambda n: ran.append(n))
    queue.start()

    def submit(start):
        accepted = []
        for n in range(start, start + 20):
            try:
                queue.submit("n", {"n": n})
                accepted.append(n)
            except QueueFull:
                pass
        return accepted

    threads = [run_in_thread(lambda start=start: submit(start)) for start in range(0, 1000, 20)]
    accepted = [n for result in threads for n in result()]
    assert queue.drain(PATIENCE)
    assert sorted(ran) == sorted(accepted)
    assert queue.list_tasks()[1] == len(accepted)


def test_no_task_runs_before_it_is_stored(queue):
    """If it were buffered first, a task could run before its record is stored, or without one."""
    ran = []
    queue.executor("note")(lambda: ran.append(1))
    queue.start()
    reached, go_on = threading.Event(), threading.Event()

    def hold(writes):
        if any(isinstance(write, Insert) for write in writes):
            reached.set()
            assert go_on.wait(PATIENCE)
            if not allowed:
                raise RepositoryError("no room for this one")

    allowed = []
    queue.repository.before = hold
    refused = run_in_thread(lambda: queue.submit("note", id="x"))
    assert reached.wait(PATIENCE)
    assert not len(pool_of(queue).buffer)
    assert ran == []
    go_on.set()
    with pytest.raises(RepositoryError, match="no room"):
        refused()
    assert queue.repository.get_many(["x"]) == {}
    assert not len(pool_of(queue).buffer)
    allowed.append(True)
    assert queue.submit("note", id="y").result(PATIENCE) is None
    assert ran == [1]


def test_a_hanging_store_blocks_only_the_threads_that_need_it(queue, gate):
    """While one submit hangs, other threads register, read and report progress, and running tasks go on."""
    seen = []

    @queue.executor("work")
    def work(ctx):
        gate()
        ctx.progress(50, "half way")
        seen.append(ctx.task.id)

    queue.start()
    running = queue.submit("work")
    gate.wait_for(1)
    reached, go_on = threading.Event(), threading.Event()

    def hang(writes):
        if any(isinstance(write, Insert) for write in writes):
            reached.set()
            assert go_on.wait(3 * PATIENCE)

    queue.repository.before = hang
    hanging = run_in_thread(lambda: queue.submit("work", id="slow"))
    try:
        assert reached.wait(PATIENCE)
        other = run_in_thread(lambda: queue.executor("other")(lambda: None))
        assert other() is not None
        assert queue.get_task_status(running.id).status is TaskStatus.RUNNING
        assert [task.id for task in queue.list_tasks()[0]] == [running.id]
        gate.open()
        eventually(lambda: seen == [running.id])
    finally:
        go_on.set()
    assert hanging().result(PATIENCE) is None
    assert running.result(PATIENCE) is None


def test_fields_that_only_the_queue_sets_are_ignored(queue):
    """Only the queue sets the result, times, counts and progress."""
    queue.declare("note")
    long_ago = to_datetime(0)
    mine = Task(
        type="note",
        result={"n": 1},
        error="x",
        progress=70,
        message="x",
        created_at=long_ago,
        started_at=long_ago,
        completed_at=long_ago,
        duration=9.0,
        errors=4,
        crashes=4,
        starts=4,
        owner="x",
        dead_letter=True,
    )
    task = queue.submit(mine).task()
    assert task.created_at > long_ago
    assert (task.started_at, task.completed_at, task.result, task.duration) == (None, None, None, 0)
    assert (task.error, task.progress, task.message, task.owner) == ("", 0, "", "")
    assert (task.errors, task.crashes, task.starts, task.dead_letter) == (0, 0, 0, False)


# Declared types


NOBODY = "no running queue has an executor for type 'away'"


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if "no running queue" in r.getMessage()]


def test_the_first_submit_of_a_declared_type_that_nobody_runs_is_warned_of(queue, caplog):
    queue.declare("away")
    assert not warnings(caplog)
    for _ in range(2):
        queue.submit("away")
    [warning] = warnings(caplog)
    assert warning.startswith(NOBODY)
    queue.declare("away", "other")
    queue.submit_many([Task(type="away"), Task(type="other")])
    assert ["'other'" in text for text in warnings(caplog)] == [False, True]


def test_a_declared_type_that_another_queue_runs_is_not_warned_of(queue, make_queue, caplog):
    worker = make_queue()
    worker.executor("away")(lambda: 5)
    worker.start()
    queue.declare("away")
    assert queue.submit("away").result(PATIENCE) == 5
    assert not warnings(caplog)


def test_a_registered_type_is_not_warned_of_before_the_start(queue, caplog):
    queue.executor("away")(lambda: 5)
    queue.submit("away")
    assert not warnings(caplog)


def test_a_repository_of_eight_methods_does_not_know_who_runs_a_type(make_queue, caplog):
    queue = make_queue(TinyRepository())
    queue.declare("away")
    queue.submit("away")
    assert not warnings(caplog)


def test_a_failed_look_at_the_nodes_fails_no_submit(queue, caplog, monkeypatch):
    def fail():
        raise RepositoryUnavailable("busy")

    queue.declare("away")
    monkeypatch.setattr(queue.repository, "nodes", fail)
    assert queue.submit("away").task().type == "away"
    assert not warnings(caplog)
