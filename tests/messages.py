"""Collect the messages of TaskX's errors and log lines, so that a person can review them.

``make test ARGS="--messages=messages.txt"`` writes one message for each ``raise`` and each text that is
logged, by class or level, with ``…`` in place of values. It needs Python 3.12 or newer, which can report
raised exceptions.
"""

from __future__ import annotations

import contextlib
import dis
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import taskx
from taskx.tasks.log import GuardedLogger

RAISE = dis.opmap["RAISE_VARARGS"]
SOURCE = str(Path(taskx.__file__).parent)
PATTERN = "*.messages"

#: The parts that differ from one run to the next.
VALUES = re.compile(
    r"""
    (?<=,\ not\ )\S+$                # what was given in place of what is right
    | (?<=\ in\ attempt\ )\d+:.*       # a user's own error
    | \(configured\ timeouts.*         # a driver's details
    | (?<!\w)b?'[^']*' | "[^"]*" | <[^<>]*>
    | \b[0-9a-f]{8}-[0-9a-f-]+\b | (?<!\w)/[\w./-]+ | \d[\d.,e+-]*
    """,
    re.VERBOSE,
)


def template(message: str) -> str:
    """Return a message with ``…`` in place of its values, on one line."""
    return VALUES.sub("…", " ".join(message.split()))[:300]


class Messages:
    """A pytest plugin that writes the messages of a run into one file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        #: A message of each place: a line of the code that raises, or the text that is logged.
        self.found: dict[str, str] = {}

    def start(self) -> None:
        """Record the errors and log lines of TaskX's code from now on, in every thread."""
        monitoring = sys.monitoring  # type: ignore[attr-defined]
        monitoring.use_tool_id(tool := monitoring.DEBUGGER_ID, "messages")
        monitoring.register_callback(tool, monitoring.events.RAISE, self._on_raise)
        monitoring.set_events(tool, monitoring.events.RAISE)
        write = GuardedLogger._log

        def record(logger: GuardedLogger, level: int, msg: Any, *args: Any, **more: Any) -> None:
            text = f"log {level}: {' '.join(str(msg).split())}"
            self.found[text] = text
            write(
                logger, level, msg, *args, **{**more, "stacklevel": more.get("stacklevel", 1) + 1}
            )

        GuardedLogger._log = record  # type: ignore[method-assign, assignment]

    def _on_raise(self, code: types.CodeType, offset: int, error: BaseException) -> None:
        # Not an error that the code passes on, nor one that a function in C raises.
        if code.co_filename.startswith(SOURCE) and code.co_code[offset] == RAISE:
            # An error of a test may raise any exception when its text is read.
            with contextlib.suppress(BaseException):
                line = next(line for start, end, line in code.co_lines() if start <= offset < end)
                text = f"{type(error).__name__}: {template(str(error))}"
                place = f"{code.co_filename}:{line}"
                self.found[place] = min(self.found.get(place, text), text)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the messages of this process. The main process collects those of all processes."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if worker := getattr(session.config, "workerinput", {}).get("workerid"):
            part = self.file.with_name(f"{worker}.messages")
            part.write_text(json.dumps(self.found), "utf-8")
            return
        for part in self.file.parent.glob(PATTERN):
            self.found = {**json.loads(part.read_text("utf-8")), **self.found}
            part.unlink()
        self.file.write_text("\n".join(sorted({*self.found.values()})) + "\n", "utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--messages", metavar="FILE", help="write TaskX's messages to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Start to collect messages if the option is given."""
    if file := config.getoption("--messages"):
        if sys.version_info < (3, 12):
            raise pytest.UsageError("--messages requires Python 3.12 or newer")
        messages = Messages(Path(file).absolute())
        messages.start()
        config.pluginmanager.register(messages, "taskx-messages")
