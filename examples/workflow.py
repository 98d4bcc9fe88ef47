"""The nightly report of a small shop, as a workflow: what happens beyond one task and one try.

Three branches deliver their sales over HTTP, from a server that fails now and then. They are fetched side
by side and merged; then a chart is drawn, and the report is sent, once. Killed at any moment and run again,
it goes on where it was. Run it: ``python examples/workflow.py [FILE]``
"""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.error
import urllib.request
from datetime import timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from taskx import (
    Config,
    DuplicateTask,
    Flow,
    Permanent,
    Queue,
    RetryPolicy,
    SQLiteRepository,
    Task,
    TaskFailed,
    chain,
    group,
)

SALES = {"berlin": [12, 30], "lima": [7], "oslo": [5, 5, 5]}


class Branches(BaseHTTPRequestHandler):
    """Answers with a branch's sales; each first request fails."""

    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        branch = self.path.strip("/")
        known, first = branch in SALES, branch not in self.asked
        self.asked.add(branch)
        self.send_response(404 if not known else 503 if first else 200)
        self.end_headers()
        self.wfile.write(json.dumps(SALES.get(branch, [])).encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@cache
def server() -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", 0), Branches)


path = sys.argv[1] if len(sys.argv) > 1 else "workflow.db"
queue = Queue(
    SQLiteRepository(path), Config(worker_num=4, retention={"completed": timedelta(days=7)})
)


# Two requests at a time. Retried while the server is down, at most three times, each within five seconds;
# but a branch that is not there will not be there next time either.
@queue.executor(
    timeout=5, retry=RetryPolicy(4, base=0.05, jitter=0.1, retry_on=OSError), max_concurrency=2
)
def fetch(ctx, branch: str) -> list[int]:
    url = f"http://127.0.0.1:{server().server_port}"
    try:
        with urllib.request.urlopen(f"{url}/{branch}", timeout=ctx.remaining()) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise Permanent(f"no branch {branch!r}") from error
        raise


@queue.executor()
def merge(ctx) -> dict[str, int]:
    """Its parents are the tasks that it depends on, in order."""
    return {parent.params["branch"]: sum(parent.result) for parent in ctx.parents}


@queue.executor(max_attempts=3)
def report(ctx, day: str) -> str:
    [merged] = ctx.parents
    text = ", ".join(f"{branch} {total}" for branch, total in merged.result.items())
    ctx.step("send", send, f"{day}: {text}")  # once, whatever the number of attempts
    if ctx.task.attempt == 1:
        raise ConnectionError("lost just after it was sent")
    return text


def send(text: str) -> None:
    print("sent", text)


# In a child process: a library that takes it down takes nothing else with it. What it logs is kept.
@queue.executor(isolation="process", timeout=60, capture_log=True)
def draw(ctx) -> list[str]:
    [merged] = ctx.parents
    if ctx.task.crashes == 0:
        os._exit(1)  # so much for the first try
    ctx.logger.info("drawing %d bars", len(merged.result))
    return ["#" * (total // 5) for total in merged.result.values()]


def nightly(day: str) -> Flow:
    """Fetch side by side, then merge, then draw and report."""
    fetched = group(*(fetch.task(branch=branch) for branch in SALES))
    # As long as its record is kept, no other task holds this key: so no night is reported twice.
    merged = Task(type="merge", unique_key=f"night {day}", unique_scope="ever")
    # One mail at a time, in order, whichever process sends it.
    sent = report.task(day=day)
    sent.concurrency_key = "mail"
    return chain(fetched, merged, group(sent, draw.task()))


def run_night(day: str) -> None:
    """Run it, unless it was, or is under way."""
    try:
        whole = queue.submit_flow(nightly(day))
    except DuplicateTask as error:  # nothing was stored, none of its tasks
        print("not again:", error.unique_key)
        queue.drain(timeout=60)
        return
    sent, chart = whole.result(timeout=60)
    print("report:", sent)
    print("chart:", *chart, "|", whole.handles[-1].task().log.split(": ")[-1].strip())
    print(f"{len(whole.ids)} tasks, {whole.progress():.0f} % of them ended, {whole.status()}")


def main() -> None:
    threading.Thread(target=server().serve_forever, daemon=True).start()
    with queue:
        run_night("monday")
        run_night("monday")

        # A failure cancels what depends on it, and stays as a dead letter until somebody sees to it.
        lost = queue.submit_flow(chain(fetch.task(branch="rome"), Task(type="merge")))
        try:
            lost.result(timeout=60)
        except TaskFailed as error:
            print("failed:", error.error)
        print("statuses:", *(handle.task().status for handle in lost.handles))
        print("dead letters discarded:", queue.discard_dead_letters())

        # Many of one kind, results in order; run again, what is done is not done again.
        print(
            "mapped:", *queue.map(fetch, [{"branch": branch} for branch in SALES], name="tuesday")
        )

        # What is paused is accepted, and not started, by any process, until it is resumed.
        queue.pause("fetch")
        urgent = queue.submit("fetch", {"branch": "oslo"}, priority=5)
        print("paused:", urgent.task().status)
        queue.resume("fetch")
        print("resumed:", urgent.result(timeout=60))
    server().shutdown()
    server().server_close()


if __name__ == "__main__":
    main()
