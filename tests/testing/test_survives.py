"""``survives``: an executor has the same result and effects, wherever its process dies."""

from __future__ import annotations

import importlib.util
import itertools
import re
import runpy
import sqlite3
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT

from taskx import (
    ConfigurationError,
    MemoryRepository,
    NotDone,
    Queue,
    RetryPolicy,
    Snooze,
    SQLiteRepository,
    Task,
    TaskExecutor,
    TaskFailed,
    TaskFilter,
    answer,
    chain,
    every,
    executor,
    group,
)
from taskx.attempt.checkpoints import Checkpoints
from taskx.attempt.transactions import Transaction
from taskx.node.recovery import Recovery
from taskx.stores.streams import Reader
from taskx.tasks import lifecycle, payload
from taskx.testing import manual, survives

survival = importlib.import_module("taskx.testing.survives")


@pytest.fixture
def queue():
    return Queue(MemoryRepository())


@pytest.fixture
def sent():
    return []


@pytest.fixture
def charged():
    """What each customer was charged: a second charge with the same key changes nothing."""
    return {}


@pytest.fixture
def order(queue, sent, charged):
    """An executor with a step that may happen twice, one with a guard, and retries."""

    @queue.executor(retry=RetryPolicy(3, base=60))
    def order(ctx, customer: int) -> str:
        ctx.step("charge", charged.__setitem__, ctx.task.id, customer)
        ctx.progress(50, "charged")
        ctx.step("send", sent.append, customer)
        if ctx.task.attempt < 3:
            raise ConnectionError("the last step failed")
        return f"{customer} was charged {len(charged)} time"

    return order


@pytest.fixture
def effects(sent, charged):
    return lambda: {"sent": sent, "charged": charged}


def failing(*args, **options):
    """Return the lines of the message of an assertion that must fail."""
    with pytest.raises(AssertionError) as raised:
        survives(*args, **options)
    return str(raised.value).splitlines()


def line_of(code):
    """Return what a message says about a line of this file."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    [number] = [n for n, line in enumerate(lines, 1) if line.strip() == code]
    return f"  {__file__}:{number}, in "


# What it accepts


def test_steps_and_retries(order, effects, sent, charged):
    """Two deaths for each commit: three starts, three outcomes, two releases of a retry, two steps."""
    assert survives(order, {"customer": 7}, effects=effects, twice=["sent"]) == 2 * 10
    assert (sent, charged) == ([], {})  # as they were before


def test_a_cursor(queue):
    pages = {}

    @queue.executor()
    def crawl(ctx, until: int) -> int:
        for page in range(ctx.cursor or 0, until):
            pages[page] = "read"
            ctx.cursor = page + 1
        return len(pages)

    assert survives(crawl, {"until": 3}, effects=lambda: {"pages": pages}) == 2 * 5


def test_what_it_emits(queue):
    """Wherever it dies, a reader has in the end what a run without a death emits."""
    shown = {}

    @queue.executor()
    def speak(ctx) -> None:
        ctx.emit("begin")
        ctx.step("say", lambda: [ctx.emit(n) for n in range(3)])
        ctx.emit("end")

    @queue.executor("read")
    def read(ctx) -> None:
        reader = Reader(ctx._shared.keeper._moves.repository, ctx.parents[0])
        shown["all"] = [chunk.value for chunk in reader.read()]

    flow = chain(speak.task(), Task(type="read"))
    survives(flow, effects=lambda: {"shown": shown}, queue=queue)
    assert shown == {}  # as before


def test_a_snooze_and_a_task_that_it_submits(queue, sent):
    mail = queue.executor("mail")(lambda to: sent.append(to))

    @queue.executor()
    def remind(ctx) -> str:
        if ctx.cursor is None:
            ctx.cursor = "asked"
            raise Snooze(3600)
        mail.using(unique_key=ctx.task.id, unique_scope="ever", on_conflict="return").submit(
            to="ann"
        )
        return ctx.cursor

    survives(remind, effects=lambda: {"sent": sent}, twice=["sent"])


def test_a_task_that_it_waits_for(queue, sent):
    queue.executor("price")(lambda of: len(of))

    @queue.executor()
    def total(ctx) -> int:
        parts = [("a", "one"), ("b", "three")]
        made = [
            queue.submit("price", {"of": of}, unique_key=f"{ctx.task.id} {key}",
                         unique_scope="ever", on_conflict="return")
            for key, of in parts
        ]  # fmt: skip
        return sum(handle.result() for handle in made)

    assert survives(total) > 2 * 6


def test_a_flow(queue):
    merged = []

    @queue.executor()
    def part(ctx, n: int) -> int:
        return ctx.step("double", lambda: 2 * n)

    @queue.executor()
    def merge(ctx) -> list[int]:
        ctx.step("merge", merged.append, len(ctx.parents))
        return [parent.result for parent in ctx.parents]

    flow = chain(group(*(part.task(n=n) for n in range(3))), merge)
    survives(flow, queue=queue, effects=lambda: {"merged": merged}, twice=["merged"])
    assert "effect 'merged'" in failing(flow, queue=queue, effects=lambda: {"merged": merged})[-1]


@pytest.mark.parametrize("stored", ["in memory", "in a file"])
def test_limits_of_all_nodes_and_turns(queue, tmp_path, stored):
    """A dead node may have taken a slot, a turn, or the last token of a minute."""
    noted = {}
    options = {"max_concurrency": 1, "rate": "1/m", "limit_scope": "global"}

    @queue.executor(**options)
    def part(ctx, n: int) -> int:
        return ctx.step("note", noted.setdefault, n, "noted") and n

    parts = [part.task(n=n) for n in range(3)]
    for task in parts:
        task.concurrency_key = "one at a time"
    file = SQLiteRepository(tmp_path / "tasks.db", durability="process")
    repository = None if stored == "in memory" else file
    survives(group(*parts), queue=queue, effects=lambda: {"noted": noted}, repository=repository)
    file.close()


def test_a_single_task(order, queue, effects):
    task = order.task(customer=7)
    survives(task, queue=queue, effects=effects, twice=["sent"])
    assert task.id == ""  # it is the caller's


def test_a_function_and_an_executor_without_a_queue(sent):
    class Classic(TaskExecutor):
        type = "classic"

        def execute(self, ctx, task):
            ctx.step("send", sent.append, task.params["to"])

    for tested in (lambda ctx, to: ctx.step("send", sent.append, to), Classic()):
        if not isinstance(tested, Classic):
            tested.__name__ = "function"
        survives(tested, {"to": "ann"}, effects=lambda: {"sent": sent}, twice=["sent"])
        assert "sent" in failing(tested, {"to": "ann"}, effects=lambda: {"sent": sent})[-1]


def test_an_executor_with_options(order, effects):
    survives(
        order.using(priority=5, tags=["vip"]), {"customer": 7}, effects=effects, twice=["sent"]
    )


def test_the_ticks_of_a_schedule_do_no_harm(queue, order, effects):
    queue.executor("often")(lambda: None)
    queue.schedule("often", every(50), "often")
    survives(order, {"customer": 7}, effects=effects, twice=["sent"])


def test_the_queues_own_repository_is_not_touched(queue, order, effects):
    survives(order, {"customer": 7}, effects=effects, twice=["sent"])
    assert queue.list_tasks()[1] == 0
    order.submit(customer=8)
    assert queue.list_tasks()[1] == 1


def test_in_the_block_of_a_manual_queue(queue, order, effects):
    with manual(queue) as q:
        handle = order.submit(customer=8)
        survives(order, {"customer": 7}, effects=effects, twice=["sent"])
        assert q.run_next().id == handle.id


def test_no_real_time_passes(queue):
    @queue.executor(timeout=10_000)
    def slow(ctx) -> None:
        ctx.sleep(5000)
        if ctx.task.snoozes == 0:
            raise Snooze(100_000)

    began = time.monotonic()
    survives(slow)
    assert time.monotonic() - began < 5000


# Transactions


@pytest.fixture
def shop(tmp_path):
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE orders (book TEXT)")
        connection.execute("INSERT INTO orders VALUES ('an earlier one')")
    yield connection
    connection.close()


@pytest.fixture
def repository(tmp_path, shop):
    with SQLiteRepository(tmp_path / "shop.db", prefix="taskx_", durability="process") as made:
        yield made


@pytest.fixture
def buy(queue):
    @queue.executor()
    def buy(ctx, book: str) -> None:
        with ctx.transaction() as tx:
            tx.connection.execute("INSERT INTO orders VALUES (?)", (book,))
            tx.complete("bought")

    return buy


def rows(connection):
    return lambda: {"orders": connection.execute("SELECT book FROM orders").fetchall()}


def test_a_transaction_that_completes_the_task(buy, shop, repository):
    """The effects are rows in the user's own table. Afterwards the file is as it was."""
    assert survives(buy, {"book": "Emma"}, effects=rows(shop), repository=repository) == 2 * 2
    assert rows(shop)() == {"orders": [("an earlier one",)]}
    assert repository.count(TaskFilter()) == 0


def test_a_transaction_with_a_step(queue, shop, repository):
    @queue.executor()
    def buy(ctx, book: str) -> None:
        with ctx.transaction() as tx:
            ctx.step(
                "buy",
                lambda: tx.connection.execute("INSERT INTO orders VALUES (?)", (book,)).rowcount,
            )
        with ctx.transaction() as tx:
            tx.connection.execute("UPDATE orders SET book = upper(book)")

    survives(buy, {"book": "Emma"}, effects=rows(shop), repository=repository)


def test_a_transaction_that_submits_a_task(queue, shop, repository, sent):
    """It is stored with the rows, so it needs no key of its own."""
    queue.executor("mail")(lambda to: sent.append(to))

    @queue.executor()
    def buy(ctx, book: str) -> None:
        with ctx.transaction() as tx:
            tx.connection.execute("INSERT INTO orders VALUES (?)", (book,))
            queue.submit("mail", {"to": book}, connection=tx.connection)
            tx.complete()

    effects = lambda: {"sent": sent, **rows(shop)()}  # noqa: E731
    survives(buy, {"book": "Emma"}, effects=effects, twice=["sent"], repository=repository)


def test_a_transaction_that_says_nothing_of_the_task_is_found(queue, shop, repository):
    @queue.executor()
    def buy(ctx, book: str) -> None:
        with ctx.transaction() as connected:
            connected.connection.execute("INSERT INTO orders VALUES (?)", (book,))

    title, line, difference = failing(
        buy, {"book": "Emma"}, effects=rows(shop), repository=repository
    )
    assert title == "after a death just after commit 2 of 3, ctx.transaction()"
    assert line.startswith(line_of("with ctx.transaction() as connected:"))
    one = "('an earlier one',), ('Emma',)"
    assert difference == f"  effect 'orders': expected [{one}], found [{one}, ('Emma',)]"
    assert rows(shop)() == {"orders": [("an earlier one",)]}


def test_a_new_file_of_tasks(order, effects, tmp_path):
    with SQLiteRepository(tmp_path / "tasks.db", durability="process") as repository:
        survives(order, {"customer": 7}, effects=effects, twice=["sent"], repository=repository)
        assert repository.count(TaskFilter()) == 0


# What it finds


def test_a_step_without_a_guard_is_found_with_its_commit_and_line(order, effects):
    began = time.thread_time()
    title, line, difference = failing(order, {"customer": 7}, effects=effects)
    assert time.thread_time() - began < 5
    assert title == "after a death just before commit 3 of 10, checkpoint of 'order', step 'send'"
    code = 'ctx.step("send", sent.append, customer)'
    assert line == f"{line_of(code)}order: {code}"
    assert difference == "  effect 'sent': expected [7], found [7, 7]"


def test_an_effect_outside_of_all_steps_is_found(queue, sent, charged, effects):
    @queue.executor()
    def hasty(ctx) -> None:
        ctx.step("charge", charged.__setitem__, ctx.task.id, 5)
        sent.append("mail")

    title, line, _ = failing(hasty, effects=effects)
    assert (
        title == "after a death just before commit 3 of 3, complete of 'hasty', after step 'charge'"
    )
    assert f"{__file__}:" in line
    assert ", in hasty: " in line


def test_a_cursor_that_is_set_too_early_is_found(queue):
    pages = []

    @queue.executor()
    def crawl(ctx) -> None:
        for page in range(ctx.cursor or 0, 2):
            ctx.cursor = page + 1
            pages.append(page)

    title, *_, difference = failing(crawl, effects=lambda: {"pages": pages}, twice=["pages"])
    assert title == "after a death just after commit 2 of 4, checkpoint of 'crawl'"
    assert difference == "  effect 'pages': expected [0, 1], found [1]"


def test_a_child_task_without_a_key_is_found(queue, sent):
    mail = queue.executor("mail")(lambda to: sent.append(to))

    @queue.executor()
    def sign_up(name: str) -> None:
        mail.submit(to=name)

    title, line, _ = failing(sign_up, {"name": "ann"}, effects=lambda: {"sent": sent})
    assert title == "after a death just after commit 2 of 5, create of 'mail'"
    assert line.startswith(line_of("mail.submit(to=name)"))


def test_a_result_that_depends_on_the_attempt_is_found(queue):
    @queue.executor()
    def counting(ctx) -> int:
        return ctx.task.starts

    *_, difference = failing(counting)
    assert difference == "  result: expected 1, found 2"


def test_a_task_that_may_not_crash_is_found(queue):
    @queue.executor(max_crashes=1)
    def once() -> None:
        """Do nothing."""

    *_, difference = failing(once)
    assert "expected None, found TaskFailed: task once 1 failed in attempt 1" in difference


def test_a_typed_executor_has_a_line(queue, sent):
    @queue.executor()
    def typed(ctx, day: date) -> date:
        sent.append(day.isoformat())
        return day

    _, line, _ = failing(typed, {"day": date(2024, 5, 1)}, effects=lambda: {"sent": sent})
    assert ", in typed: " in line


# Effects that may happen again


@pytest.mark.parametrize(
    ("once", "again", "fits"),
    [
        ([1, 2], [1, 2, 1], True),
        ([1, 2], [2, 1, 1, 2], True),
        ([1, 2], [1, 1, 1, 2], False),
        ([1, 2], [1, 1], False),
        ([1], [1, 3], False),
        ({"a": 1}, {"a": 2}, True),
        ({"a": 1}, {"a": 3}, False),
        ({"a": [1]}, {"a": [1], "b": [1]}, False),
        ({1}, {1, 2}, False),
    ],
)
def test_twice_lets_happen_a_second_time_and_nothing_else(queue, once, again, fits):
    """An executor leaves ``once``, and after a death just before its outcome ``again``."""
    world = type(once)()

    @queue.executor()
    def leave(ctx) -> None:
        if isinstance(world, list):
            world[:] = again if world else once
        elif world:
            world.clear()
            world.update(again)
        else:
            world.update(once)

    for twice in ([], ["world"]) if fits else (["world"],):
        if fits and twice:
            survives(leave, effects=lambda: {"world": world}, twice=twice)
        else:
            assert (
                "effect 'world'"
                in failing(leave, effects=lambda: {"world": world}, twice=twice)[-1]
            )


def test_other_effects_are_still_exact(order, effects):
    assert "'sent'" in failing(order, {"customer": 7}, effects=effects, twice=["charged"])[-1]


# The world


@pytest.mark.parametrize("world", [[5], {5}, {5: 5}, deque([5]), Counter([5]), bytearray(b"\5")])
def test_what_was_there_before_is_put_back_before_each_run_and_at_the_end(queue, world):
    @queue.executor()
    def use(ctx) -> int:
        number = len(world)
        if isinstance(world, dict):
            world[ctx.task.id] = 7
        elif isinstance(world, set):
            world.add(7)
        elif 7 not in world:
            world.append(7)
        return min(number, 1)

    before = type(world)(world)
    survives(use, effects=lambda: {"world": world})
    assert world == before


def test_what_lies_elsewhere_is_put_back_by_reset(queue, tmp_path):
    file = tmp_path / "report"

    @queue.executor()
    def write() -> bool:
        new = not file.exists()
        file.write_text("sales")
        return new

    files = lambda: {"files": sorted(path.name for path in tmp_path.iterdir())}  # noqa: E731
    with pytest.raises(ConfigurationError, match="put it back in reset="):
        survives(write, effects=files)
    file.unlink()
    message = failing(write, effects=files, reset=lambda: file.unlink(missing_ok=True))
    assert message[-1] == "  result: expected True, found False"
    assert len(message) == 3


def test_a_run_that_is_not_the_same_each_time_is_refused(queue):
    numbers = itertools.count()
    queue.executor("draw")(lambda: next(numbers))
    message = failing(Task(type="draw"), queue=queue)
    assert message[0].startswith(
        "two runs without a death differ. What runs must not depend on chance"
    )


def test_commits_that_come_only_sometimes_are_refused(queue):
    runs = itertools.count()

    @queue.executor()
    def moody(ctx) -> None:
        if next(runs) < 2:
            ctx.cursor = 1

    assert failing(moody)[0].startswith("commit 3 of 3 did not come.")


# The death


def test_nothing_that_a_dying_executor_does_counts(queue, sent):
    """A real process would run neither ``finally`` nor ``except``, and store nothing more."""
    refused = []

    @queue.executor()
    def stubborn(ctx) -> None:
        try:
            ctx.step("first", lambda: None)
        except BaseException:  # noqa: BLE001
            sent.append("rolled back")
            try:
                ctx.step("second", lambda: None)
            except BaseException as error:  # noqa: BLE001
                refused.append(error)
        finally:
            if "done" not in sent:
                sent.append("done")

    survives(stubborn, effects=lambda: {"sent": sent})
    assert len(refused) == 2
    assert not any(isinstance(error, Exception) for error in refused)


def test_what_a_dead_node_has_left_behind_is_refused(queue, sent):
    """Such as a thread of an executor that goes on: here it goes on beside the next node."""
    left, refused = [], []

    @queue.executor()
    def forking(ctx) -> None:
        for call in left:
            try:
                call()
            except BaseException as error:  # noqa: BLE001
                refused.append(error)
        left[:] = [lambda: ctx.step("late", sent.append, "late")]
        ctx.step("first", lambda: None)
        left.clear()

    survives(forking, effects=lambda: {"sent": sent}, twice=["sent"])
    assert len(refused) == 2
    assert sent == []


def test_ctrl_c_ends_it(queue):
    calls = []

    @queue.executor()
    def interrupted(ctx) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survives(interrupted)
    assert queue.list_tasks()[1] == 0
    assert type(queue) is Queue


# What it refuses


def test_a_task_that_fails_without_a_death(queue):
    queue.executor("broken")(lambda: 1 / 0)
    with pytest.raises(TaskFailed, match="ZeroDivisionError"):
        survives(Task(type="broken"), queue=queue)


def test_a_task_that_does_not_end_without_a_death(queue):
    queue.executor("waits")(lambda: None)
    queue.declare("elsewhere")
    with pytest.raises(FutureTimeout, match="nothing is due that could end it"):
        survives(chain(Task(type="elsewhere"), Task(type="waits")), queue=queue)


def test_a_task_that_never_ends(queue, monkeypatch):
    monkeypatch.setattr(survival, "_MOST", 100)

    @queue.executor()
    def restless() -> None:
        raise Snooze(60)

    with pytest.raises(AssertionError, match="more than 100 runs: does a task run again and again"):
        survives(restless)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"twice": ["sned"]}, "no effect is named sned"),
        ({"effects": lambda: 5}, "effects must return a dict, not 5"),
        ({"repository": MemoryRepository()}, "must be an SQLiteRepository"),
    ],
)
def test_a_wrong_argument(order, options, message):
    with pytest.raises(ConfigurationError, match=message):
        survives(order, {"customer": 7}, **options)


def test_a_wrong_thing_to_test(queue):
    with pytest.raises(ConfigurationError, match="requires queue="):
        survives(Task(type="order"))
    with pytest.raises(ConfigurationError, match="its params already"):
        survives(Task(type="order"), {"customer": 7}, queue=queue)
    with pytest.raises(ConfigurationError, match="requires one of its executors"):
        survives(len, queue=queue)
    with pytest.raises(ConfigurationError, match="not registered with a queue"):
        survives(executor("lonely")(lambda: None))


# Defects of the engine


@pytest.fixture
def keyed(queue):
    """An executor that is right: it draws a key in a step, and then charges once with each key."""
    numbers, charges = itertools.count(), {}

    @queue.executor()
    def keyed(ctx) -> str:
        key = ctx.step("key", lambda: next(numbers))
        ctx.step("charge", charges.__setitem__, key, 5)
        ctx.step("note", lambda: None)
        return "charged"

    return lambda: survives(
        keyed, effects=lambda: {"charges": [*charges.values()]}, reset=charges.clear
    )


def test_without_a_defect_all_is_well(keyed):
    assert keyed() == 2 * 5


def step_stored_late(self, name, token, call):
    """Store the result of a step only after the call of the next one."""
    if name not in self._steps:
        text = self._encode(call(), name)
        self._store(self._steps, self._cursor, self._emitted, durable=True, token=token)
        self._steps = {**self._steps, name: text}
    return payload.loads(self._steps[name])


def forgets_checkpoints(task, now, *, crashed, rescue=lifecycle._rescue):
    """Lose the checkpoints of a task whose process died."""
    return [
        write._replace(changes={**write.changes, "checkpoints": None})
        for write in rescue(task, now, crashed=crashed)
    ]


def fails_at_once(task, now, *, crashed, crash=lifecycle._crash):
    """Count a crash as the last one."""
    ending = lifecycle.Ending(returned=False, error="it died", worker="w")
    changes = lifecycle._end(task, ending, now, "failed")
    return [
        write._replace(changes=changes, move="rescue")
        for write in crash(task, ending, now, owner="")
    ]


@pytest.mark.parametrize(
    ("owner", "name", "defect", "message"),
    [
        (
            Checkpoints,
            "step",
            step_stored_late,
            r"effect 'charges': expected \[5\], found \[5, 5\]",
        ),
        (
            lifecycle,
            "_rescue",
            forgets_checkpoints,
            r"effect 'charges': expected \[5\], found \[5, 5\]",
        ),
        (lifecycle, "_rescue", fails_at_once, "result: expected 'charged', found TaskFailed"),
        (Recovery, "_take_back", lambda self, node: 0, "found TimeoutError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_defect_of_the_engine_is_found(keyed, monkeypatch, owner, name, defect, message):
    monkeypatch.setattr(owner, name, defect)
    with pytest.raises(AssertionError, match=message):
        keyed()


def test_a_completion_outside_of_its_transaction_is_found(buy, shop, repository, monkeypatch):
    monkeypatch.setattr(Transaction, "complete", lambda self, result=None: None)
    *_, difference = failing(buy, {"book": "Emma"}, effects=rows(shop), repository=repository)
    assert "effect 'orders'" in difference


# Waiting


@pytest.fixture
def refund(queue, sent):
    @queue.executor()
    def refund(ctx, order: int) -> list:
        ctx.step("note", sent.append, order)
        told = ctx.ask("approval", {"order": order}, timeout=60)
        ctx.sleep(3600, step="grace")
        try:
            told = [told, ctx.ask("again", timeout=5)]
        except TimeoutError:
            told = [told, "nobody"]
        return told

    return refund


def test_answers_and_sleeps(refund, effects):
    options = {"effects": effects, "twice": ["sent"]}
    deaths = survives(refund, {"order": 7}, answers={"approval": "yes"}, **options)
    # Each answer is made and ended, and the task parks, is woken and starts for each, and for the sleep.
    assert deaths >= 2 * (1 + 1 + 3 * 3 + 2 * 2 + 1)
    survives(refund, {"order": 7}, answers={"approval": "yes", "again": [1]}, **options)


def test_an_answer_may_be_an_error(queue):
    @queue.executor()
    def careful(ctx) -> str:
        try:
            return ctx.ask("approval")
        except TaskFailed as error:
            return error.error

    survives(careful, answers={"approval": ValueError("not like this")})


def test_a_task_that_nobody_answers_does_not_end(queue):
    queue.executor("ask")(lambda ctx: ctx.ask("approval"))
    with pytest.raises(FutureTimeout, match="nothing is due"):
        survives(Task(type="ask"), queue=queue)


def test_an_answer_in_a_flow_and_an_event(queue, sent, effects):
    @queue.executor()
    def publish(ctx, previous: str = "") -> str:
        ctx.step("send", sent.append, previous)
        return ctx.wait("event/shipped:42")

    @queue.executor()
    def draft() -> str:
        return "text"

    flow = chain(draft, answer("legal"), publish)
    answers = {"legal": "yes", "event/shipped:42": "by ship"}
    survives(flow, queue=queue, effects=effects, twice=["sent"], answers=answers)


def test_a_poll(queue, sent):
    @queue.executor()
    def fetch(ctx) -> str:
        ctx.step("order", sent.append, "a parcel")
        found = ctx.poll(
            "parcel", lambda: sent[0] if len(sent) > 0 and ctx.task.starts > 2 else None, every=60
        )
        return [found, ctx.poll("other", lambda: None, every=60, timeout=100) if not sent else "no"]

    survives(fetch, effects=lambda: {"sent": sent}, twice=["sent"])


def test_children(queue, sent, effects):
    @queue.executor()
    def part(ctx, n: int) -> int:
        ctx.step("note", sent.append, n)
        return n

    @queue.executor()
    def whole(ctx) -> int:
        return sum(ctx.run_all("parts", [part.task(n=n) for n in range(3)]))

    @queue.executor()
    def fork(ctx) -> None:
        ctx.fork("more", [part.task(n=5)])

    @queue.executor()
    def after(ctx) -> list:
        return [parent.result for parent in ctx.parents]

    options = {"effects": effects, "twice": ["sent"]}
    # A start, a list, a park, a wake, a start, an end; and of each child: a start, a step, an end.
    assert survives(whole, **options) >= 2 * (6 + 3 * 3)
    survives(chain(fork, after), queue=queue, **options)


def test_steps_that_leave_the_record_for_notes(queue, monkeypatch):
    monkeypatch.setattr(importlib.import_module("taskx.attempt.checkpoints"), "_MOST_IN_RECORD", 30)
    done = set()

    @queue.executor()
    def many(ctx) -> int:
        return sum(ctx.step(f"step {n}", lambda n=n: done.add(n) or n) for n in range(12))

    assert survives(many, effects=lambda: {"done": done}) >= 2 * 12


class Bank:
    """A bank without idempotency keys: somebody must look whether it was paid."""

    def __init__(self):
        self.paid = []

    def pay(self, amount):
        self.paid.append(amount)
        return f"rc_{len(self.paid)}"

    def look(self, amount=None):
        if not self.paid:
            raise NotDone
        return f"rc_{len(self.paid)}"


def test_what_must_not_happen_twice_happens_once(queue):
    bank = Bank()

    @queue.executor(max_crashes=5)
    def pay(ctx, amount: int) -> str:
        return ctx.once("charge", bank.pay, amount)

    @queue.executor(max_crashes=5)
    def pay_and_look(ctx, amount: int) -> str:
        return ctx.once_or("charge", bank.pay, bank.look, amount)

    paid = {"effects": lambda: {"paid": bank.paid}}
    survives(pay, {"amount": 5}, answers={"charge": bank.look}, **paid)
    survives(pay_and_look, {"amount": 5}, **paid)


def test_a_call_that_is_answered_without_a_look_is_found(queue):
    bank = Bank()

    @queue.executor(max_crashes=5)
    def pay(ctx, amount: int) -> str:
        return ctx.once("charge", bank.pay, amount)

    title, *_ = failing(
        pay, {"amount": 5}, answers={"charge": "rc_1"}, effects=lambda: {"paid": bank.paid}
    )
    assert "just after commit 2 of 4" in title


# The example, and the tutorial


@pytest.fixture
def workflow(monkeypatch, tmp_path):
    """The example, with its server, and a list in the place of the mails."""
    monkeypatch.setattr(sys, "argv", ["workflow.py", str(tmp_path / "workflow.db")])
    spec = importlib.util.spec_from_file_location("workflow", ROOT / "examples" / "workflow.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "workflow", module)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec.loader.exec_module(module)
    module.sent = []
    module.send = module.sent.append
    module.effects = lambda: {"sent": module.sent, "asked": module.Branches.asked}
    threading.Thread(target=module.server().serve_forever, daemon=True).start()
    yield module
    module.server().shutdown()
    module.server().server_close()


def test_the_example_of_a_workflow(workflow):
    """All but the chart, which a child process draws. A mail may be sent twice."""
    flow = chain(*workflow.nightly("monday").steps[:2], workflow.report.task(day="monday"))
    began = time.thread_time()
    title, line, _ = failing(flow, queue=workflow.queue, effects=workflow.effects)
    assert time.thread_time() - began < 5
    assert title.endswith("checkpoint of 'report', step 'send'")
    assert 'ctx.step("send", send, ' in line
    survives(flow, queue=workflow.queue, effects=workflow.effects, twice=["sent"])


@pytest.mark.slow
@pytest.mark.process
def test_the_chart_of_the_example_of_a_workflow(workflow):
    """It is drawn in child processes. One branch is enough for it."""
    flow = chain(workflow.fetch.task(branch="oslo"), Task(type="merge"), workflow.draw.task())
    survives(flow, queue=workflow.queue, effects=workflow.effects)


def test_the_tasks_of_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "follow_tutorial.py"))).files()
    words = SimpleNamespace()
    exec(files["words.py"], vars(words))
    monkeypatch.setitem(sys.modules, "words", words)
    (tmp_path / "words.py").write_text(files["words.py"])
    assert survives(words.count_words, {"path": "words.py"}) == 2 * 2
    slow = {}
    exec(files["slow.py"].split("\nwith queue:")[0], slow)
    assert survives(slow["read_slowly"], {"path": "words.py"}) >= 2 * 2
    clock = {"__name__": "clock"}
    exec(files["clock.py"], clock)
    tick = clock["tell_time"].using(id="clock@2024-01-01T00:00:00Z")
    assert survives(tick) >= 2 * 2
    assert re.fullmatch(r"(it was 00:00:00\n)+", capsys.readouterr().out)
