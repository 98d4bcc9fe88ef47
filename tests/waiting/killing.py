"""Processes that are killed while their tasks wait, and what must hold in spite of that.

With PYTHONPATH=tests:

python -m tests.waiting.killing ask sqlite       500 tasks that ask three times each; or mongo, postgres
python -m tests.waiting.killing sleep sqlite     1,000 tasks that sleep three times each
python -m tests.waiting.killing answer sqlite    the time from an answer to the executor, without kills
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from helpers import PATIENCE, Child, eventually
from workers import Workers, on_mongo, on_postgres, on_sqlite

from taskx import Config, InvalidTransition, Queue, Task

EXECUTORS = """
import time
from taskx import Task

@queue.executor("ask", max_crashes=1000)
def ask(ctx, never):
    got = []
    for name in ("a", "b", "c"):
        try:
            got.append(ctx.ask(name, timeout=0.5 if name in never else None))
        except TimeoutError:
            got.append("nobody")
        ctx.step(f"after {name}", note, ctx.task.id, name)
    return got

@queue.executor("sleep", max_crashes=1000)
def sleep(ctx, seconds, times):
    for n in range(times):
        began = ctx.step(f"began {n}", lambda: [int(time.time() * 1000), ctx.task.crashes])
        ctx.sleep(seconds, step=f"sleep {n}")
        late = (time.time() * 1000 - began[0]) / 1000 - seconds  # as a sleep counts
        assert late >= 0, "it woke early"
        note(ctx.task.id, n, late, ctx.task.crashes - began[1], time.time())
    return "awake"

@queue.executor("tree", max_crashes=1000)
def tree(ctx, depth, fan):
    if not depth:
        return ctx.step("leaf", lambda: note("leaf", ctx.task.id) or 1)
    below = [Task(type="tree", params={"depth": depth - 1, "fan": fan}) for _ in range(fan)]
    return sum(ctx.run_all("below", below))

@queue.executor("quick")
def quick(ctx):
    ctx.ask("a")
    return time.time()
"""


class Killing:
    """Two processes, of which one after the other is killed and replaced.

    Attributes:
        kills: the number of kills.
        ups: when a process began to run, and when one was killed: the time, and 1 or -1.
    """

    def __init__(self, workers: Workers) -> None:
        self._nursery = workers.nursery(EXECUTORS)
        self.kills = 0
        self.ups: list[tuple[float, int]] = []
        self._pids: list[int] = []
        for _ in range(2):
            self._start()

    def _start(self) -> None:
        self._pids.append(self._nursery.start())
        self.ups.append((time.time(), 1))

    def kill(self) -> None:
        """Kill the process that has run for longer, and start another one; wait until it runs."""
        os.kill(self._pids.pop(0), signal.SIGKILL)
        self.ups.append((time.time(), -1))
        self.kills += 1
        self._start()

    @contextmanager
    def often(self, every: float) -> Iterator[None]:
        """Kill once in so many seconds in a thread, on a slow machine less often.

        A process lives for several times as long as it takes to start, or nothing would ever end.
        """
        over, errors = threading.Event(), list[BaseException]()

        def run() -> None:
            due, took = time.monotonic() + every, 0.0
            try:
                while not over.wait(max(2 * took, due - time.monotonic())):
                    began = time.monotonic()
                    due = began + every
                    self.kill()
                    took = time.monotonic() - began
            except BaseException as error:
                errors.append(error)
                raise

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert not errors

    def without(self, begin: float, end: float) -> float:
        """Return for how many seconds in a period no process ran."""
        moments = [begin, *(at for at, _ in self.ups if begin < at < end), end]
        running = {at: sum(one for then, one in self.ups if then <= at) for at in moments[:-1]}
        pairs = pairwise(moments)
        return sum(later - at for at, later in pairs if not running[at])


class Answers:
    """Gives answers, some of them early, twice or never, and notes which ones counted."""

    def __init__(self, queue: Queue, count: int, seed: int) -> None:
        self._queue, self._chance = queue, random.Random(seed)
        self.first: dict[str, int] = {}
        self.never = set[str]()
        self.late: list[str] = []
        self.ids = [f"task{number:03}" for number in range(count)]
        for task_id in self.ids:
            self._submit(task_id)
        self._chance.shuffle(self.late)

    def _submit(self, task_id: str) -> None:
        never = [name for name in "abc" if self._chance.random() < 0.05]
        self.never |= {f"{task_id}/{name}" for name in never}
        self._queue.submit(Task(id=task_id, type="ask", params={"never": never}))
        for name in "abc":
            answer_id = f"{task_id}/{name}"
            if name not in never and self._chance.random() < 0.3:
                self.give(answer_id)
            elif name not in never:
                self.late.append(answer_id)

    def give(self, answer_id: str) -> None:
        for _ in range(2 if self._chance.random() < 0.1 else 1):
            value = self._chance.randrange(1_000_000)
            if self._queue.finish(answer_id, value):
                assert answer_id not in self.first, "it counted twice"
                self.first[answer_id] = value

    def expected(self, task_id: str) -> list[object]:
        ids = [f"{task_id}/{name}" for name in "abc"]
        return ["nobody" if i in self.never else self.first[i] for i in ids]


def check_answers(workers: Workers, count: int, every: float, pause: float, seed: int = 1) -> int:
    """Have tasks ask three times each while processes are killed; return the number of kills."""
    queue, between = Queue(workers.repository), threading.Event()
    queue.declare("ask")
    killing = Killing(workers)
    with killing.often(every):
        answers = Answers(queue, count, seed)
        eventually(lambda: killing.kills)  # else all may have ended before the first one
        for answer_id in answers.late:
            between.wait(pause)  # blocks on purpose
            answers.give(answer_id)
        results = {i: queue.handle(i).result(10 * PATIENCE) for i in answers.ids}
    assert results == {i: answers.expected(i) for i in answers.ids}
    assert queue.count_tasks(status="pending") == 0
    assert {task.attempt for task in queue.iter_tasks(type="ask")} == {1}
    assert {tuple(words) for words in workers.log()} == {(i, n) for i in answers.ids for n in "abc"}
    try:
        queue.finish(f"{answers.ids[0]}/d", 1)
    except InvalidTransition:
        return killing.kills
    raise AssertionError("a task that has ended was answered")


def check_sleeps(
    workers: Workers, count: int, every: float, seconds: float, times: int, pause: float
) -> tuple[int, list[float], list[float]]:
    """Have tasks sleep while processes are killed.

    Return the number of kills, and by how many seconds sleeps ended too late, less those without a process:
    where the process of the task was not killed as it ran, and where it was.
    """
    queue, between = Queue(workers.repository), threading.Event()
    queue.declare("sleep")
    killing = Killing(workers)
    with killing.often(every):
        handles = []
        for _ in range(count):
            handles.append(queue.submit("sleep", {"seconds": seconds, "times": times}))
            between.wait(pause)  # blocks on purpose
        eventually(lambda: killing.kills)
        assert {handle.result(10 * PATIENCE) for handle in handles} == {"awake"}
    assert {handle.task().attempt for handle in handles} == {1}
    calm, struck = list[float](), list[float]()
    first = dict[tuple[str, ...], tuple[float, int, float]]()
    for (
        task_id,
        n,
        late,
        crashes,
        at,
    ) in workers.log():  # each step may be noted again after a crash
        first.setdefault((task_id, n), (float(late), int(crashes), float(at)))
    assert len(first) == times * count
    for late, crashes, at in first.values():
        left = late - killing.without(at - late, at)
        (struck if crashes else calm).append(left)
    return killing.kills, sorted(calm), sorted(struck)


def latencies(queue: Queue, count: int) -> list[float]:
    """Return how many milliseconds after an answer the executor goes on, sorted."""
    found = list[float]()
    for _ in range(count):
        handle = queue.submit("quick")
        eventually(lambda it=handle: it.task().starts == 1 and it.task().status == "pending")  # type: ignore[misc]
        began = time.time()
        queue.finish(f"{handle.id}/a", 1)
        found.append((handle.result(PATIENCE) - began) * 1000)
    return sorted(found)


def measure(workers: Workers, count: int) -> None:
    """Print the latencies of answers within one process, and from another one."""
    with Queue(workers.repository, Config(worker_num=1)) as queue:
        exec(EXECUTORS, {"queue": queue, "note": print})
        here = latencies(queue, count)
    queue = Queue(workers.repository)
    queue.declare("quick")
    workers.start(EXECUTORS)
    for name, some in (("within one process", here), ("from another", latencies(queue, count))):
        print(
            f"{name}: p50 {some[count // 2]:.1f} ms, p10 {some[count // 10]:.1f}, least {some[0]:.1f}"
        )


STORES = {"sqlite": on_sqlite, "mongo": on_mongo, "postgres": on_postgres}


@contextmanager
def opened(store: str, threads: int) -> Iterator[Workers]:
    """Yield worker programs on a new, empty store."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        children: list[Child] = []

        def spawn(*args: object) -> Child:
            children.append(Child(*args))  # type: ignore[arg-type]
            return children[-1]

        workers = stack.enter_context(STORES[store](spawn, Path(folder)))
        stack.callback(lambda: [child.kill() for child in children])
        workers.threads = threads
        yield workers


def ask(store: str) -> None:
    # The small server of the tests looks at all documents for most queries: ten lots are much quicker.
    lots = 10 if store == "mongo" else 1
    for seed in range(1, lots + 1):
        with opened(store, 1) as workers:
            kills = check_answers(workers, 500 // lots, 0.3, 0.02, seed)
            print(f"{500 // lots} tasks, {kills} kills, all answers as given", flush=True)


def sleep(store: str) -> None:
    with opened(store, 4) as workers:
        kills, *lists = check_sleeps(workers, 1000, 1.0, 5.0, 3, 0.005)
    for name, some in zip(("calm", "struck"), lists, strict=True):
        within = bisect_right(some, 0.3 if name == "calm" else 1.3)
        at = [some[int(len(some) * part)] for part in (0.5, 0.9, 0.99)] if some else []
        print(name, len(some), "within the bound", within, "p50, p90, p99", at, some[-1:])
    print(kills, "kills")


def answer(store: str) -> None:
    with opened(store, 4) as workers:
        measure(workers, 100)


def main() -> None:
    began = time.time()
    {"ask": ask, "sleep": sleep, "answer": answer}[sys.argv[1]](sys.argv[2])
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
