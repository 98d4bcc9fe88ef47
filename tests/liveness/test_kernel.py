"""Tests of kernel locks: the kernel releases the lock of a node when its process dies."""

import os
import shutil
import signal

import pytest
from storage.test_sqlite import PATIENCE, start_program

from taskx import RepositoryUnavailable, SQLiteRepository
from taskx.stores.liveness import locks as locks_module
from taskx.stores.liveness.base import Node
from taskx.stores.liveness.locks import NodeLocks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="not a POSIX system")

HOLD = """
    import sys
    from taskx import SQLiteRepository
    from taskx.stores.liveness.base import Node
    repository = SQLiteRepository(sys.argv[1])
    repository.liveness.join(Node(id="n1", name="child"))
    print("held", flush=True)
    sys.stdin.readline()
"""

#: The same with a forked child that outlives its parent; each writes its word in one piece.
HOLD_AND_FORK = """
    import os, sys
    from taskx import SQLiteRepository
    from taskx.stores.liveness.base import Node
    repository = SQLiteRepository(sys.argv[1])
    repository.liveness.join(Node(id="n1", name="child"))
    word = str(os.fork() or "forked")
    os.write(1, f"{word}\\n".encode())
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def repository(path):
    with SQLiteRepository(path) as repository:
        yield repository


@pytest.fixture
def locks(path):
    locks = NodeLocks(f"{path}-nodes")
    yield locks
    locks.release("n1")


def lock_files(path):
    """Return the names of the nodes' lock files."""
    return sorted(file.name for file in path.with_name("tasks.db-nodes").glob("n*.lock"))


def alive(repository):
    return {node.id: node.alive for node in repository.liveness.nodes()}


def test_a_node_of_this_process_lives_until_it_leaves(repository):
    repository.liveness.join(Node(id="n1", name="one"))
    assert alive(repository) == {"n1": True}
    repository.close()
    assert alive(repository) == {"n1": True}, "closing the file releases no lock"
    repository.liveness.leave("n1")
    assert alive(repository) == {}


@pytest.mark.process
def test_a_killed_process_is_dead_at_once(repository, path):
    with start_program(HOLD, path) as child:
        assert child.stdout.readline() == "held\n"
        assert alive(repository) == {"n1": True}
        child.send_signal(signal.SIGSTOP)
        assert alive(repository) == {"n1": True}, "a stopped process is not dead"
        child.kill()
        child.wait(PATIENCE)
        assert alive(repository) == {"n1": False}
    repository.liveness.leave("n1")
    assert alive(repository) == {}
    assert not lock_files(path)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_keep_its_parent_alive(repository, path):
    with start_program(HOLD_AND_FORK, path) as parent:
        lines = {parent.stdout.readline().split()[0] for _ in range(2)}
        [grandchild] = map(int, lines - {"forked"})
        assert alive(repository) == {"n1": True}
        parent.kill()
        parent.wait(PATIENCE)
        os.kill(grandchild, 0)  # the child lives
        assert alive(repository) == {"n1": False}
        os.kill(grandchild, signal.SIGKILL)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_ends_does_not_kill_its_parent(repository):
    repository.liveness.join(Node(id="n1", name="one"))
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert alive(repository) == {"n1": True}
    repository.liveness.leave("n1")


def test_in_a_copy_of_the_file_the_nodes_of_the_original_are_dead(repository, path):
    """Nodes of the copy can rescue their tasks, although they live on in the original."""
    repository.liveness.join(Node(id="n1", name="one"))
    repository.close()
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    with SQLiteRepository(copy) as copied:
        assert alive(copied) == {"n1": False}
    assert alive(repository) == {"n1": True}
    repository.liveness.leave("n1")


def test_a_new_file_has_no_nodes(repository):
    assert alive(repository) == {}


def test_a_check_does_not_release_the_lock(locks):
    inode = locks.hold("n1")
    assert [locks.alive("n1", inode) for _ in range(3)] == [True] * 3


def test_a_node_that_leaves_during_a_check_is_not_listed(path, repository, monkeypatch):
    """Its record is read before it leaves, and its lock file is gone afterwards."""
    repository.liveness.join(Node(id="n1", name="one"))
    check = NodeLocks.alive

    def leave_and_check(locks, node, inode):
        with SQLiteRepository(path) as its_own:
            its_own.liveness.leave("n1")
        return check(locks, node, inode)

    monkeypatch.setattr(NodeLocks, "alive", leave_and_check)
    assert alive(repository) == {}


def test_without_a_lock_file_the_liveness_is_unknown(locks):
    inode = locks.hold("n1")
    os.unlink(locks._path("n1"))
    assert locks.alive("n1", inode) is None
    assert locks.alive("never was", 1) is None


def test_a_node_whose_lock_file_a_power_cut_took_is_dead(repository, locks, monkeypatch):
    """The record was synced, and the entry of the lock file in its folder was not."""
    repository.liveness.join(Node(id="n1", name="one"))
    os.unlink(locks._path("n1"))
    assert alive(repository) == {"n1": None}
    monkeypatch.setattr(locks_module, "boot", lambda: 7)
    assert alive(repository) == {"n1": False}
    repository.liveness.leave("n1")


def test_a_node_that_holds_its_lock_lives_whatever_the_boot(repository, monkeypatch):
    """Some containers have a number of their own."""
    repository.liveness.join(Node(id="n1", name="one"))
    monkeypatch.setattr(locks_module, "boot", lambda: 7)
    assert alive(repository) == {"n1": True}
    repository.liveness.leave("n1")


def test_with_another_lock_file_the_liveness_is_unknown(locks):
    """For example, after a copy of the folder was restored."""
    inode = locks.hold("n1")
    assert locks.alive("n1", inode + 1) is None


def test_a_lock_that_cannot_be_taken_is_an_error(locks, path):
    locks.hold("n1")
    with pytest.raises(RepositoryUnavailable, match="cannot lock"):
        NodeLocks(f"{path}-nodes", patience=0.0).hold("n1")
    os.makedirs(path.parent / "file")
    (path.parent / "file" / "x.db-nodes").touch()
    with pytest.raises(RepositoryUnavailable, match="cannot create a lock file"):
        NodeLocks(str(path.parent / "file" / "x.db-nodes")).hold("n1")


def test_a_node_that_could_not_be_recorded_holds_no_lock(repository, path):
    repository.liveness.join(Node(id="n1", name="one"))
    repository.liveness.leave("n1")
    path.unlink()
    path.mkdir()
    repository.close()
    with pytest.raises(RepositoryUnavailable):
        repository.liveness.join(Node(id="n2", name="two"))
    assert not lock_files(path)
