"""A dashboard in a headless Chromium: one server and one browser for all tests of the folder."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import attrs
import pytest
from helpers import PATIENCE
from kinds import NO_BROWSER
from playwright.sync_api import expect, sync_playwright

from taskx import Queue, SQLiteRepository, Task, chain, group
from taskx.programs.dashboard import Dashboard
from taskx.programs.dashboard.serving import bind

# Generous: a busy machine may take seconds for a page.
expect.set_options(timeout=PATIENCE * 1000)

#: A text that would do harm, or break a page, wherever it is not escaped.
HOSTILE = (
    "<img src=x onerror=\"document.title='broken'\">'\"&<b>{{ 77777*9 }}</b>{%raw%}\u202e\u2028日本"
)

#: The names under which Chromium may be installed.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@attrs.frozen
class Site:
    """A served dashboard.

    Attributes:
        queue: its queue, which is started.
        url: its address, without a slash at the end.
        gate: lets the tasks of the type ``hold`` end.
        failed: the id of a task of the type ``broken``.
    """

    queue: Queue
    url: str
    gate: threading.Event
    failed: str


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serve a dashboard whose queue has tasks of every kind."""
    gate = threading.Event()
    queue = Queue(SQLiteRepository(tmp_path_factory.mktemp("site") / "tasks.db"))
    add_executors(queue, gate)
    server = bind(Dashboard(queue), port=0)
    thread = threading.Thread(target=server.serve_forever, name="dashboard")
    with closing(queue), queue:
        failed = fill(queue)
        thread.start()
        try:
            yield Site(queue, f"http://127.0.0.1:{server.server_port}", gate, failed)
        finally:
            gate.set()
            server.shutdown()
            thread.join()
            server.server_close()


def add_executors(queue: Queue, gate: threading.Event) -> None:
    """Register executors that complete, fail and wait."""

    @queue.executor("mail")
    def mail(to: str = "ann") -> str:
        return f"sent to {to}"

    @queue.executor("broken")
    def broken(why: str = "no reason") -> None:
        raise ValueError(why)

    @queue.executor("quiet")
    def quiet() -> None:
        return None

    @queue.executor("grouped")
    def grouped() -> None:
        raise KeyError("grouped")

    @queue.executor("part")
    def part() -> None:
        raise KeyError("part")

    @queue.executor("hold")
    def hold() -> None:
        gate.wait()

    @queue.executor(HOSTILE, max_concurrency=7, rate="1000/s")
    def hostile(text: str = HOSTILE) -> str:
        raise LookupError(text)


def fill(queue: Queue) -> str:
    """Store tasks in every status, flows, schedules, and texts that would do harm.

    Return the id of a failed task.
    """
    done = [queue.submit("mail", {"to": name}) for name in ("ann", "bob", HOSTILE)]
    failed = [queue.submit("broken", {"why": f"reason {n}"}) for n in range(3)]
    failed.append(queue.submit(HOSTILE, created_by=HOSTILE, id=f"id {HOSTILE}"))
    queue.submit("mail", delay=3600)
    queue.cancel_task(queue.submit("mail", delay=3600).id)
    queue.submit("hold")
    first = queue.submit("mail")
    queue.submit("mail", depends_on=[first])
    many = group(*(Task(type="quiet") for _ in range(100)))
    queue.submit_flow(chain(Task(type="mail"), many, Task(type="mail")))
    queue.submit_flow(chain(Task(type=HOSTILE), group(Task(type="mail"), Task(type="hold"))))
    queue.schedule("nightly", "30 2 * * *", "mail", {"to": "all"}, tz="Europe/Berlin").store()
    queue.schedule(f"schedule {HOSTILE}", "0 0 1 1 *", HOSTILE, {"text": HOSTILE}).store()
    for handle in done:
        handle.result(PATIENCE)
    for handle in failed:
        handle.exception(PATIENCE)
    return failed[0].id


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """Return a running browser; skip the test if it is not installed."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"{NO_BROWSER}: install Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu"],
            timeout=PATIENCE * 1000,
        )
        yield browser
        browser.close()


#: Keeps what a page has said to screen readers when it was loaded: its next refresh may say something else.
SAID = """
addEventListener("DOMContentLoaded", () => {
    window.said = document.querySelector("#live")?.textContent;
});
"""


class Visit:
    """A page of the browser. It notes every error that the browser reports.

    Attributes:
        page: the page.
        errors: the errors so far.
        fails: True if the test fails because of them.
    """

    def __init__(self, site: Site, browser: Any, *, fails: bool = True, **options: Any) -> None:
        self.fails = fails
        self._context = browser.new_context(base_url=site.url, **options)
        self._context.set_default_timeout(PATIENCE * 1000)
        self.page = self._context.new_page()
        self.page.add_init_script(SAID)
        self.errors: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} ({message.location})")

    def close(self) -> None:
        self._context.close()


@pytest.fixture
def visit(site: Site, chromium: Any) -> Iterator[Any]:
    """Return a function that opens a page; at the end, no page may have reported an error."""
    visits: list[Visit] = []

    def opened(**options: Any) -> Any:
        visits.append(
            Visit(site, chromium, **{"viewport": {"width": 1280, "height": 900}, **options})
        )
        return visits[-1].page

    yield opened
    errors = [error for visit in visits if visit.fails for error in visit.errors]
    for each in visits:
        each.close()
    assert errors == []


@pytest.fixture
def page(visit: Any) -> Any:
    """Return a page in a wide window."""
    return visit()
