"""Tickets without a broker: which task each one starts, and what happens to a ticket that starts none."""

from __future__ import annotations

import math
import queue as queues
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from helpers import PATIENCE, eventually, parts_of, pool_of

from taskx import (
    ConfigurationError,
    Context,
    MemoryRepository,
    Queue,
    RepositoryUnavailable,
    SchemaMismatch,
    SQLiteRepository,
    TaskStatus,
)
from taskx.node.broker import BrokerEngine, Ticket
from taskx.node.broker.claims import Claims
from taskx.node.broker.dispatch import DEEPEST, DEPTH, Dispatcher
from taskx.tasks.timing import Timing
from taskx.testing import inline


class Bus(BrokerEngine):
    """An engine whose broker is a list of tickets in this process."""

    name = "bus"

    def __init__(self, tickets: queues.Queue[Ticket | None], **options: Any) -> None:
        super().__init__(**{"one_host": True, "resend": 60.0, **options})
        self.tickets = tickets
        self.away = False
        self.tended = 0
        self.ends = False

    def process_ends(self) -> bool:
        return self.ends

    def connect(self) -> None:
        if self.away:
            raise OSError("the broker is away")

    def tend(self) -> None:
        self.tended += 1
        self.connect()

    def send(self, ticket: Ticket) -> None:
        self.connect()
        self.tickets.put(ticket)


class Shop:
    """A queue that sends tickets, and queues of worker processes, all in this process."""

    def __init__(self, repository: Any, timing: Timing) -> None:
        self._repository = repository
        self._timing = timing
        self.tickets: queues.Queue[Ticket | None] = queues.Queue()
        self.ran: list[Any] = []
        self.edge, self.engine = self._queue()
        self._threads: list[threading.Thread] = []

    def _queue(self) -> tuple[Queue, Bus]:
        engine = Bus(self.tickets)
        return Queue(self._repository, engine=engine, timing=self._timing), engine

    def workers(
        self, count: int, register: Any, serve: bool = True, *, hand_over: bool = False
    ) -> Bus:
        """Start the queue of a worker process with ``workers`` threads, which take tickets if it serves."""
        queue, engine = self._queue()
        register(queue)
        engine.begin_work(count, hand_over=hand_over)
        eventually(lambda: engine._pool is not None)
        if serve:
            for _ in range(count):
                self._threads.append(threading.Thread(target=self._serve, args=(engine,)))
                self._threads[-1].start()
        return engine

    def _serve(self, engine: Bus) -> None:
        while (ticket := self.tickets.get()) is not None:
            engine.run(*ticket)

    def close(self) -> None:
        for _ in self._threads:
            self.tickets.put(None)
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def shop(tmp_path, timing) -> Iterator[Shop]:
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        made = Shop(repository, timing)
        yield made
        made.close()
        for queue in list(repository.queues):
            queue.stop(5, cancel=True)


def note(shop: Shop, **options: Any) -> Any:
    def register(queue: Queue) -> None:
        queue.executor("note", **options)(lambda n: shop.ran.append(n))

    return register


def submit(shop: Shop, *numbers: int, **options: Any) -> list[Any]:
    shop.edge.declare("note")
    return [shop.edge.submit("note", {"n": n}, **options) for n in numbers]


def knows_senders(shop: Shop, worker: Bus) -> None:
    """Wait until a worker process knows the nodes that send tickets, and leaves that to them.

    Two that send at once may send in another order than that of the tasks, or one ticket more.
    """
    known = worker._pool.dispatcher  # type: ignore[union-attr]
    eventually(lambda: {node.id for node in shop.edge.nodes()} <= {*known.crew.ids})


def the_tickets(shop: Shop, count: int) -> list[Ticket]:
    """Wait for a number of tickets, and take them."""
    return [shop.tickets.get(timeout=PATIENCE) for _ in range(count)]  # type: ignore[misc]


def tickets_of(shop: Shop) -> list[str]:
    """Return the ids of the tasks whose tickets were sent and not used yet."""
    repository = parts_of(shop.edge).repository
    owners = [node.id for node in repository.nodes()]
    return [task_id for (task_id,) in repository.find("buffered_on", owners, ("id",))]


def test_a_ticket_starts_the_task_that_it_names_among_equal_ones(shop):
    worker = shop.workers(2, note(shop), serve=False)
    submit(shop, 1, 2, 3)
    shop.edge.start()
    tickets = sorted(the_tickets(shop, 3))
    for ticket in reversed(tickets):
        worker.run(*ticket)
    assert shop.ran == [3, 2, 1]


def test_a_ticket_starts_a_better_task_that_has_none_and_its_own_gets_another(shop):
    worker = shop.workers(1, note(shop), serve=False)
    shop.edge.start()
    knows_senders(shop, worker)
    submit(shop, 1, 2)
    first, second = the_tickets(shop, 2)
    submit(shop, 9, priority=5)  # no ticket: there are two for one worker
    worker.run(*first)
    assert shop.ran == [9]
    (again,) = the_tickets(shop, 1)
    assert again == first
    worker.run(*second)
    worker.run(*again)
    assert shop.ran == [9, 2, 1]


def test_a_second_ticket_starts_nothing(shop):
    worker = shop.workers(1, note(shop), serve=False)
    shop.edge.start()
    (handle,) = submit(shop, 1)
    (ticket,) = the_tickets(shop, 1)
    for _ in range(3):
        worker.run(*ticket)
    assert (shop.ran, handle.task().starts) == ([1], 1)


def test_surplus_tickets_start_nothing_that_has_a_ticket_so_that_their_number_falls(shop):
    worker = shop.workers(2, note(shop), serve=False)
    shop.edge.start()
    knows_senders(shop, worker)
    submit(shop, *range(30))
    for ticket in the_tickets(shop, 4):  # two for each worker
        for _ in range(10):
            shop.tickets.put(ticket)
    for ticket in the_tickets(shop, 40):
        eventually(lambda: len(tickets_of(shop)) == 4)
        worker.run(*ticket)
    assert shop.ran == [0, 1, 2, 3]
    eventually(lambda: shop.tickets.qsize() == 4)
    while len(shop.ran) < 30:
        worker.run(*shop.tickets.get(timeout=PATIENCE))
    assert sorted(shop.ran) == [*range(30)]
    assert shop.tickets.empty()


def test_a_surplus_ticket_starts_a_better_task_that_has_none(shop):
    worker = shop.workers(1, note(shop), serve=False)
    shop.edge.start()
    knows_senders(shop, worker)
    submit(shop, 1, 2, 3)
    first, second = the_tickets(shop, 2)
    worker.run(*first)
    (third,) = the_tickets(shop, 1)
    submit(shop, 9, priority=5)  # no ticket: there are two for one worker
    worker.run(*first)
    assert shop.ran == [1, 9]
    for ticket in (second, third):
        worker.run(*ticket)
    assert shop.ran == [1, 9, 2, 3]


def test_a_ticket_of_a_type_that_this_worker_does_not_know_goes_to_another(shop):
    stranger = shop.workers(1, lambda queue: queue.executor("other")(lambda: None), serve=False)
    worker = shop.workers(1, note(shop), serve=False)
    shop.edge.start()
    (handle,) = submit(shop, 1)
    (ticket,) = the_tickets(shop, 1)
    stranger.run(*ticket)
    assert handle.task().status is TaskStatus.PENDING
    (again,) = the_tickets(shop, 1)
    worker.run(*again)
    assert shop.ran == [1]


def test_a_ticket_that_a_limit_of_this_node_turns_away_goes_to_another(shop):
    gates = [threading.Event(), threading.Event()]

    def register(queue: Queue) -> None:
        queue.executor("note", max_concurrency=1)(lambda n: gates[n].wait(PATIENCE) and None)

    full, free = (shop.workers(2, register, serve=False) for _ in range(2))
    shop.edge.start()
    for worker in (full, free):
        knows_senders(shop, worker)
    handles = submit(shop, 0, 1)
    first, second = the_tickets(shop, 2)
    busy = [threading.Thread(target=full.run, args=first)]
    busy[0].start()
    eventually(lambda: handles[0].task().status is TaskStatus.RUNNING)
    full.run(*second)
    assert the_tickets(shop, 1) == [second]
    busy.append(threading.Thread(target=free.run, args=second))
    busy[1].start()
    eventually(lambda: handles[1].task().status is TaskStatus.RUNNING)
    for gate in gates:
        gate.set()
    for thread in busy:
        thread.join(PATIENCE)


@pytest.mark.parametrize("options", [{"max_concurrency": 1}, {"rate": (2, 0.2)}])
def test_tickets_that_a_limit_of_the_node_turns_away_are_not_lost(shop, options):
    shop.workers(3, note(shop, **options))
    shop.edge.start()
    for handle in submit(shop, *range(8)):
        handle.result(PATIENCE)
    assert Counter(shop.ran) == dict.fromkeys(range(8), 1)


def test_a_task_on_its_way_back_gets_a_new_ticket(shop):
    def register(queue: Queue) -> None:
        @queue.executor("note", max_attempts=4)
        def note(ctx: Context, n: int) -> None:
            shop.ran.append(ctx.task.attempt)
            if ctx.task.attempt < 4:
                raise ValueError("once more")

    shop.workers(1, register)
    shop.edge.start()
    (handle,) = submit(shop, 1)
    handle.result(PATIENCE)
    assert shop.ran == [1, 2, 3, 4]


def test_while_the_broker_is_away_tasks_stay_free_for_nodes_that_reach_it(shop):
    shop.engine.away = True
    shop.workers(1, note(shop), serve=False).away = True
    shop.edge.start()
    handles = submit(shop, *range(5))
    edge = parts_of(shop.edge).repository
    eventually(lambda: not edge.find("buffered_on", [n.id for n in edge.nodes()], ("id",)))
    assert {handle.task().status for handle in handles} == {TaskStatus.PENDING}
    shop.engine.away = False
    assert {ticket.type for ticket in the_tickets(shop, 2)} == {"note"}


def test_a_lost_ticket_is_sent_again_only_while_a_worker_is_idle(shop):
    gate = threading.Event()

    def register(queue: Queue) -> None:
        queue.executor("hold")(lambda: gate.wait(PATIENCE) and None)
        queue.executor("note")(lambda n: shop.ran.append(n))

    shop.engine.resend = 0.2
    worker = shop.workers(1, register, serve=False)
    shop.edge.declare("hold")
    shop.edge.start()
    knows_senders(shop, worker)  # its own tickets are sent again after a minute only
    held = shop.edge.submit("hold")
    busy = threading.Thread(target=worker.run, args=the_tickets(shop, 1)[0])
    busy.start()
    eventually(lambda: held.task().status is TaskStatus.RUNNING)
    submit(shop, 1)
    the_tickets(shop, 1)  # lost
    with pytest.raises(queues.Empty):
        shop.tickets.get(timeout=1.0)
    gate.set()
    busy.join(PATIENCE)
    (again,) = the_tickets(shop, 1)
    worker.run(*again)
    assert shop.ran == [1]


@pytest.mark.timing(leave_tasks=PATIENCE)  # the worker, which can reach it, sends no ticket itself
def test_a_broker_that_cannot_be_reached_is_told_before_there_is_a_task(shop, caplog):
    shop.engine.away = True
    shop.edge.start()
    asked = Queue(parts_of(shop.edge).repository)
    [problem] = eventually(lambda: [p for p in asked.health().problems if p.kind == "broker"])
    [node] = asked.nodes()
    assert node.broker_error == "OSError: the broker is away" == problem.facts["error"]
    told = "tasks are stored, and start when it can: OSError: the broker is away"
    eventually(lambda: told in caplog.text)
    [check] = [check for check in asked.diagnose().checks if check.name == "broker"]
    assert (check.level, "broker of bus: OSError" in str(check)) == ("fail", True)
    [handle] = submit(shop, 1)
    assert "live nodes" not in str(
        handle.why()[0]
    )  # a node that only sends has no types to tell of
    worker = shop.workers(1, note(shop), serve=False)
    assert [reason.kind for reason in handle.why()] == ["broker", "worker"]
    shop.engine.away = False
    eventually(lambda: not asked.nodes()[0].broker_error)
    assert "broker" not in {problem.kind for problem in asked.health().problems}
    worker.run(*the_tickets(shop, 1)[0])
    assert shop.ran == [1]


def test_nodes_that_cannot_use_the_broker_for_one_reason_are_told_in_one_sentence(shop):
    shop.engine.away = True
    shop.workers(1, note(shop), serve=False).away = True
    shop.edge.start()
    [handle] = submit(shop, 1)
    nodes = eventually(lambda: all(n.broker_error for n in shop.edge.nodes()) and shop.edge.nodes())
    broker, _ = handle.why()
    assert sorted(broker.facts["nodes"]) == sorted(node.name for node in nodes)
    assert str(broker).startswith("Nodes ")


def test_a_task_whose_ticket_was_sent_says_that_its_ticket_waits(shop):
    shop.workers(1, note(shop), serve=False)
    shop.edge.start()
    [handle] = submit(shop, 1)
    the_tickets(shop, 1)
    assert "its ticket waits for a free worker on" in str(handle.why()[-1])


def test_a_node_in_a_worker_process_is_stopped_and_tuned_by_others(shop):
    shop.workers(2, note(shop))
    [node] = shop.edge.nodes()
    with pytest.raises(ConfigurationError, match="worker of bus, which TaskX does not stop"):
        shop.edge.stop_node(node.id)
    with pytest.raises(ConfigurationError, match="options of bus's worker"):
        shop.edge.tune(workers=5, node=node.id)
    shop.edge.tune(workers=5)
    submit(shop, 1)[0].result(PATIENCE)
    assert (shop.edge.nodes()[0].workers, shop.ran) == (2, [1])
    shop.edge.start()
    [sender] = [node for node in shop.edge.nodes() if not node.workers]
    shop.edge.stop_node(sender.id)
    eventually(lambda: shop.edge.stopped)


def test_a_test_can_drive_a_queue_that_has_an_engine(shop):
    note(shop)(shop.edge)
    with inline(shop.edge):
        shop.edge.submit("note", {"n": 1}).result()
    assert shop.ran == [1]
    assert shop.tickets.empty()


def busy_worker(shop: Shop, gate: threading.Event) -> tuple[Bus, Ticket]:
    """Return a worker process whose only thread waits for the gate, and the ticket of another task."""

    def register(queue: Queue) -> None:
        queue.executor("hold")(lambda: gate.wait(PATIENCE) and None)
        queue.executor("note")(lambda n: shop.ran.append(n))

    worker = shop.workers(1, register, serve=False, hand_over=True)
    shop.edge.declare("hold")
    shop.edge.start()
    held = shop.edge.submit("hold")
    worker.run(*the_tickets(shop, 1)[0])  # returns at once
    eventually(lambda: held.task().status is TaskStatus.RUNNING)
    submit(shop, 1)
    (ticket,) = the_tickets(shop, 1)
    return worker, ticket


@pytest.mark.timing(ticket_within=0.1)
def test_a_process_with_busy_threads_takes_no_ticket_from_an_idle_one(shop):
    """The threads of a broker wait with their tickets, and give them back after some time."""
    gate = threading.Event()
    worker, ticket = busy_worker(shop, gate)
    worker.run(*ticket)
    assert the_tickets(shop, 1) == [ticket]
    gate.set()


@pytest.mark.timing(ticket_within=PATIENCE)
def test_a_ticket_that_waits_for_a_busy_thread_gets_it_when_it_is_free(shop):
    gate = threading.Event()
    worker, ticket = busy_worker(shop, gate)
    waiting = threading.Thread(target=worker.run, args=ticket)
    waiting.start()
    gate.set()
    waiting.join(PATIENCE)
    eventually(lambda: shop.ran == [1])


def test_a_process_that_ends_gives_back_the_tickets_that_wait_for_its_threads(shop):
    gate = threading.Event()

    def register(queue: Queue) -> None:
        queue.executor("note")(lambda n: gate.wait(PATIENCE) and None)

    worker = shop.workers(1, register, serve=False, hand_over=True)
    shop.edge.start()
    knows_senders(shop, worker)
    first, second = submit(shop, 1, 2)
    tickets = the_tickets(shop, 2)
    worker.run(*tickets[0])
    eventually(lambda: first.task().status is TaskStatus.RUNNING)
    waiting = [threading.Thread(target=worker.run, args=tickets[1]) for _ in range(3)]
    for thread in waiting:
        thread.start()
    worker.take_no_more()
    for thread in waiting:
        thread.join(PATIENCE)
    assert the_tickets(shop, 3) == [tickets[1]] * 3
    gate.set()
    first.result(PATIENCE)
    assert second.task().starts == 0


@pytest.mark.timing(keep_ticket=0.01)
def test_a_worker_process_that_is_too_old_gives_its_tickets_to_others(shop, monkeypatch, caplog):
    """A newer TaskX has migrated the repository, and the node has retired. It still gets tickets."""
    old = shop.workers(1, note(shop), serve=False)
    shop.edge.start()
    knows_senders(shop, old)  # otherwise it may send a ticket, and its end would free the task
    handles = submit(shop, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Claims, "claim", _refuse)
        for ticket in the_tickets(shop, 2):
            old.run(*ticket)
    eventually(lambda: not any(node.workers for node in shop.edge.nodes()))
    given = the_tickets(shop, 2)
    assert {ticket.id for ticket in given} == {handle.id for handle in handles}
    for ticket in given:
        old.run(*ticket)
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert ["sends its tickets back" in text for text in told].count(True) == 1
    assert "start it with the newer TaskX: schema 99" in caplog.text
    shop.workers(1, note(shop))
    for handle in handles:
        handle.result(PATIENCE)
    assert sorted(shop.ran) == [1, 2]


def _refuse(*_: Any) -> None:
    raise SchemaMismatch("schema 99")


@pytest.mark.timing(keep_ticket=0.01)
def test_a_ticket_that_comes_while_the_repository_fails_is_given_back(shop, monkeypatch, caplog):
    worker = shop.workers(1, note(shop), serve=False)
    shop.edge.start()
    submit(shop, 1)
    (ticket,) = the_tickets(shop, 1)

    def fail(*_: Any) -> None:
        raise RepositoryUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Claims, "claim", fail)
        worker.run(*ticket)
    assert "tickets are sent back to the broker: the disk is full" in caplog.text
    assert the_tickets(shop, 1) == [ticket]
    worker.run(*ticket)
    assert shop.ran == [1]


def test_the_connection_is_tended_while_there_is_nothing_to_send(shop):
    shop.edge.start()
    eventually(lambda: shop.engine.tended > 2)
    shop.engine.away = True
    eventually(lambda: parts_of(shop.edge).repository.nodes()[0].broker_error)


@pytest.mark.parametrize("clean_up", [None, ValueError])
def test_a_task_that_a_signal_of_its_process_ends_is_interrupted(shop, clean_up):
    """The handler raises SystemExit in the main thread, and clean-up of the executor another error."""
    worker = shop.workers(
        1, lambda queue: queue.executor("note")(lambda n: _end(worker, clean_up)), serve=False
    )
    shop.edge.start()
    (handle,) = submit(shop, 1)
    with pytest.raises(SystemExit):
        worker.run(*the_tickets(shop, 1)[0])
    task = handle.task()
    assert (task.status, task.interruptions, task.errors) == (TaskStatus.PENDING, 1, 0)


def _end(worker: Bus, clean_up: type[Exception] | None) -> None:
    worker.ends = True
    try:
        sys.exit(1)
    finally:
        if clean_up is not None:
            raise clean_up("the connection is gone")


def test_an_executor_that_exits_by_itself_fails(shop):
    worker = shop.workers(
        1, lambda queue: queue.executor("note")(lambda n: sys.exit(3)), serve=False
    )
    shop.edge.start()
    (handle,) = submit(shop, 1)
    worker.run(*the_tickets(shop, 1)[0])
    assert handle.task().status is TaskStatus.FAILED


class Rounds:
    """A queue that sends tickets when the test makes a round, and has no thread for it."""

    def __init__(self, shop: Shop, queue: Queue) -> None:
        self._shop = shop
        queue.start()
        self.dispatcher = pool_of(queue).dispatcher  # type: ignore[attr-defined]

    def sent(self) -> list[Ticket]:
        """Make a round, and return the tickets that it has sent."""
        self.dispatcher._crew_at = -math.inf
        assert self.dispatcher.round()
        found = []
        while not self._shop.tickets.empty():
            found.append(self._shop.tickets.get())
        return found  # type: ignore[return-value]


@pytest.fixture
def rounds(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Callable[[Queue], Rounds]:
    monkeypatch.setattr(Dispatcher, "_start_thread", lambda self: None)
    return lambda queue: Rounds(shop, queue)


def use(worker: Bus, tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        worker.run(*ticket)


def test_more_tickets_are_sent_while_workers_use_all_between_two_rounds(shop, rounds):
    workers = [shop.workers(2, note(shop), serve=False) for _ in range(2)]
    made = rounds(shop.edge)
    submit(shop, *range(200))
    numbers = []
    for _ in range(5):
        tickets = made.sent()
        numbers.append(len(tickets))
        use(workers[0], tickets)
    assert numbers == [4 * DEPTH, 8 * DEPTH, 4 * DEEPEST, 4 * DEEPEST, 4 * DEEPEST]
    assert shop.ran == [*range(sum(numbers))]


def test_fewer_tickets_are_sent_again_when_workers_leave_most_of_them(shop, rounds):
    worker = shop.workers(2, note(shop), serve=False)
    made = rounds(shop.edge)
    submit(shop, *range(100))
    for _ in range(3):
        tickets = made.sent()
        use(worker, tickets)
    assert len(tickets) == 2 * DEEPEST
    tickets = made.sent()
    assert len(tickets) == 2 * DEEPEST
    use(worker, tickets[:3])
    assert made.sent() == []  # 13 of them are left
    use(worker, tickets[3:-1])
    assert len(made.sent()) == 2 * DEPTH - 1
    use(worker, tickets[-1:])
    assert made.sent() != []


def test_several_programs_together_send_no_more_tickets_than_one(shop, rounds):
    worker = shop.workers(2, note(shop), serve=False)
    made, other = rounds(shop.edge), rounds(shop._queue()[0])
    submit(shop, *range(100))
    for _ in range(3):
        tickets = made.sent()
        assert other.sent() == []
        use(worker, tickets)
    assert len(tickets) == 2 * DEEPEST
    few = other.sent()
    assert len(few) == 2 * DEPTH
    assert len(made.sent()) == 2 * DEEPEST - len(few)


def test_a_process_that_is_no_worker_drops_tickets(shop, caplog):
    shop.edge.start()
    shop.engine.run("some-id", "note")
    assert "dropped" in caplog.text


def test_a_repository_of_one_process_or_host_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot see this repository"):
        Queue(MemoryRepository(), engine=Bus(queues.Queue()))
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        with pytest.raises(ConfigurationError, match="one_host=True"):
            Queue(repository, engine=Bus(queues.Queue(), one_host=False))
        engine = Bus(queues.Queue())
        first = Queue(repository, engine=engine)
        with pytest.raises(ConfigurationError, match="one queue"):
            Queue(repository, engine=engine)
        assert first.count_tasks() == 0
    for wrong in ({"one_host": "yes"}, {"resend": 0}):
        with pytest.raises(ConfigurationError):
            Bus(queues.Queue(), **wrong)
    with pytest.raises(ConfigurationError, match="engine must be"):
        Queue(MemoryRepository(), engine="celery")
