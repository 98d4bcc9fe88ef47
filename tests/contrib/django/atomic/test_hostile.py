"""Kills between any two statements, a server that dies during COMMIT, and many writers at once."""

from __future__ import annotations

import json
import threading
from collections import Counter

import django_project
import mariadb_server
import postgres_server
import pytest
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.db import Error, connections, transaction
from helpers import ROOT, eventually, run_in_thread

from contrib.django.atomic.blocks import LONG, ids, rolled_back
from contrib.django.atomic.conftest import closing
from taskx import TaskStatus, TaskxError
from taskx.contrib.django import DjangoRepository

SERVERS = {"postgres": postgres_server, "mariadb": mariadb_server}

# The start of the programs. ``child(fatal)`` is called in processes of its own: each dies at its own
# statement on the site's connection, and the last one comes to the end.
PROGRAM = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import django_project
django_project.set_up()
django_project.add_database("site", **json.loads(sys.argv[2]))
from django.contrib.auth.models import Group
from django.db import connections, transaction
from taskx import Config, Queue, Task
from taskx.contrib.django import DjangoRepository

own = connections["site"]

class Counting:
    def __init__(self, fatal):
        self.left = fatal
    def step(self):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
    def around(self, execute, *statement):
        self.step()
        return execute(*statement)
    def commit(self, commit):
        self.step()
        commit()
        self.step()

def counted(fatal):
    own = connections["site"]
    counting, commit = Counting(fatal), own._commit
    own._commit = lambda: counting.commit(commit)
    return own.execute_wrapper(counting.around)
"""
RUN = """
for fatal in range(1, 1000):
    pid = os.fork()
    if not pid:
        try:
            child(fatal)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(fatal, status, flush=True)
    if not os.WIFSIGNALED(status):
        break
"""
EXECUTE = f"""{PROGRAM}
completes = sys.argv[3] == "True"

def child(fatal):
    queue = Queue(DjangoRepository("site"), Config(worker_num=1))

    @queue.executor("t", max_crashes=100)
    def work(ctx):
        with counted(fatal):
            for n in range(ctx.cursor or 0, 3):
                with ctx.transaction() as tx:
                    Group.objects.using("site").create(name=f"row {{n}}")
                    ctx.cursor = n + 1
                    if completes and n == 2:
                        tx.complete("done")
        connections.close_all()
        return None if completes else "done"

    with queue:
        if fatal == 1:
            queue.submit("t", id="t")
        queue.handle("t").result(timeout=60)
{RUN}"""
SUBMIT = f"""{PROGRAM}
def child(fatal):
    queue = Queue(DjangoRepository("site"))
    queue.declare("ship")
    with counted(fatal), transaction.atomic(using="site"):
        row = Group.objects.using("site").create(name=f"order {{fatal}}")
        tasks = [Task(type="ship", params={{"order": row.name}}, tags=["t"]) for _ in range(2)]
        queue.submit_many(tasks)
        queue.submit("ship", {{"order": row.name}})
{RUN}"""


@pytest.fixture
def settings(using):
    """The settings of the database, for another process."""
    known = connections.settings[using]
    return json.dumps(
        {key: known[key] for key in ("ENGINE", "NAME", "HOST", "PORT", "USER", "OPTIONS")}
    )


def killed(child):
    """Return the number of processes that were killed. Fail if the last one did not come to its end."""
    while True:
        fatal, status = map(int, child.read().split())
        if status != 9:
            assert status == 0
            return fatal - 1


@pytest.mark.process
@pytest.mark.parametrize("completes", [True, False])
def test_a_process_that_dies_at_any_statement_has_written_each_row_once(
    spawn, repository, settings, names, completes
):
    assert killed(spawn(EXECUTE, ROOT / "tests", settings, completes)) > 5
    assert names() == ["row 0", "row 1", "row 2"]
    task = repository.get_by_id("t")
    assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")
    assert task.crashes > 5


@pytest.mark.process
def test_a_process_that_dies_at_any_statement_leaves_order_and_tasks_or_neither(
    spawn, queue, settings, names
):
    assert killed(spawn(SUBMIT, ROOT / "tests", settings)) > 10
    orders = Counter(task.params["order"] for task in queue.iter_tasks())
    # One died after COMMIT, and the last one did not die.
    assert len(orders) == 2
    assert sorted(orders) == names()
    assert {*orders.values()} == {3}


@pytest.mark.slow
def test_twenty_threads_write_their_tables_while_four_workers_run(make_queue, using, names):
    """Each order has its task, and each task its order, whatever was rolled back."""
    queue = make_queue(worker_num=4, middleware=[closing])

    @queue.executor()
    def ship(ctx, order: str) -> None:
        with ctx.transaction() as tx:
            Group.objects.using(using).create(name=f"{order} was shipped")
            tx.complete()

    def sell(number):
        try:
            for n in range(5):
                name = f"order {number} {n}"
                block = transaction.atomic if (number + n) % 3 else rolled_back
                with block(using):
                    Group.objects.using(using).create(name=name)
                    queue.submit("ship", {"order": name})
        finally:
            connections.close_all()

    with queue:
        for result in [run_in_thread(lambda number=number: sell(number)) for number in range(20)]:
            result()
        assert queue.drain(timeout=LONG)
    sold = {f"order {number} {n}" for number in range(20) for n in range(5) if (number + n) % 3}
    assert len(sold) > 60
    assert {*names()} == sold | {f"{name} was shipped" for name in sold}
    assert queue.count_tasks(status="completed") == len(sold)
    assert queue.count_tasks() == len(sold)


def test_two_queues_on_one_database(queue, make_queue, repository, using):
    with DjangoRepository(using) as second:
        other = make_queue(second, worker_num=1, middleware=[closing])
        other.executor("elsewhere")(lambda: "run by the other one")
        with other:
            with rolled_back(using):
                queue.submit("elsewhere")
                other.submit("elsewhere")
                assert queue.count_tasks() == other.count_tasks() == 2
            with transaction.atomic(using=using):
                handles = [queue.submit("elsewhere"), other.submit("elsewhere")]
                assert ids(queue) == ids(other) == {handle.id for handle in handles}
            assert [one.result(timeout=LONG) for one in handles] == ["run by the other one"] * 2


# --- the server dies


def run(statement, *values):
    with connections["restarting"].cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


def effects():
    return Counter(name for (name,) in run("SELECT name FROM effects"))


@pytest.mark.process
class TestKilledServer:
    @pytest.fixture(params=SERVERS)
    def server(self, request):
        with SERVERS[request.param].private() as made:
            yield made

    @pytest.fixture
    def repository(self, server, tmp_path):
        """A repository on a server that the test kills, and a table without any constraint."""
        django_project.set_up()
        django_project.add_url("restarting", server.url(server.new_database()))
        call_command("migrate", "taskx", database="restarting", verbosity=0)
        run("CREATE TABLE effects (name TEXT)")
        connections.close_all()
        # The lease is longer than any restart of the server.
        options = {"timeout": 2, "run_folder": tmp_path / "run", "lease_timeout": 20 * LONG}
        with DjangoRepository("restarting", **options) as made:
            yield made
        connections.close_all()
        del connections["restarting"], connections.settings["restarting"]

    @pytest.mark.parametrize("commits", [True, False], ids=["after", "before"])
    def test_at_the_commit_of_a_completion(self, make_queue, server, commits):
        """The answer to COMMIT never comes. When the server is back, the records decide."""
        queue = make_queue(worker_num=1, middleware=[closing])
        died = threading.Event()

        @queue.executor(max_attempts=2)
        def work(ctx):
            own = connections["restarting"]
            commit = own._commit

            def dying():
                del own._commit
                if commits:
                    commit()
                server.kill()
                died.set()
                run("SELECT 1")  # there is no answer

            with ctx.transaction() as tx:
                run("INSERT INTO effects VALUES (%s)", f"attempt {ctx.task.attempt}")
                if not died.is_set():
                    own._commit = dying
                tx.complete(ctx.task.attempt)

        with queue:
            handle = queue.submit("work")
            assert died.wait(LONG)
            server.start()
            attempt = handle.result(timeout=LONG)
        assert attempt == (1 if commits else 2)
        assert effects() == {f"attempt {attempt}": 1}

    @pytest.mark.slow
    def test_again_and_again(self, make_queue, server):
        """No order and no task is lost or doubled, whatever the server was doing when it died."""
        queue = make_queue(worker_num=4, middleware=[closing])

        @queue.executor(max_attempts=1000)
        def ship(ctx, order: str) -> None:
            with ctx.transaction() as tx:
                run("INSERT INTO effects VALUES (%s)", f"{order} was shipped")
                tx.complete()

        done = threading.Event()

        def sell(seller):
            """Sell until the end. Each order is tried until it is certain that it is stored."""
            sold, certain = 0, True
            while not (done.is_set() and certain):
                name = f"order {seller} {sold}"
                try:
                    certain = False
                    if not run("SELECT 1 FROM effects WHERE name = %s", name):
                        with transaction.atomic(using="restarting"):
                            run("INSERT INTO effects VALUES (%s)", name)
                            queue.submit("ship", {"order": name})
                    sold, certain = sold + 1, True
                except (Error, TaskxError):
                    connections["restarting"].close()
                    done.wait(0.05)
            connections.close_all()
            return sold

        def grown(least):
            return sum(effects().values()) >= least

        with queue:
            sellers = [run_in_thread(lambda seller=seller: sell(seller)) for seller in range(3)]
            for _ in range(5):
                enough = sum(effects().values()) + 20
                eventually(lambda enough=enough: grown(enough))
                connections.close_all()
                server.kill()
                server.start()
            done.set()
            sold = sum(seller() for seller in sellers)
            eventually(lambda: queue.count_tasks(status="completed") == sold)
        found = effects()
        assert {*found.values()} == {1}
        assert len(found) == 2 * sold
        assert queue.count_tasks() == sold
