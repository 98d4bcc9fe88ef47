"""The identity of the database file: its real path and inode from its opening on, and its loss."""

import contextlib
import gc
import itertools
import os
import shutil
import sqlite3
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, connections_of, open_readers, reading, run_in_thread
from strikes import Strike, every_strike, strike_at

from taskx import (
    ConfigurationError,
    RepositoryError,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskFilter,
    open_repository,
)
from taskx.stores.liveness import locks as module
from taskx.stores.liveness.base import Node
from taskx.stores.liveness.locks import NodeLocks
from taskx.stores.sqlite import connections, turnstile
from taskx.stores.sqlite.file import DatabaseFile
from taskx.stores.sqlite.turnstile import Turnstile
from taskx.tasks.timing import DEFAULT_TIMING

from .test_sqlite import as_unprivileged

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="not a POSIX system")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def open_at(timing):
    """Make repositories, which are closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda path, **options: stack.enter_context(
            SQLiteRepository(path, timing=timing, **options)
        )


@pytest.fixture
def repository(open_at, path):
    """An open repository with a task."""
    repository = open_at(path)
    repository.create(task("a"))
    return repository


def task(task_id):
    return Task(id=task_id, type="t")


def ids(repository):
    return sorted(task.id for task in repository.list(TaskFilter()))


def alive(repository):
    return {node.id: node.alive for node in repository.liveness.nodes()}


def files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def copy_of(path, to):
    closing = contextlib.closing
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
    return to


def delete(path):
    path.unlink()
    return "moved or deleted", None


def move(path):
    path.rename(path.with_name("elsewhere.db"))
    return "moved or deleted", lambda: path.with_name("elsewhere.db").rename(path)


def move_the_folder(path):
    elsewhere = path.parent.with_name(f"{path.parent.name}-elsewhere")
    path.parent.rename(elsewhere)
    return "moved or deleted", lambda: elsewhere.rename(path.parent)


def replace(path):
    """Replace the file by a renamed copy, as a restore does it."""
    kept = path.with_name("kept.db")
    os.link(path, kept)
    os.replace(copy_of(path, path.with_name("copy.db")), path)
    return "replaced by another file", lambda: os.replace(kept, path)


def replace_by_a_folder(path):
    """Put a folder in the file's place, which counts as another file."""
    path.rename(path.with_name("elsewhere.db"))
    path.mkdir()
    return "replaced by another file", None


LOSSES = [delete, move, move_the_folder, replace, replace_by_a_folder]

OPERATIONS = {
    "create": lambda r: r.create(task("b")),
    "apply": lambda r: r.apply([]),
    "find": lambda r: r.find("id", ["a"], ("id",)),
    "distinct": lambda r: r.distinct("line", "", 1),
    "due": lambda r: r.due(None, 1),
    "get_by_id": lambda r: r.get_by_id("a"),
    "list": lambda r: r.list(TaskFilter()),
    "ready": lambda r: r.ready(["t"], 1),
    "version": lambda r: r.version(),
    "shrink": lambda r: r.house.shrink(),
    "notes": lambda r: r.notes(""),
    "notes_named": lambda r: r.reads.notes_named(["n"]),
    "notes_after": lambda r: r.reads.notes_after("", "", 1),
    "put_note": lambda r: r.put_note("n", "text", 0),
    "join": lambda r: r.liveness.join(Node(id="n2", name="two")),
    "nodes": lambda r: r.liveness.nodes(),
    "ensure_there": lambda r: r.house.ensure_there(),
}


class TestIdentity:
    def test_a_relative_path_is_resolved_when_the_repository_is_created(
        self, open_at, tmp_path, monkeypatch
    ):
        (tmp_path / "first").mkdir()
        (tmp_path / "second").mkdir()
        monkeypatch.chdir(tmp_path / "first")
        repository = open_at("tasks.db")
        monkeypatch.chdir(tmp_path / "second")
        repository.create(task("a"))
        monkeypatch.chdir("/")
        with reading(repository), reading(repository):
            assert ids(repository) == ["a"]
        repository.liveness.join(Node(id="n1", name="one"))
        assert alive(repository) == {"n1": True}
        repository.liveness.leave("n1")
        assert (tmp_path / "first" / "tasks.db").exists()
        assert files(tmp_path / "second") == set()

    def test_a_node_stays_alive_after_chdir_to_a_folder_with_another_file(
        self, open_at, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        repository = open_at("tasks.db")
        repository.liveness.join(Node(id="n1", name="one"))
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        open_at("tasks.db").create(task("a"))
        assert alive(repository) == {"n1": True}
        repository.liveness.leave("n1")

    def test_a_relative_path_in_a_deleted_working_folder_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(ConfigurationError, match="use an absolute path"):
            SQLiteRepository("tasks.db")
        with SQLiteRepository(tmp_path / "tasks.db") as repository:
            repository.create(task("a"))

    def test_two_symlinks_to_one_file_share_one_folder_of_locks(self, open_at, path, tmp_path):
        """Deploy tools that give each release a folder of its own create such symlinks."""
        links = [tmp_path / "release7.db", tmp_path / "release8.db"]
        for link in links:
            link.symlink_to(path)
        ours, theirs = map(open_at, links)
        ours.liveness.join(Node(id="n1", name="one"))  # creates the file at the end of the link
        assert alive(theirs) == {"n1": True}
        ours.liveness._locks.let_go("n1")
        assert alive(theirs) == {"n1": False}
        theirs.liveness.leave("n1")
        assert path.exists()
        assert [name for name in files(tmp_path) if name.endswith("-nodes")] == ["tasks.db-nodes"]

    def test_changing_a_symlink_does_not_change_the_open_file(self, open_at, tmp_path):
        """Here it is a symlink to the folder."""
        for release in ("7", "8"):
            (tmp_path / release).mkdir()
        current = tmp_path / "current"
        current.symlink_to("7")
        repository = open_at(current / "tasks.db")
        repository.liveness.join(Node(id="n1", name="one"))
        current.unlink()
        current.symlink_to("8")
        open_at(current / "tasks.db").create(task("b"))
        with reading(repository), reading(repository):
            assert ids(repository) == []
        assert alive(repository) == {"n1": True}
        repository.liveness.leave("n1")

    def test_a_file_that_is_replaced_while_it_is_opened_is_refused(
        self, open_at, path, repository, monkeypatch
    ):
        """It is not known which of the two files SQLite has opened."""
        copy = copy_of(path, path.with_name("copy.db"))
        newcomer = open_at(path)
        connections = connections_of(newcomer)
        with monkeypatch.context() as patched:
            patched.setattr(connections, "_check_before_touching", lambda: os.replace(copy, path))
            with pytest.raises(RepositoryUnavailable, match="replaced by another file"):
                newcomer.create(task("b"))
        newcomer.create(task("b"))
        assert ids(newcomer) == ["a", "b"]

    def test_a_file_that_is_deleted_while_it_is_opened_is_refused(self, open_at, path, monkeypatch):
        repository = open_at(path)
        connect = connections_of(repository)._connect

        def connect_and_delete(mode):
            connection = connect(mode)
            path.unlink()
            return connection

        with monkeypatch.context() as patched:
            patched.setattr(connections_of(repository), "_connect", connect_and_delete)
            with pytest.raises(RepositoryUnavailable, match="moved or deleted"):
                repository.create(task("b"))
        repository.create(task("b"))
        assert ids(repository) == ["b"]

    def test_a_reader_opened_just_after_the_file_was_replaced_is_refused(
        self, path, repository, monkeypatch
    ):
        """The file is replaced after the check before the opening."""
        copy = copy_of(path, path.with_name("copy.db"))
        connect = connections_of(repository)._connect

        def replace_and_connect(mode):
            os.replace(copy, path)
            return connect(mode)

        monkeypatch.setattr(connections_of(repository), "_connect", replace_and_connect)
        with pytest.raises(RepositoryUnavailable, match="replaced by another file"):
            connections_of(repository).read(lambda connection: None)
        assert not open_readers(repository)

    @pytest.mark.parametrize("create", [True, False])
    def test_a_file_that_is_deleted_before_it_is_opened_is_not_created(
        self, open_at, path, repository, monkeypatch, create
    ):
        """This holds for a file that was open before, and for ``create=False``."""
        if not create:
            repository = open_at(path, create=False)
        else:
            connections_of(repository).discard_writer()
        connections = connections_of(repository)
        monkeypatch.setattr(connections, "_check_before_touching", path.unlink)
        with pytest.raises(RepositoryUnavailable, match="cannot be opened: it is missing"):
            repository.create(task("b"))
        assert not path.exists()

    def test_a_closed_repository_opens_the_file_that_is_there_now(self, path, repository):
        other = copy_of(path, path.with_name("copy.db"))
        with SQLiteRepository(other) as its_own:
            its_own.create(task("b"))
        repository.close()
        os.replace(other, path)
        assert ids(repository) == ["a", "b"]

    def test_a_read_during_a_close_leaves_no_connection_to_the_old_file(self, path, repository):
        other = copy_of(path, path.with_name("copy.db"))
        with SQLiteRepository(other) as its_own:
            its_own.create(task("b"))
        with reading(repository):
            repository.close()
            os.replace(other, path)
            for log in ("tasks.db-wal", "tasks.db-shm"):
                path.with_name(log).unlink()
            assert ids(repository) == ["a", "b"]
        assert ids(repository) == ["a", "b"]

    def test_a_closed_repository_with_a_node_at_work_opens_no_other_file(self, path, repository):
        repository.liveness.join(Node(id="n1", name="one"))
        repository.close()
        _, put_back = replace(path)
        with pytest.raises(RepositoryUnavailable, match="replaced by another file"):
            repository.liveness.nodes()
        put_back()
        assert alive(repository) == {"n1": True}
        repository.liveness.leave("n1")

    def test_a_node_stays_alive_if_a_copy_replaces_the_file(self, open_at, path, repository):
        repository.liveness.join(Node(id="n1", name="one"))
        replace(path)
        restored = open_at(path)
        assert alive(restored) == {"n1": True}
        with pytest.raises(RepositoryUnavailable, match="replaced by another file"):
            repository.liveness.leave("n1")
        assert alive(restored) == {"n1": False}

    def test_a_read_just_after_a_close_leaves_no_connection_open(self, path, repository, tmp_path):
        """The check that the file exists came before the close."""
        repository.close()
        count = lambda one: one.execute("SELECT count(*) FROM tasks").fetchall()  # noqa: E731
        assert connections_of(repository).read(count) == [(1,)]
        assert not open_readers(repository)
        assert connections_of(repository)._idle == []


class TestLoss:
    @pytest.mark.parametrize("lose", LOSSES)
    def test_every_operation_raises_until_the_file_is_back(self, tmp_path, open_at, lose):
        (tmp_path / "folder").mkdir()
        path = tmp_path / "folder" / "tasks.db"
        repository = open_at(path)
        repository.create(task("a"))
        repository.liveness.join(Node(id="n1", name="one"))
        words, put_back = lose(path)
        before = files(tmp_path)
        for name, operation in OPERATIONS.items():
            with pytest.raises(RepositoryUnavailable, match=words) as caught:
                operation(repository)
            assert str(path) in str(caught.value), name
            assert "nothing was stored" in str(caught.value), name
        assert files(tmp_path) == before
        if put_back is not None:
            put_back()
            repository.house.ensure_there()
            assert ids(repository) == ["a"]
            assert alive(repository) == {"n1": True}
            repository.create(task("b"))
            repository.liveness.leave("n1")
            with SQLiteRepository(path, create=False) as another:
                assert ids(another) == ["a", "b"]

    def test_a_folder_without_permissions_is_an_error(self, repository, path, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "stat", refuse)
        with pytest.raises(RepositoryUnavailable, match=r"cannot be accessed .*permissions"):
            repository.create(task("b"))

    def test_a_file_that_was_never_opened_is_not_missing(self, open_at, path):
        repository = open_at(path)
        repository.house.ensure_there()
        assert not path.exists()


class TestCreateFalse:
    @pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"ensure_there"}))
    @pytest.mark.parametrize("where", ["tasks.db", "no/such/folder/tasks.db"])
    def test_a_missing_file_is_an_error_and_nothing_is_created(
        self, open_at, tmp_path, name, where
    ):
        repository = open_at(tmp_path / where, create=False)
        with pytest.raises(RepositoryError, match="there is no file") as caught:
            OPERATIONS[name](repository)
        assert str(tmp_path / where) in str(caught.value)
        assert files(tmp_path) == set()

    def test_it_can_be_forbidden_for_a_block(self, open_at, tmp_path, path):
        repository = open_at(path)
        with repository.house.only_existing():
            with (
                repository.house.only_existing(),
                pytest.raises(RepositoryUnavailable, match="there is no file"),
            ):
                repository.count(TaskFilter())
            with pytest.raises(RepositoryUnavailable, match="there is no file"):
                repository.count(TaskFilter())
        assert files(tmp_path) == set()
        assert repository.count(TaskFilter()) == 0
        assert path.name in files(tmp_path)

    def test_an_empty_file_is_an_error_and_stays_empty(self, open_at, tmp_path, path):
        path.touch()
        with pytest.raises(RepositoryUnavailable, match=r"tasks\.db is empty"):
            open_at(path, create=False).count(TaskFilter())
        assert files(tmp_path) == {"tasks.db"}
        assert path.stat().st_size == 0

    def test_a_file_is_used_once_another_process_has_created_it(self, open_at, path):
        late = open_at(path, create=False)
        with pytest.raises(RepositoryUnavailable):
            late.count(TaskFilter())
        open_at(path).create(task("a"))
        assert ids(late) == ["a"]
        late.create(task("b"))
        assert ids(late) == ["a", "b"]

    def test_a_broken_symlink_counts_as_a_missing_file(self, open_at, tmp_path, path):
        path.symlink_to(tmp_path / "nowhere.db")
        with pytest.raises(RepositoryUnavailable, match="there is no file"):
            open_at(path, create=False).count(TaskFilter())
        assert files(tmp_path) == {"tasks.db"}

    def test_a_url_can_forbid_creating_the_file(self, path):
        absent = open_repository(f"sqlite:///{path}?create=false")
        with pytest.raises(RepositoryUnavailable, match="there is no file"):
            absent.count(TaskFilter())
        with open_repository(f"sqlite:///{path}?create=true&durability=full") as repository:
            assert repository.count(TaskFilter()) == 0

    @pytest.mark.parametrize("value", ["", "0", "no", "False"])
    def test_create_in_a_url_must_be_true_or_false(self, value):
        with pytest.raises(ConfigurationError, match="create must be true or false"):
            open_repository(f"sqlite:///tasks.db?create={value}")

    @pytest.mark.parametrize("value", [None, 0, "false"])
    def test_create_must_be_a_bool(self, path, value):
        with pytest.raises(ConfigurationError, match="create must be True or False"):
            SQLiteRepository(path, create=value)


def opened_below(folder):
    """Return the open files of this process in a folder."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith(f"{folder}/"):
                found.append(name)
    return sorted(found)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")


class TestTurnstileFiles:
    @needs_proc
    def test_a_dropped_repository_leaves_no_file_open(self, tmp_path):
        for number in range(5):
            SQLiteRepository(tmp_path / f"{number}.db").create(task("a"))
        gc.collect()
        assert opened_below(tmp_path) == []

    @needs_proc
    def test_a_connection_that_an_interrupt_left_open_is_closed_when_it_is_collected(
        self, path, tmp_path
    ):
        """Python 3.13 would warn of it, here and in a program that turns warnings into errors."""
        left = [sqlite3.connect(path, factory=connections.Connection)]
        left[0].execute("SELECT 1")
        assert str(path) in opened_below(tmp_path)
        left.append(left)
        del left
        gc.collect()
        assert opened_below(tmp_path) == []

    @needs_proc
    def test_after_an_interrupt_the_next_turn_opens_all_lock_files(
        self, path, tmp_path, monkeypatch
    ):
        turn = Turnstile(DatabaseFile(str(path), create=True), DEFAULT_TIMING)
        opened = turnstile._open_file

        def open_file(path):
            if path.endswith("inner.lock"):
                raise KeyboardInterrupt
            return opened(path)

        with monkeypatch.context() as patched:
            patched.setattr(turnstile, "_open_file", open_file)
            with pytest.raises(KeyboardInterrupt):
                turn.enter(3.0)
        assert opened_below(tmp_path) == []
        turn.enter(3.0)
        turn.leave()
        assert len(opened_below(tmp_path)) == len(turnstile.NAMES)
        turn.close()

    @needs_proc
    def test_a_turnstile_that_cannot_be_opened_leaves_no_file_open(self, path, tmp_path):
        (tmp_path / "tasks.db-nodes" / "inner.lock").mkdir(parents=True)
        turn = Turnstile(DatabaseFile(str(path), create=True), DEFAULT_TIMING)
        assert turn.enter(3.0) == 3.0
        turn.leave()
        assert opened_below(tmp_path) == []


class TestInterruptedReads:
    """An interrupt may cost a connection, which closes when nothing refers to it any more."""

    @needs_proc
    @pytest.mark.parametrize("close_reader_after", [10.0, -1.0])
    def test_interrupted_reads_leave_no_file_open(self, repository, tmp_path, close_reader_after):
        """This holds if they find an idle connection, and if they open one and close it afterwards."""
        strikes = list(every_strike(lambda point: repository.list(TaskFilter())))
        assert len(strikes) > 2 * DEFAULT_TIMING.most_readers
        gc.collect()
        assert run_in_thread(lambda: ids(repository))() == ["a"]
        assert len(open_readers(repository)) <= 1
        connections_of(repository).close_before_fork(PATIENCE)
        assert not open_readers(repository)
        connections_of(repository).reopen()
        repository.close()
        assert opened_below(tmp_path) == []

    def test_an_interrupted_read_keeps_no_lock(self, repository):
        """Not even if its traceback is kept, and with that the statement that it was in the middle of."""

        def struck(connection):
            rows = connection.execute("SELECT id FROM tasks")
            next(rows)
            raise Strike

        with pytest.raises(Strike) as kept:
            connections_of(repository).read(struck)
        repository.create(task("b"))
        writer = connections_of(repository).writer()
        # SQLite cannot truncate the log while another connection reads from it.
        assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert kept.traceback

    def test_an_interrupted_read_inside_a_read_leaves_the_outer_one_intact(self, repository):
        """A finalizer can make such a read."""

        def inner(connection):
            raise Strike

        def outer(connection):
            for _ in range(3):
                with pytest.raises(Strike):
                    connections_of(repository).read(inner)
            assert ids(repository) == ["a"]
            return connection.execute("SELECT id FROM tasks").fetchall()

        assert connections_of(repository).read(outer) == [("a",)]

    @needs_proc
    def test_an_interrupted_opening_leaves_no_file_open(self, tmp_path, request):
        gc.freeze()  # each collection below looks at this test's objects only, not at all that pytest keeps
        request.addfinalizer(gc.unfreeze)
        struck = True
        for point in itertools.count(0, 13):
            new = SQLiteRepository(tmp_path / f"{point}.db")
            struck = strike_at(point, lambda new=new: new.count(TaskFilter())) is not None
            new.close()
            gc.collect()
            assert opened_below(tmp_path) == []
            if not struck:
                break
        assert point > 130


class FakeTime:
    """A clock that sleeping moves forward, without real waiting."""

    now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class TestBusyTimeout:
    """The time-out is counted once for the turnstile's locks and SQLite's own together."""

    @pytest.fixture
    def clock(self, monkeypatch):
        clock = FakeTime()
        monkeypatch.setattr(turnstile, "time", clock)
        return clock

    def test_sqlite_gets_the_rest_of_the_time_out(self, open_at, path, clock):
        repository = open_at(path, busy_timeout=3.0)
        repository.create(task("a"))
        theirs = Turnstile(DatabaseFile(str(path), create=True), DEFAULT_TIMING)
        theirs.enter(0)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            executed = []
            connections_of(repository).writer().set_trace_callback(executed.append)
            with pytest.raises(RepositoryUnavailable, match="locked for 3 s"):
                # Raises at once: the 3 s have passed at the turnstile.
                repository.create(task("b"))
        begin = executed.index("BEGIN IMMEDIATE")
        assert executed[begin - 1 : begin + 2 : 2] == [
            "PRAGMA busy_timeout = 0",
            "PRAGMA busy_timeout = 3000",
        ]
        theirs.close()
        repository.create(task("c"))
        assert ids(repository) == ["a", "c"]
        [(timeout,)] = connections_of(repository).writer().execute("PRAGMA busy_timeout")
        assert timeout == 3000


class TestLocksOfOtherUsers:
    """Lock files that belong to root, after a start by root and ``chown www-data tasks.db*``."""

    @pytest.fixture
    def path(self):
        folder = Path(tempfile.mkdtemp())  # another user may not enter pytest's folder
        folder.chmod(0o755)
        yield folder / "tasks.db"
        shutil.rmtree(folder)

    @pytest.fixture
    def locks(self, path):
        locks = NodeLocks(f"{path}-nodes")
        yield locks
        locks.release("n1")

    @pytest.mark.process
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_locks_of_another_user_show_if_a_node_is_alive(self, locks):
        inode = locks.hold("n1")
        os.chmod(locks._path("n1"), 0o444)

        def check(expected):
            assert locks.alive("n1", inode) is expected

        assert as_unprivileged(check, True) == "nothing was raised"
        locks.let_go("n1")
        assert as_unprivileged(check, False) == "nothing was raised"

    @pytest.mark.process
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_child_takes_turns_and_closes_its_copies(self, path):
        repository = SQLiteRepository(path)
        turn = repository._file_links.turnstile
        turn.enter(0)
        for name in turnstile.NAMES:
            (path.with_name("tasks.db-nodes") / f"{name}.lock").chmod(0o444)

        def enter():
            assert turn._fds == []
            assert turn.enter(0.01) < 0.01  # it is the parent's turn
            turn.close()

        try:
            assert as_unprivileged(enter) == "nothing was raised"
            assert len(turn._fds) == len(turnstile.NAMES)
        finally:
            turn.close()


class TestOrphanedLockFiles:
    """Lock files of processes that were killed before they recorded their node, or after they left."""

    @pytest.fixture
    def locks(self, repository):
        return repository.liveness._locks

    def left(self, locks):
        return sorted(locks._named() - set(turnstile.NAMES))

    def test_the_next_node_removes_orphaned_lock_files(self, repository, locks, path):
        inode = path.stat().st_ino
        for node in ("killed", "another"):
            locks.hold(node, inode)
            locks.let_go(node)
        Path(locks._path("killed at once")).touch()
        Path(locks._path("killed", "began")).touch()  # it was killed while it left
        repository.liveness.join(Node(id="n1", name="one"))
        assert self.left(locks) == ["n1"]
        repository.liveness.leave("n1")
        assert sorted(os.listdir(locks.folder)) == sorted(
            f"{name}.lock" for name in turnstile.NAMES
        )

    def test_the_lock_files_of_recorded_nodes_stay(self, repository, locks):
        """The lock file of a dead node proves that it is dead."""
        repository.liveness.join(Node(id="dead", name="dead"))
        locks.let_go("dead")
        repository.liveness.join(Node(id="n1", name="one"))
        assert alive(repository) == {"dead": False, "n1": True}
        repository.liveness.leave("n1")

    def test_the_lock_file_of_a_joining_node_stays(self, repository, locks, path):
        locks.hold("joining", path.stat().st_ino)
        repository.liveness.join(Node(id="n1", name="one"))
        assert self.left(locks) == ["joining", "n1"]
        repository.liveness.leave("n1")
        locks.release("joining")

    def test_the_lock_file_of_a_node_that_was_just_recorded_stays(self, locks):
        locks.hold("quick", 7)
        locks.let_go("quick")
        records = iter([set(turnstile.NAMES), {"quick", *turnstile.NAMES}])
        locks.clear_orphans(7, lambda: next(records))
        assert self.left(locks) == ["quick"]

    def test_lock_files_of_another_database_stay(self, repository, locks):
        """The other database was at this path before, and may be put back."""
        locks.hold("elsewhere", 1)
        locks.let_go("elsewhere")
        repository.liveness.join(Node(id="n1", name="one"))
        assert self.left(locks) == ["elsewhere", "n1"]
        repository.liveness.leave("n1")

    def test_a_new_lock_file_in_the_place_of_an_orphan_stays(self, locks, monkeypatch):
        """Another process removed the orphan after this one opened it and before it locked it."""
        locked = module._locked

        def lock_too_late(path):
            fd = locked(path)
            os.unlink(path)
            Path(path).touch()
            return fd

        Path(locks._path("n1")).touch()
        monkeypatch.setattr(module, "_locked", lock_too_late)
        locks.clear_orphans(7, lambda: set(turnstile.NAMES))
        assert self.left(locks) == ["n1"]

    def test_a_joining_node_makes_a_new_lock_file_if_another_removed_it(self, locks, monkeypatch):
        """It was removed after it was created and before it was locked."""
        opened = os.open
        removed = []

        def open_and_lose(path, *args):
            fd = opened(path, *args)
            if path == locks._path("n1") and not removed:
                removed.append(path)
                os.unlink(path)
            return fd

        monkeypatch.setattr(os, "open", open_and_lose)
        inode = locks.hold("n1")
        assert removed == [locks._path("n1")]
        assert os.stat(locks._path("n1")).st_ino == inode
        assert locks.alive("n1", inode) is True
        locks.release("n1")

    def test_a_joining_node_waits_for_a_process_that_checks_its_lock_file(self, locks, monkeypatch):
        Path(locks._path("n1")).touch()
        checking = module._locked(locks._path("n1"))
        waits = []

        def wait(seconds):
            waits.append(seconds)
            if len(waits) == 3:
                os.close(checking)

        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=wait, monotonic=lambda: 0.0))
        inode = locks.hold("n1")
        assert len(waits) == 3
        assert locks.alive("n1", inode) is True
        locks.release("n1")

    @pytest.mark.timing(orphan_within=PATIENCE)
    def test_constant_checks_take_no_live_nodes_lock_file(self, locks):
        recorded: set[str] = set()
        over = threading.Event()

        def check():
            while not over.is_set():
                locks.clear_orphans(7, lambda: {*turnstile.NAMES, *recorded})

        checker = threading.Thread(target=check)
        checker.start()
        try:
            for number in range(100):
                node = f"n{number}"
                inode = locks.hold(node, 7)
                recorded.add(node)
                assert locks.alive(node, inode) is True
                recorded.discard(node)
                locks.release(node)
        finally:
            over.set()
            checker.join()
        assert self.left(locks) == []


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:s3cret@host/0",
        "sqlite://u:s3cret@host/x.db",
        "mysql://u:s3/cr@et@host",
        "u:s3cret@host/db",
    ],
)
def test_an_error_about_a_url_does_not_show_its_password(url):
    with pytest.raises(ConfigurationError, match="is not the URL of a repository") as caught:
        open_repository(url)
    assert "s3" not in str(caught.value)
    assert "***@host" in str(caught.value)
