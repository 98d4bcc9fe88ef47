"""Connections, servers and networks that fail: a clear error, nothing lost, and the work goes on."""

from __future__ import annotations

import os
import re
import resource
import threading
from contextlib import ExitStack, suppress

import psycopg
import pytest
from helpers import PATIENCE, eventually, run_in_thread

from taskx import (
    ConfigurationError,
    PostgresRepository,
    RepositoryUnavailable,
    SchemaMismatch,
    open_repository,
)
from taskx.attempt.failures import error_text
from taskx.insight import health
from taskx.stores.base import Locked
from taskx.stores.postgres import schema
from taskx.stores.sql import pool
from taskx.tasks import lifecycle
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.lifecycle import ENDED, freed_of
from taskx.tasks.record import FREE, UNTIL_DUE
from taskx.tasks.writes import Update

from ..repositories import insert, losing_answers

pytestmark = pytest.mark.postgres
LONG = PATIENCE
NEW = freed_of("t")


def database(repository):
    return repository._server.connections._given["dbname"]


def applied(repository, write):
    """Return what ``apply`` says of a write, and None if the server is slower than the time-out."""
    with suppress(RepositoryUnavailable):
        return list(repository.apply([write]))
    return None


@pytest.fixture
def queue(repository, make_queue):
    made = make_queue(repository, worker_num=2)
    made.executor("echo")(lambda n=0: n)
    return made


# --- connections


def test_connections_that_the_server_ends_are_replaced(queue, server):
    """Each call succeeds, or says that the server is away; the queue goes on by itself."""
    with queue:
        handles = []
        for n in range(20):
            with suppress(RepositoryUnavailable):
                handles.append(queue.submit("echo", {"n": n}, id=f"x{n}"))
            if n % 5 == 0:
                server.break_connections(database(queue.repository))
        assert [handle.result(LONG) for handle in handles] == [int(h.id[1:]) for h in handles]


def test_a_listener_that_is_cut_listens_again(repository, url, server):
    channel = repository._server.channel
    ear = repository.news.listen("f")
    eventually(lambda: channel.hears)
    assert ear.wait(LONG) == "f"  # something may have been missed before
    rung = channel.rung
    server.break_connections(database(repository))
    eventually(lambda: channel.rung is not rung)
    assert ear.wait(LONG) == "f"
    ear.close()


@pytest.mark.parametrize("through", [2], indirect=True)
def test_nobody_waits_without_end_for_an_answer_that_a_proxy_keeps(through, proxy, repository):
    """The write took place, which the record shows when it is sent again."""
    eventually(lambda: applied(through, insert("first", SYSTEM_CLOCK)))
    proxy.judge = lambda direction, piece: direction == "ask"
    write = insert("a", SYSTEM_CLOCK)
    with pytest.raises(RepositoryUnavailable) as caught:
        through.apply([write])
    assert caught.value.in_doubt
    proxy.judge = lambda direction, piece: True
    assert eventually(lambda: applied(through, write)) == [True]
    assert repository.statuses(["a"]) == {"a": "pending"}


def test_a_proxy_that_cuts_costs_at_most_an_error(through, proxy):
    """A connection that broke while nobody used it is replaced. A write that was on its way is in doubt."""
    for name in "ab":
        assert list(through.apply([insert(name, SYSTEM_CLOCK)])) == [True]
        proxy.cut()
    for name, direction in ("c", "ask"), ("d", "answer"):
        write, seen = insert(name, SYSTEM_CLOCK), []

        def cut(way, piece, direction=direction, seen=seen):
            if b"INSERT" in piece:
                seen.append(way)
            if seen and way == direction:
                proxy.judge = lambda *_: True
                proxy.cut()
                return False
            return True

        through.put_note(name, "text", 0)  # the connection for writing is open
        proxy.judge = cut
        with pytest.raises(RepositoryUnavailable) as caught:
            through.apply([write])
        assert caught.value.in_doubt
        assert list(through.apply([write])) == [True]
    assert len(through.statuses([*"abcd"])) == 4


def test_a_write_in_doubt_that_is_committed_late_counts_once(repository, url):
    """Its transaction is still open on the server when it is sent again, however often it is refused."""
    write = insert("a", SYSTEM_CLOCK)
    with psycopg.connect(url) as late:
        repository._server.doubtful[id(write)] = (write, write)
        row = repository.statements.insert(tuple(write.row)).replace("?", "%s")
        late.execute(row, tuple(write.row.values()))
        with repository.house.without_waiting(), pytest.raises(Locked):
            repository.apply([write])
        again = run_in_thread(lambda: list(repository.apply([write])))
        late.commit()
    assert again() == [True]


def test_a_take_in_doubt_waits_for_its_first_copy(repository, url):
    """A new take passes over a locked record. This one's lock is its own, of a commit without an answer."""
    repository.apply([insert("a", SYSTEM_CLOCK)])
    write = lifecycle.take("a", "here")
    with psycopg.connect(url) as late:
        repository._server.doubtful[id(write)] = (write, write)
        late.execute("UPDATE taskx_task SET owner = 'here' WHERE id = 'a'")
        with repository.house.without_waiting(), pytest.raises(Locked):
            repository.apply([write])
        again = run_in_thread(lambda: list(repository.apply([write, insert("b", SYSTEM_CLOCK)])))
        assert repository.apply([lifecycle.take("a", "elsewhere")]) == [False]
        late.commit()
    assert again() == [True, True]


def test_an_outcome_in_doubt_counts_whatever_is_in_the_text_of_its_error(repository, clock):
    """PostgreSQL stores no NUL characters: a task has another one from the beginning."""
    for name in "ab":
        repository.apply([insert(name, clock)])
    tasks = [repository.get_by_id(name) for name in "ab"]
    starts = [lifecycle.start(task, clock.now_ms(), "node") for task in tasks]
    assert all(repository.apply(starts))
    failed = lifecycle.Ending(returned=False, error=error_text(ValueError("a\0b")), permanent=True)
    running = [repository.get_by_id(name) for name in "ab"]
    ends = [end for task in running for end in lifecycle.conclude(task, failed, clock.now_ms())]
    with losing_answers(repository), pytest.raises(RepositoryUnavailable) as caught:
        repository.apply(ends)
    assert caught.value.in_doubt
    assert repository.apply(ends) == [True] * len(ends)
    assert repository.get_by_id("a").error == "ValueError: a\ufffdb"


def test_no_write_stays_in_doubt_when_its_outcome_is_known(repository):
    shown, refused, new = (insert(name, SYSTEM_CLOCK) for name in "abc")
    repository.apply([shown, insert("b", SYSTEM_CLOCK, created_by="another")])
    for write in shown, refused, new:
        repository._server.doubtful[id(write)] = (write, write)
    assert list(repository.apply([shown, refused, new])) == [True, False, True]
    assert repository._server.doubtful == {}


def test_writes_in_doubt_that_nobody_sends_again_are_forgotten(repository, monkeypatch):
    """A caller that was told of the doubt submits anew. The newest are kept, as others send them again."""
    monkeypatch.setattr(pool, "_MOST_IN_DOUBT", 3)
    writes = [insert(f"a{n}", SYSTEM_CLOCK) for n in range(5)]

    def fail(link):
        raise KeyboardInterrupt

    for write in writes:
        with suppress(KeyboardInterrupt):
            repository._server.transaction(fail, True, ([write], [write]), single=True)
    assert [*repository._server.doubtful] == [id(write) for write in writes[2:]]


def test_a_connection_that_is_put_back_during_a_close_is_closed(repository):
    connections = repository._server.connections

    class Idle(list):
        """Connections are closed just before one is put back."""

        def append(self, link):
            connections.close()
            super().append(link)

    connections._idle = Idle()
    used = connections.read(lambda link: link)
    assert used.driver.closed
    assert connections._idle == []


@pytest.fixture
def many_files():
    """Each file that this process opens now has a number above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    with ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while (file := os.open(os.devnull, os.O_RDONLY)) < 1024:
            held.callback(os.close, file)
        held.callback(os.close, file)
        yield


def test_a_process_with_many_open_files_hears_of_others(url, repository, many_files):
    with PostgresRepository(url) as other:
        ear = other.news.listen(NEW)
        assert ear.wait(LONG) == NEW  # something may have been missed before
        repository.apply([insert("a", SYSTEM_CLOCK)])
        assert ear.wait(LONG) == NEW
        ear.close()


# --- dead rows


@pytest.mark.parametrize("bloated", [True, False])
def test_a_slow_look_begins_at_the_first_task_while_a_transaction_is_open(
    repository, monkeypatch, bloated
):
    """Until it finds nothing: then it looks at all again, so that no task is left behind."""
    monkeypatch.setattr(pool, "_SLOW_LOOK", 0.0)
    monkeypatch.setattr(pool, "_REST", float("inf"))
    monkeypatch.setattr(repository._server, "held_back", lambda: 60.0 * bloated)

    def ready(limit=10):
        return [stub.id for stub in repository.ready(["t"], limit)]

    def holds(task_id, *, back=False):
        guard, held = ("held", UNTIL_DUE) if back else ("held", FREE), FREE if back else UNTIL_DUE
        assert repository.apply([Update(task_id, dict([guard]), {"held": held})]) == [True]

    repository.apply([insert(name, SYSTEM_CLOCK) for name in "abc"])
    holds("a")
    assert ready(1) == ["b"]
    assert ready() == ["b", "c"]
    holds("a", back=True)
    assert ready() == (["b", "c"] if bloated else ["a", "b", "c"])
    holds("b")
    holds("c")
    assert ready() == ["a"]


# --- servers


def test_too_many_connections_are_a_clear_error(server, repository):
    with server.connect() as admin:
        admin.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 0")
    try:
        made = PostgresRepository(
            f"host=127.0.0.1 port={server.port} user=few dbname={database(repository)}"
        )
        with made, pytest.raises(RepositoryUnavailable, match="too many connections"):
            made.statuses(["a"])
    finally:
        with server.connect() as admin:
            admin.execute("DROP ROLE few")


@pytest.mark.parametrize(
    "text", ["postgresql://u:secret@[::1", "host", "postgresql://u:secret@h/d?x=1"]
)
def test_a_url_that_is_not_valid_is_refused_without_its_password(text):
    with pytest.raises(ConfigurationError) as caught:
        PostgresRepository(text)
    assert "secret" not in str(caught.value)


def test_no_message_shows_a_password():
    with open_repository("postgresql://me:secret@127.0.0.1:1/shop?prefix=a_&timeout=2") as away:
        assert repr(away) == "PostgresRepository('shop@127.0.0.1', prefix='a_')"
        with pytest.raises(RepositoryUnavailable) as caught:
            away.statuses(["a"])
        [check] = [check for check in away.house.examine() if check.level == "fail"]
    for text in (str(caught.value), repr(caught.value.__cause__), str(check)):
        assert "secret" not in text


def test_options_of_a_url_are_checked():
    for query, reason in (
        ("timeout=soon", "must be a number of seconds"),
        ("listen=no", "must be true or false"),
        ("durability=none", "durability must be one of"),
        ("prefix=A-", "prefix must be"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            open_repository(f"postgresql://h/d?{query}")


def test_a_transaction_that_stays_open_is_a_problem(queue, url, monkeypatch):
    monkeypatch.setattr(health, "_LONG_TRANSACTION", 0.0)
    with psycopg.connect(url) as idle:
        idle.execute("SELECT txid_current()")
        kinds = [problem.kind for problem in queue.health(nodes=0).problems]
    assert kinds == ["open_transaction"]


# --- tables


def test_several_processes_make_the_tables_at_once(server):
    name = server.new_database()
    try:
        gate = threading.Barrier(4)

        def use():
            with PostgresRepository(server.url(name), prefix="x_") as made:
                gate.wait(LONG)
                return made.put_note(f"{threading.get_ident()}", "text", 0)

        waits = [run_in_thread(use) for _ in range(4)]
        assert [wait() for wait in waits] == [True] * 4
        with PostgresRepository(server.url(name), prefix="x_") as made:
            assert len(made.notes("")) == 4
    finally:
        server.drop_database(name)


def test_the_tables_are_those_of_django(repository, tmp_path):
    """So a site and other programs may share them: same columns, types and indexes."""
    import django_project

    site = django_project.on_postgres(tmp_path)
    columns = (
        "SELECT table_name, column_name, replace(data_type, 'character varying', 'text'), is_nullable, "
        "collation_name FROM information_schema.columns WHERE table_name LIKE 'taskx\\_%' "
        "AND column_name <> 'id' OR table_name = 'taskx_task' ORDER BY 1, 2"
    )
    indexes = (
        "SELECT indexname, replace(replace(replace(indexdef, '::character varying', ''), '::text', ''), "
        "'UNIQUE ', '') FROM pg_indexes WHERE indexname ~ '^taskx_' AND tablename = 'taskx_task' "
        "AND indexname !~ '_pkey|_like' ORDER BY 1"
    )
    with site:
        for sql in (columns, indexes):
            theirs = site._connections.read(lambda link, sql=sql: link.rows(sql))
            ours = repository._server.rows(sql)
            assert [_plain(row) for row in ours] == [_plain(row) for row in theirs]


def _plain(row):
    """Return a row without brackets, and with the conditions of an index in any order."""
    return [sorted(re.sub("[()]", "", str(value)).split()) for value in row]


def test_a_newer_schema_is_refused(repository, url, server):
    mark = "COMMENT ON TABLE taskx_task IS 'TaskX schema {}'"
    with server.connect(database(repository)) as admin:
        admin.execute(mark.format(schema.VERSION + 1))
        try:
            with PostgresRepository(url) as older, pytest.raises(SchemaMismatch, match="Upgrade"):
                older.statuses(["a"])
        finally:
            admin.execute(mark.format(schema.VERSION))


def test_a_reader_makes_no_tables(url):
    with PostgresRepository(url, prefix="none_") as reader:
        with (
            reader.house.only_existing(),
            pytest.raises(RepositoryUnavailable, match="nothing was created"),
        ):
            reader.statuses(["a"])
        assert not reader.statuses(["a"])


def test_texts_are_utf_8_whatever_the_default_of_the_connection_is(server, repository):
    """With SQL_ASCII, which a URL, a role or a database may have, psycopg would return bytes."""
    url = server.url(database(repository))
    with PostgresRepository(f"{url}?client_encoding=SQL_ASCII") as other:
        other.put_note("a", "é€😀", 0)
    assert repository.notes("a")["a"].text == "é€😀"


# --- news


def test_news_of_another_process_come_at_once_and_then_together(repository, url):
    with PostgresRepository(url) as other:
        ear = other.news.listen(NEW + ENDED)
        assert ear.wait(LONG)  # something may have been missed before
        repository.apply([insert("a", SYSTEM_CLOCK)])
        assert ear.wait(LONG) == NEW
        for n in range(50):
            repository.apply([insert(f"b{n}", SYSTEM_CLOCK), Update("a", {}, {"message": f"{n}"})])
        assert ear.wait(LONG) == NEW
        ear.close()
        eventually(lambda: ear.wait(LONG) == "")  # the last news may come after the first ones


def test_a_note_of_another_process_changes_the_version(repository, url):
    with PostgresRepository(url) as other:
        other.version()
        eventually(lambda: other._server.channel.hears)
        rung = other._server.channel.rung
        repository.put_note("pause", "text", 0)
        eventually(lambda: other._server.channel.rung is not rung)
