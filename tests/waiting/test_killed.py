"""Tasks that wait survive the death of their processes: no answer is lost, and no sleep ends early."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from helpers import PATIENCE, eventually

from taskx import InvalidTransition, Queue, Task

#: Seconds between two kills.
EVERY = 0.3

EXECUTORS = """
import time

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
def sleep(ctx):
    for n in range(2):
        began = ctx.step(f"began {n}", lambda: int(time.time() * 1000))  # as a sleep counts
        ctx.sleep(1.1, step=f"sleep {n}")
        assert time.time() * 1000 >= began + 1100, "it woke early"
    return "awake"
"""

TREE = """
from taskx import Task

@queue.executor("tree", max_crashes=1000)
def tree(ctx, depth, fan):
    if not depth:
        return ctx.step("leaf", lambda: note("leaf", ctx.task.id) or 1)
    below = [Task(type="tree", params={"depth": depth - 1, "fan": fan}) for _ in range(fan)]
    return sum(ctx.run_all("below", below))
"""


@contextmanager
def killing(workers, seed: int, executors: str = EXECUTORS) -> Iterator[Callable[[], None]]:
    """Run two processes; a call of what this returns kills one of them, and starts another."""
    chance = random.Random(seed)
    children = workers.start(executors, 2)

    def kill() -> None:
        place = chance.randrange(2)
        children[place].kill()
        children[place] = workers.spawn(executors)

    yield kill


class Answers:
    """Gives answers, some of them early, twice or never, and notes which ones counted."""

    def __init__(self, queue: Queue, count: int, seed: int) -> None:
        self._queue, self._chance = queue, random.Random(seed)
        self.first: dict[str, int] = {}
        self.never = set[str]()
        self.late: list[str] = []
        for number in range(count):
            self._submit(f"task{number:03}")

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
        self._chance.shuffle(self.late)

    def give(self, answer_id: str) -> None:
        for _ in range(2 if self._chance.random() < 0.1 else 1):
            value = self._chance.randrange(1_000_000)
            if self._queue.finish(answer_id, value):
                assert answer_id not in self.first, "it counted twice"
                self.first[answer_id] = value

    def expected(self, task_id: str) -> list[object]:
        ids = [f"{task_id}/{name}" for name in "abc"]
        return ["nobody" if i in self.never else self.first[i] for i in ids]


@pytest.mark.process
@pytest.mark.parametrize("seed", [1])
def test_no_answer_is_lost_and_none_is_taken_twice(workers, seed):
    queue = Queue(workers.repository)
    queue.declare("ask")
    pause = threading.Event()
    with killing(workers, seed) as kill:
        answers = Answers(queue, 30, seed)
        for number, answer_id in enumerate(answers.late):
            if number % 15 == 7:
                kill()
            pause.wait(EVERY / 15)  # blocks on purpose
            answers.give(answer_id)
        ids = sorted({answer_id.partition("/")[0] for answer_id in answers.first})
        results = {i: queue.handle(i).result(PATIENCE) for i in ids}
    assert results == {i: answers.expected(i) for i in ids}
    assert queue.count_tasks(status="pending") == 0
    assert {task.attempt for task in queue.iter_tasks(type="ask")} == {1}
    done = [tuple(words) for words in workers.log()]
    assert {*done} == {(i, name) for i in ids for name in "abc"}
    with pytest.raises(InvalidTransition):
        queue.finish(f"{ids[0]}/d", 1)


@pytest.mark.process
def test_no_sleep_ends_early_and_all_end(workers):
    queue = Queue(workers.repository)
    queue.declare("sleep")
    pause = threading.Event()
    with killing(workers, 1) as kill:
        handles = [queue.submit("sleep") for _ in range(40)]
        for handle in handles[:4]:
            pause.wait(EVERY)  # blocks on purpose
            kill()
            eventually(lambda it=handle: it.task().starts)
        assert [handle.result(PATIENCE) for handle in handles] == ["awake"] * 40
    tasks = [handle.task() for handle in handles]
    assert {task.attempt for task in tasks} == {1}


@pytest.mark.process
def test_a_tree_of_tasks_is_complete(workers):
    """Depth 6 and fan 4, on one process with two workers that is killed again and again, took 3 minutes."""
    queue, depth, fan = Queue(workers.repository), 3, 3
    queue.declare("tree")
    pause = threading.Event()
    with killing(workers, 1, TREE) as kill:
        handle = queue.submit("tree", {"depth": depth, "fan": fan})
        for n in range(6):
            pause.wait(EVERY)  # blocks on purpose
            kill()
            eventually(lambda n=n: handle.done() or queue.count_tasks(status="completed") >= n)
        assert handle.result(PATIENCE) == fan**depth
        eventually(lambda: queue.count_tasks(status="pending") == 0)
    tasks = [*queue.iter_tasks(type="tree")]
    assert len(tasks) == sum(fan**n for n in range(depth + 1))
    assert {task.status for task in tasks} == {"completed"}
    assert {task.attempt for task in tasks} == {1}
    assert {task_id for _, task_id in workers.log()} == {
        task.id for task in tasks if not task.params["depth"]
    }
