"""The way of a task: ``docs/design.rst`` lists the true steps, and there are not too many.

A step is a call from one function of TaskX into another that carries the task on. All other functions
that are called on the way only compute, check or tell; the page names them.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from helpers import PATIENCE, eventually, housekeeper_of, pool_of, services_of

import taskx
from taskx import Config, Queue, SQLiteRepository
from taskx.common.bell import Bell

PAGE = Path(__file__).parents[2] / "docs" / "design.rst"
OURS = Path(taskx.__file__).parent
MOST_STEPS, MOST_FILES, MOST_STEPS_BACK = 8, 8, 6
_STEP = re.compile(r"^\d+\. ``([\w.]+)`` → ``([\w.]+)`` \(``([\w/.]+)``\)", re.MULTILINE)


class Page:
    """The steps and helpers that the page lists."""

    def __init__(self) -> None:
        page = PAGE.read_text("utf-8")
        section = page.split("The way of a task\n")[1].split("\nWaiting for a worker\n")[0]
        there, back, helpers = re.split(r"\n(?:And back|Helpers)\.", section)
        self.there = _STEP.findall(there)
        self.back = _STEP.findall(back)
        self.helpers = set(re.findall(r"``([\w.]+)``", helpers.split("\n\n")[0]))


class Recorder:
    """A profile function that notes the calls between functions of TaskX."""

    def __init__(self) -> None:
        self.names = _names()
        #: The threads whose calls are noted.
        self.threads: set[int | None] = set()
        #: The calls: the caller, the called function, and its return value.
        self.calls: list[list[Any]] = []
        self._open: dict[FrameType, list[Any]] = {}

    def __call__(self, frame: FrameType, event: str, value: object) -> None:
        if threading.get_ident() not in self.threads or frame.f_code not in self.names:
            return
        if event == "call":
            call = [self._caller(frame), self.names[frame.f_code], None]
            self._open[frame] = call
            self.calls.append(call)
        elif event == "return" and (call := self._open.pop(frame, [])):
            call[2] = value

    def _caller(self, frame: FrameType) -> str:
        caller = frame.f_back
        while caller is not None and caller.f_code not in self.names:
            caller = caller.f_back
        return "" if caller is None else self.names[caller.f_code]

    def __str__(self) -> str:
        return "\n".join(f"{caller} → {called}" for caller, called, _ in self.calls)


def _names() -> dict[CodeType, str]:
    """Return the names of TaskX's functions by their code: ``function`` or ``Class.function``."""
    names: dict[CodeType, str] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "taskx":
            _note_functions(module, names)
    return names


def _note_functions(owner: Any, names: dict[CodeType, str]) -> None:
    for made in list(vars(owner).values()):
        if type(made).__name__ == "LocalProxy":  # Flask's, which stand for nothing here
            continue
        for part in (
            made,
            *(getattr(made, name, None) for name in ("fget", "__func__", "__wrapped__")),
        ):
            if inspect.isfunction(part) and Path(part.__code__.co_filename).is_relative_to(OURS):
                names[part.__code__] = part.__qualname__
        if inspect.isclass(made) and made.__module__.startswith("taskx") and made is not owner:
            _note_functions(made, names)


def sleeps(thread):
    """Return True if a worker has checked that there is nothing to run, and waits for the bell."""
    return sys._current_frames()[thread.ident].f_code is Bell.wait.__code__


@pytest.fixture(scope="module")
def page():
    return Page()


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """Record the calls of one plain submit, from its call to its committed outcome."""
    path = tmp_path_factory.mktemp("way") / "tasks.db"
    queue = Queue(SQLiteRepository(path, durability="process"), Config(worker_num=1))
    recorder = Recorder()
    submitted, committed = threading.Event(), threading.Event()

    @queue.executor("fine")
    def fine():
        if recorder.threads:
            recorder.calls.append(["", "", None])

    threading.setprofile(recorder)
    try:
        queue.start()
    finally:
        threading.setprofile(None)
    for _ in range(3):  # compile the statements, and check the file
        queue.submit("fine").result(PATIENCE)
    pool = pool_of(queue)
    [worker] = pool.threads
    # Only this thread and the worker may take part. A round of the housekeeper that has begun is over after
    # the next one.
    rounds = threading.Event()
    housekeeper_of(queue).tick = rounds.set
    services_of(queue).agenda.wake()
    assert rounds.wait(PATIENCE)
    eventually(lambda: not services_of(queue).moves.unsettled and sleeps(worker))
    apply, left = queue.repository.apply, ["the outcome", "the record and the start"]

    def commit(writes, **options):
        last = left.pop() == "the outcome"
        if last:
            assert submitted.wait(PATIENCE)  # until all calls of the other thread are noted
        results = apply(writes, **options)
        if last:
            recorder.threads = set()
            committed.set()
        return results

    queue.repository.apply = commit
    gc.disable()  # finalizers are no part of the way
    sys.setprofile(recorder)
    recorder.threads = {threading.get_ident(), *(thread.ident for thread in pool.threads)}
    try:
        queue.submit("fine")
    finally:
        sys.setprofile(None)
        gc.enable()
        submitted.set()
    assert committed.wait(PATIENCE)
    del housekeeper_of(queue).tick
    queue.close()
    return recorder


def steps(way, page):
    """Return the calls of functions that are steps, without calls that returned an empty list."""
    functions = {called for _, called, _ in [*page.there, *page.back]} | {""}
    return [
        (caller, called)
        for caller, called, value in way.calls
        if called in functions and value != []
    ]


def test_a_submit_takes_the_steps_that_the_design_page_lists(way, page):
    there = [(caller, called) for caller, called, _ in page.there]
    back = [(caller, called) for caller, called, _ in page.back]
    assert steps(way, page) == [*there, ("", ""), *back], str(way)


def test_the_way_has_no_more_steps_and_files_than_allowed(page):
    assert 1 < len(page.there) <= MOST_STEPS
    assert 1 < len(page.back) <= MOST_STEPS_BACK
    files = {"queue.py", *(file for _, _, file in [*page.there, *page.back])}
    assert len(files) <= MOST_FILES


def test_each_step_is_in_the_file_that_the_page_names(way, page):
    files = {name: Path(code.co_filename) for code, name in way.names.items()}
    for _, called, file in [*page.there, *page.back]:
        assert files[called] == OURS / file


def test_the_page_lists_every_helper_that_is_called_on_the_way(way, page):
    called = {called for _, called, _ in way.calls} - {""}
    named = {called for _, called, _ in [*page.there, *page.back]}
    helpers = called - named
    listed = ", ".join(f"``{name}``" for name in sorted(helpers))
    assert helpers <= page.helpers, listed
    assert page.helpers <= set(way.names.values())  # the page names no function that does not exist
