"""The log of a worker: each record reaches a stream once, however the program has set up logging."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from taskx.programs.worker.logs import write_once


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def manager() -> logging.Manager:
    """A tree of loggers beside that of the process."""
    return logging.Manager(logging.RootLogger(logging.DEBUG))  # type: ignore[arg-type]


def handler(stream: Any, level: int = 0, refuses: bool = False) -> logging.Handler:
    made = logging.StreamHandler(stream)
    made.setLevel(level)
    if refuses:
        made.addFilter(lambda record: False)
    return made


class Proxy:
    """A proxy of a stream, as Flask's handler has one."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        return other is self._stream

    __hash__ = None  # type: ignore[assignment]


SETUPS: dict[str, dict[str, Callable[[Any], logging.Handler]]] = {
    "root": {"": handler},
    "django": {"django": handler},
    "root and django": {"": handler, "django": handler},
    "all": {"": handler, "django": handler, "django.tasks": handler},
    "a proxy": {"": handler, "django": lambda stream: handler(Proxy(stream))},
    "a level that is too high": {
        "": handler,
        "django": lambda stream: handler(stream, logging.ERROR),
    },
    "a filter that refuses": {"": handler, "django": lambda stream: handler(stream, refuses=True)},
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_a_record_is_written_once(manager, stream, setup):
    for name, make in setup.items():
        (manager.getLogger(name) if name else manager.root).addHandler(make(stream))
    for _ in range(2):  # a second set-up changes nothing
        write_once(manager)
    logger = manager.getLogger("django.tasks")
    for word in ("one", "two", "two"):
        logger.info(word)
    assert stream.getvalue() == "one\ntwo\ntwo\n"


def test_each_of_two_streams_gets_a_record(manager, stream):
    other = io.StringIO()
    manager.root.addHandler(handler(stream))
    manager.getLogger("shop").addHandler(handler(other))
    write_once(manager)
    manager.getLogger("shop.orders").info("sold")
    assert stream.getvalue() == other.getvalue() == "sold\n"


def test_records_of_two_threads_are_written_once_each(manager, stream):
    """The second thread writes its record while that of the first one is on its way to the root."""
    here, there = threading.Event(), threading.Event()

    def pause(record: logging.LogRecord) -> bool:
        if record.msg == "first":
            here.set()
            assert there.wait(60)
        return True

    outer = handler(stream)
    outer.addFilter(pause)
    manager.root.addHandler(outer)
    manager.getLogger("shop").addHandler(handler(stream))
    write_once(manager)
    thread = threading.Thread(target=manager.getLogger("shop").info, args=("first",))
    thread.start()
    assert here.wait(60)
    manager.getLogger("shop").info("second")
    there.set()
    thread.join()
    assert stream.getvalue().split() == ["first", "second"]
