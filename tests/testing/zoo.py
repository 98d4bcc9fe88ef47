"""A program for the simulator that uses what the promises are about, and the search for planted bugs.

python -m tests.testing.zoo --seeds 1000         draws new seeds, and runs each in two processes
python -m tests.testing.zoo --planted            finds the planted bugs
"""

import argparse
import os
import secrets
import subprocess
import sys
from contextlib import suppress

import pytest

from taskx import (
    DuplicateTask,
    InvalidTransition,
    RetryPolicy,
    Snooze,
    TaskNotFound,
    chain,
    every,
    executor,
    group,
)
from taskx.testing import simulate
from taskx.testing.simulation import FAULTS, _runs, _Seeded

from .planted import PLANTED

#: The seeds that each call of the simulator gets here.
CHUNK = 200
#: The seeds among which a planted bug must be found.
MOST = 10_000


@executor("plain")
def plain(n: int) -> int:
    return n


@executor("flaky", max_attempts=3)
def flaky(ctx, n: int) -> int:
    if ctx.task.errors < n:
        raise ValueError("again")
    return n


@executor("later", retry=RetryPolicy(3, base=5, backoff="fixed"))
def later(ctx, n: int) -> int:
    if ctx.task.errors < n:
        raise ValueError("later")
    return n


@executor("one", max_concurrency=1, limit_scope="global")
def one(n: int) -> int:
    return n


@executor("two", max_concurrency=2, limit_scope="global", max_attempts=2)
def two(ctx, n: int) -> int:
    if n and not ctx.task.errors:
        raise ValueError("once more")
    return n


@executor("mine", max_concurrency=1)
def mine(n: int) -> int:
    return n


@executor("rated", rate=(2, 10.0), burst=2, limit_scope="global")
def rated(n: int) -> int:
    return n


@executor("fragile", max_crashes=1)
def fragile(n: int) -> int:
    return n


@executor("steps")
def steps(ctx, n: int) -> int:
    first = ctx.step("a", lambda: n + 1)
    ctx.sleep(1)
    return ctx.step("b", lambda: first + 1)


@executor("nap")
def nap(ctx, n: int) -> int:
    if ctx.task.snoozes < n:
        raise Snooze(3)
    return n


class Zoo:
    """Everything that the promises are about, in a program."""

    def __init__(self):
        self.numbers = 0

    def __call__(self, queue):
        for one_of_them in (plain, flaky, later, one, two, mine, rated, fragile, steps, nap):
            queue.register_executor(one_of_them)
        self.declare(queue)
        return [*self.submits(queue), *self.flows(queue), *self.changes(queue)]

    def declare(self, queue):
        @queue.executor("parent")
        def parent(n: int) -> int:
            queue.submit("plain", {"n": n})
            return n

        queue.schedule("tick", every(5), "plain", {"n": 0}, misfire="one")
        queue.schedule("alone", every(2), "one", {"n": 0}, overlap="skip")

    def submits(self, queue):
        def submit(type, n, **options):
            return lambda: queue.submit(type, {"n": n}, **options)

        return [
            submit("plain", 1),
            submit("plain", 0, concurrency_key="k"),
            submit("plain", 1, concurrency_key="k"),
            submit("flaky", 1, concurrency_key="k"),
            submit("flaky", 9, concurrency_key="k"),
            submit("flaky", 1),
            submit("flaky", 9),
            submit("later", 1, concurrency_key="l"),
            submit("later", 2),
            submit("one", 1),
            submit("one", 2),
            submit("two", 0),
            submit("two", 1),
            submit("mine", 1),
            submit("rated", 0),
            submit("rated", 1),
            submit("fragile", 1),
            submit("steps", 1),
            submit("parent", 1),
            submit("nap", 2),
            submit("plain", 1, delay=3),
            submit("plain", 1, expires=2),
            submit("later", 1, expires=4, concurrency_key="k"),
            lambda: queue.submit_many([plain.task(1), one.task(2), flaky.task(1)]),
            self.unique(queue, "return"),
            self.unique(queue, "replace"),
            self.unique(queue, "replace", delay=1),
            self.unique(queue, "reject", delay=3),
        ]

    def unique(self, queue, on_conflict, **options):
        def submit():
            self.numbers += 1
            params = {"n": self.numbers}
            with suppress(DuplicateTask):
                queue.submit("plain", params, unique_key="u", on_conflict=on_conflict, **options)

        return submit

    def flows(self, queue):
        def good():
            middle = group(flaky.task(1), plain.task(2))
            queue.submit_flow(chain(plain.task(1), middle, plain.task(3)))

        def bad():
            queue.submit_flow(chain(plain.task(1), flaky.task(9), plain.task(3)))

        def children(n):
            def submit():
                a, b = queue.submit("flaky", {"n": n}), queue.submit("one", {"n": 0})
                options = {"depends_on": [a, b], "on_parent_failure": "run"}
                queue.submit("plain", {"n": 0}, **options)
                options = {"depends_on": [a], "on_parent_failure": "fail", "concurrency_key": "k"}
                queue.submit("plain", {"n": 0}, **options)

            return submit

        def orphan(policy):
            def submit():
                for task in queue.iter_tasks(status="failed"):
                    options = {"depends_on": [task.id], "on_parent_failure": policy}
                    queue.submit("plain", {"n": 1}, **options)
                    return

            return submit

        return [good, bad, children(1), children(9), orphan("cancel"), orphan("fail")]

    def changes(self, queue):
        def change(how, *statuses):
            def ask():
                for status in statuses:
                    for task in queue.iter_tasks(status=status):
                        with suppress(TaskNotFound, InvalidTransition, DuplicateTask):
                            how(task.id)
                            return

            return ask

        return [
            change(queue.cancel_task, "running", "pending"),
            change(queue.cancel_task, "pending"),
            change(queue.requeue, "failed", "cancelled"),
            change(queue.requeue, "cancelled"),
            lambda: queue.pause("plain"),
            lambda: queue.resume("plain"),
            lambda: queue.tune("two", max_concurrency=1),
        ]


def find(name, seeds):
    """Return the first of these seeds that finds a planted bug, and what it says; None if none does."""
    with pytest.MonkeyPatch.context() as patch, _runs(Zoo, 3, None) as run:
        PLANTED[name].plant(patch.setattr)
        for seed in seeds:
            if problem := run(_Seeded(seed, 3, FAULTS)).problem:
                return seed, problem
    return None


def run_new(count):
    """Run new seeds, each in two processes, and compare what happened."""
    first = secrets.randbelow(1 << 48)
    print(f"seeds {first} to {first + count - 1}", flush=True)
    command = [
        sys.executable,
        "-m",
        "tests.testing.zoo",
        "--from",
        str(first),
        "--seeds",
        str(count),
    ]
    twins = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    done = 0
    for lines in zip(*(twin.stdout for twin in twins), strict=False):
        if lines[0] != lines[1]:
            print("the processes differ:", *lines, sep="\n")
            return 1
        done += CHUNK
        print(f"{min(done, count)} seeds", flush=True)
    return max(twin.wait() for twin in twins)


def run_these(first, count):
    for chunk in range(first, first + count, CHUNK):
        seeds = range(chunk, min(chunk + CHUNK, first + count))
        print(chunk, simulate(Zoo, seeds=seeds), flush=True)


def run_planted(names):
    missed = 0
    for name in names or PLANTED:
        found = find(name, range(MOST))
        missed += found is None
        print(name, *(found or ("was not found",)), flush=True)
    return missed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", type=int, dest="first")
    parser.add_argument("--planted", nargs="*")
    options = parser.parse_args()
    if options.planted is not None:
        return run_planted(options.planted)
    if options.first is not None:
        return run_these(options.first, options.seeds)
    return run_new(options.seeds)


if __name__ == "__main__":
    sys.exit(main())
