"""The pytest plugin of TaskX: the fixtures ``taskx_queue`` and ``taskx_clock``.

pytest finds it by itself where TaskX is installed. It is a module of its own and imports TaskX only when a
test asks for a fixture, so that it costs other projects nothing.

PYTEST_DONT_REWRITE: it has no assertions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from taskx import Queue
    from taskx.testing import ManualClock, ManualQueue

_MODES = ("manual", "inline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of the plugin."""
    parser.addini(
        "taskx_queue",
        "the queue that the fixture taskx_queue replaces, such as myapp.tasks:queue; a new one by default",
        default="",
    )
    parser.addini(
        "taskx_mode", "how taskx_queue runs tasks: manual (default) or inline", default=""
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of the plugin."""
    config.addinivalue_line(
        "markers",
        "taskx(mode=..., queue=...): how the fixture taskx_queue of this test runs tasks ('manual' or "
        "'inline'), and which queue it replaces ('myapp.tasks:queue', or the queue itself)",
    )


@pytest.fixture
def taskx_clock() -> ManualClock:
    """Return the clock of ``taskx_queue``, which stands still until the test moves it."""
    from taskx.testing import ManualClock

    return ManualClock()


@pytest.fixture
def taskx_queue(request: pytest.FixtureRequest, taskx_clock: ManualClock) -> Iterator[ManualQueue]:
    """Give a queue whose tasks the test runs: the application's, or a new one.

    The ini options ``taskx_queue`` and ``taskx_mode``, and the marker ``taskx``, say which queue, and how.
    """
    from taskx import testing

    mode, queue = _wanted(request)
    if queue is None:
        made = testing.InlineQueue if mode == "inline" else testing.ManualQueue
        yield made(clock=taskx_clock)
        return
    replace = testing.inline if mode == "inline" else testing.manual
    with replace(queue, clock=taskx_clock) as replaced:
        yield replaced


def _wanted(request: pytest.FixtureRequest) -> tuple[str, Queue | None]:
    """Return the mode, and the queue to replace if there is one."""
    marker = request.node.get_closest_marker("taskx")
    given = dict(marker.kwargs) if marker is not None else {}
    if (marker is not None and marker.args) or given.keys() - {"mode", "queue"}:
        raise pytest.UsageError("the marker taskx takes mode=... and queue=... only")
    mode = given.get("mode") or request.config.getini("taskx_mode") or "manual"
    if mode not in _MODES:
        raise pytest.UsageError(f"the mode of taskx must be 'manual' or 'inline', not {mode!r}")
    queue = given.get("queue") or request.config.getini("taskx_queue") or None
    return mode, _imported(queue) if isinstance(queue, str) else queue


def _imported(name: str) -> Queue:
    """Return the queue that a name such as ``myapp.tasks:queue`` means."""
    import importlib
    from operator import attrgetter

    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise pytest.UsageError(
            f"taskx_queue must name a module and a queue in it, as myapp.tasks:queue, not {name!r}"
        )
    found: Queue = attrgetter(attribute)(importlib.import_module(module))
    return found
