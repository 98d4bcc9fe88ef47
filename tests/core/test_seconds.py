"""A time can be given as seconds, as a ``timedelta`` or as a text."""

from __future__ import annotations

from concurrent.futures import TimeoutError
from datetime import timedelta

import mongomock
import pytest
from helpers import PATIENCE

from taskx import (
    Config,
    ConfigurationError,
    MongoRepository,
    Queue,
    Retry,
    RetryPolicy,
    Snooze,
    SQLiteRepository,
    Task,
    TaskStatus,
    chain,
    every,
)
from taskx.tasks.checks import check_number
from taskx.tasks.options import Options
from taskx.tasks.rate import Rate, Rates
from taskx.tasks.token import CancelToken
from taskx.testing import ManualQueue, run_executor

MINUTE, SECOND = timedelta(minutes=1), timedelta(seconds=1)


def test_a_number_of_seconds_is_checked_as_before():
    assert check_number(5, "delay") == 5
    assert check_number(timedelta(milliseconds=1500), "delay") == 1.5
    assert check_number("1h30m", "delay") == 5400
    for wrong in (None, True, [1]):
        with pytest.raises(
            ConfigurationError,
            match="delay must be a number of seconds, a timedelta or a text such as '90s'",
        ):
            check_number(wrong, "delay")
    for wrong, words in (
        ("5", "'5' has no unit"),
        ("soon", "'soon' is not a duration"),
        ("", "''"),
    ):
        with pytest.raises(ConfigurationError, match=f"delay: {words}"):
            check_number(wrong, "delay")
    with pytest.raises(ConfigurationError, match="delay must be a finite number of at least 0"):
        check_number(-SECOND, "delay")


def test_no_number_is_no_wait():
    queue = ManualQueue()
    queue.executor("fine")(lambda: None)
    with pytest.raises(ConfigurationError, match="nan is not a number of seconds"):
        queue.submit("fine").result(float("nan"))


@pytest.mark.parametrize(
    ("as_timedelta", "as_seconds"),
    [
        (lambda: RetryPolicy(base=MINUTE, max_delay=timedelta(hours=1)), RetryPolicy(base=60)),
        (lambda: Config(block_timeout=SECOND, ageing=MINUTE), Config(block_timeout=1, ageing=60)),
        (lambda: Config(retention={"failed": MINUTE}), Config(retention={"failed": 60})),
        (lambda: every(MINUTE), every(60)),
        (lambda: every("1h30m"), every(5400)),
        (lambda: every(minutes=5), every(300)),
        (lambda: every(30, minutes=1, hours=0.5, days=1), every(88290)),
        (lambda: Config(retention={"failed": "2d"}), Config(retention={"failed": 172800})),
        (lambda: Options(timeout="90s", grace="500ms"), Options(timeout=90, grace=0.5)),
        (lambda: Options(rate=(5, "1m")).own_limit.rates, Rates([Rate(5, 60.0, 5)])),
        (lambda: Retry(delay="1w").delay, 604800),
        (lambda: Snooze("2m").seconds, 120),
        (lambda: Options(timeout=MINUTE, grace=SECOND), Options(timeout=60, grace=1)),
        (lambda: Options(rate=(5, MINUTE)).own_limit.rates, Rates([Rate(5, 60.0, 5)])),
        (lambda: Retry(delay=MINUTE).delay, 60),
        (lambda: Snooze(MINUTE).seconds, 60),
        (lambda: RetryPolicy(backoff=lambda attempt: attempt * MINUTE, jitter=0).delay(2, 0), 120),
    ],
)
def test_a_timedelta_is_the_same_as_its_seconds(as_timedelta, as_seconds):
    assert as_timedelta() == as_seconds


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetryPolicy(base="1"),
        lambda: RetryPolicy(max_delay=-SECOND),
        lambda: Config(block_timeout="1"),
        lambda: Config(ageing=timedelta(0)),
        lambda: every(timedelta(milliseconds=1)),
        lambda: every(),
        lambda: every(minutes="5"),
        lambda: every("5 minutes"),
        lambda: Options(timeout=timedelta(0)),
        lambda: Options(rate=(5, timedelta(0))),
        lambda: Snooze(-SECOND),
    ],
)
def test_a_wrong_time_is_refused(make):
    with pytest.raises(ConfigurationError):
        make()


def test_submit_takes_timedeltas(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.executor("x")(lambda: 1)
    handle = queue.submit(
        "x", delay=MINUTE, timeout=2 * SECOND, unique_key="k", unique_scope=timedelta(hours=1)
    )
    task = handle.task()
    assert (task.run_at - task.created_at).total_seconds() == 60
    assert (task.timeout, task.unique_scope) == (2.0, "3600.0")
    model = Task(type="x")
    model.timeout = MINUTE
    assert queue.submit(model).task().timeout == 60


def test_submit_takes_texts(make_queue, clock):
    queue = make_queue(clock=clock)
    queue.executor("x")(lambda: 1)
    options = {"delay": "3d", "timeout": "1m", "expires": "1d", "unique_scope": "1h"}
    task = queue.submit("x", unique_key="k", **options).task()
    assert task.run_at - task.created_at == timedelta(days=3)
    assert task.expires_at - task.run_at == timedelta(days=1)
    assert (task.timeout, task.unique_scope) == (60.0, "3600.0")
    with pytest.raises(ConfigurationError, match="a text such as '1d', not 'unfinishd'"):
        queue.submit("x", unique_key="k", unique_scope="unfinishd")


@pytest.mark.parametrize("timeout", [MINUTE, "1m", 60])
def test_a_bound_time_becomes_seconds(queue, timeout):
    ping = queue.executor("ping")(lambda: 1).using(timeout=timeout)
    assert ping.options == {"timeout": 60}
    assert ping.task().timeout == 60


def test_a_bound_expiry_may_be_a_text(queue):
    ping = queue.executor("ping")(lambda: 1).using(expires="1d", delay="1h")
    assert ping.options == {"expires": 86400, "delay": 3600}


@pytest.mark.every_store
def test_a_task_updated_by_hand_can_have_a_timedelta(queue):
    queue.executor("x")(lambda: 1)
    task = queue.submit("x").task()
    task.timeout = MINUTE
    queue.repository.update(task)
    assert queue.repository.get_by_id(task.id).timeout == 60


def test_an_executors_timeout_can_be_a_timedelta():
    queue = ManualQueue()

    @queue.executor("slow", timeout=MINUTE)
    def slow(ctx):
        assert ctx.remaining() == 60
        ctx.sleep(SECOND)
        assert ctx.remaining() == 59
        ctx.token.wait(SECOND)
        with pytest.raises(TimeoutError, match="not done within 5 s"), ctx.timeout(5 * SECOND):
            ctx.sleep(MINUTE)
        ctx.sleep(MINUTE)

    slow.submit()
    assert "time" in queue.run_next().error.lower()
    assert queue.clock.monotonic() >= 60


@pytest.mark.every_store
def test_waits_take_timedeltas(queue, gate):
    @queue.executor("hold")
    def hold(answer=1):
        gate()
        return answer

    queue.start()
    handle = hold.submit()
    flow = queue.submit_flow(chain(hold))
    short = timedelta(milliseconds=10)
    for wait in (handle.result, handle.exception, flow.result):
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
            wait(short)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        next(queue.map(hold, [2], timeout=short))
    assert not flow.wait(short)
    assert not queue.drain(short)
    gate.open()
    patience = timedelta(seconds=PATIENCE)
    assert (handle.result(patience), flow.result(patience)) == (1, 1)
    assert queue.drain(patience)
    assert queue.stop(patience) == []


def test_a_token_waits_for_a_timedelta():
    assert not CancelToken().wait(timedelta(milliseconds=1))


def test_misfire_grace_can_be_a_timedelta(queue):
    queue.declare("x")
    made = queue.schedule("s", every(MINUTE), "x", misfire="all", misfire_grace=timedelta(hours=1))
    assert made.misfire_grace == 3600


def test_repositories_take_timedeltas(tmp_path):
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db", busy_timeout=SECOND))
    queue.executor("x")(lambda: 1)
    assert queue.submit("x").task().type == "x"
    queue.close()
    repository = MongoRepository(
        mongomock.MongoClient().db, lease_timeout=MINUTE, timeout=5 * SECOND, poll_interval=SECOND
    )
    assert repository.lease_timeout == 60


def test_the_test_kit_takes_timedeltas():
    queue = ManualQueue()
    ping = queue.executor("ping")(lambda ctx: ctx.sleep(5 * MINUTE))
    ping.using(delay=MINUTE).submit()
    before = queue.clock.monotonic()
    queue.clock.advance(SECOND)
    queue.assert_submitted("ping", within=SECOND, delay=MINUTE)
    with pytest.raises(AssertionError, match=r"within the last 0\.001 s with a delay of 60 s"):
        queue.assert_submitted("ping", within=timedelta(milliseconds=1), delay=MINUTE)
    assert len(queue.advance(MINUTE)) == 1
    assert queue.clock.monotonic() - before == pytest.approx(360)
    for after in (timedelta(0), MINUTE):
        assert run_executor(ping, cancel_after=after).task.status is TaskStatus.CANCELLED
