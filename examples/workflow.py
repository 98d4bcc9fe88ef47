"""The nightly report of a small shop, as a workflow of several tasks with retries.

Three branches deliver their sales over HTTP, from a server that sometimes fails. The sales are fetched in
parallel and merged. Then a chart is drawn, and the report is sent. If the program is killed at any moment
and run again, it goes on from there. Only a death right after the report was sent can send it a second
time. Run it: ``python examples/workflow.py [FILE]``
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
    """A server for the sales of the branches. The first request for each branch fails."""

    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        branch = self.path.strip("/")
        known, first = branch in SALES, branch not in self.asked
        self.asked.add(branch)
        self.send_response(404 if not known else 503 if first else 200)
        self.end_headers()
        self.wfile.write(json.dumps(SALES.get(branch, [])).encode())

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@cache
def server() -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", 0), Branches)


path = sys.argv[1] if len(sys.argv) > 1 else "workflow.db"
queue = Queue(
    SQLiteRepository(path), Config(worker_num=4, retention={"completed": timedelta(days=7)})
)


# At most two requests at a time. While the server is down, a request is retried up to three times, with
# five seconds for each attempt. A branch that does not exist is not retried.
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
    """Add up the sales of each branch. ``ctx.parents`` are the fetched tasks, in order."""
    return {parent.params["branch"]: sum(parent.result) for parent in ctx.parents}


@queue.executor(max_attempts=3)
def report(ctx, day: str) -> str:
    [merged] = ctx.parents
    text = ", ".join(f"{branch} {total}" for branch, total in merged.result.items())
    ctx.step("send", send, f"{day}: {text}")  # once, whatever the number of attempts
    if ctx.task.attempt == 1:
        raise ConnectionError("the connection broke after the mail was sent")
    return text


def send(text: str) -> None:
    print("sent", text)


# It runs in a child process: a library that crashes it harms nothing else. Its log is captured.
@queue.executor(isolation="process", timeout=60, capture_log=True)
def draw(ctx) -> list[str]:
    [merged] = ctx.parents
    if ctx.task.crashes == 0:
        os._exit(1)  # the first run crashes its process
    ctx.logger.info("drawing %d bars", len(merged.result))
    return ["#" * (total // 5) for total in merged.result.values()]


def nightly(day: str) -> Flow:
    """Return the flow: fetch in parallel, then merge, then draw and report."""
    fetched = group(*(fetch.task(branch=branch) for branch in SALES))
    # No other task can hold this key while the record exists, so no night is reported twice.
    merged = Task(type="merge", unique_key=f"night {day}", unique_scope="ever")
    # One mail at a time, in order, over all processes.
    sent = report.task(day=day)
    sent.concurrency_key = "mail"
    return chain(fetched, merged, group(sent, draw.task()))


def run_night(day: str) -> None:
    """Submit the flow of a day, unless it was submitted before, and print its results."""
    try:
        whole = queue.submit_flow(nightly(day))
    except DuplicateTask as error:  # none of the flow's tasks was stored
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

        # A failed task cancels its dependents. It stays as a dead letter until you requeue or discard it.
        lost = queue.submit_flow(chain(fetch.task(branch="rome"), Task(type="merge")))
        try:
            lost.result(timeout=60)
        except TaskFailed as error:
            print("failed:", error.error)
        print("statuses:", *(handle.task().status for handle in lost.handles))
        print("dead letters discarded:", queue.discard_dead_letters())

        # Many tasks of one type, with results in order. A second run does not repeat finished tasks.
        print(
            "mapped:", *queue.map(fetch, [{"branch": branch} for branch in SALES], name="tuesday")
        )

        # Tasks of a paused type are accepted, but no process starts them until the type is resumed.
        queue.pause("fetch")
        urgent = queue.submit("fetch", {"branch": "oslo"}, priority=5)
        print("paused:", urgent.task().status)
        queue.resume("fetch")
        print("resumed:", urgent.result(timeout=60))
    server().shutdown()
    server().server_close()


if __name__ == "__main__":
    main()
