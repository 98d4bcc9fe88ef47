"""Tables, colours and text for terminals."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers import PATIENCE
from hypothesis import given
from hypothesis import strategies as st

from taskx import Queue, SQLiteRepository, Task
from taskx.programs.cli.output import Cell, Column, Output, age, clean, cut, fit, one_line, width_of

ROOT = Path(__file__).parent.parent.parent


@given(st.text())
def test_a_clean_text_has_no_control_characters(text):
    assert all(character.isprintable() for character in clean(text))
    assert clean(clean(text)) == clean(text)
    assert all(line.isprintable() for line in clean(text, lines=True).split("\n"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 日本", "plain 日本"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_become_escapes(text, shown):
    assert clean(text) == shown


def test_line_breaks_can_be_kept():
    assert clean("a\n\tb\r\x1b", lines=True) == "a\n        b\\r\\x1b"


def test_one_line_says_that_there_are_more():
    assert one_line("\n a \nb") == "a …"
    assert one_line("a") == "a"


@given(st.text(st.characters(exclude_categories=["C", "Z", "M"])), st.integers(0, 20))
def test_a_cut_text_fits(text, width):
    assert width_of(cut(text, width)) <= width
    if width_of(text) <= width:
        assert cut(text, width) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.25, "250ms"),
        (5, "5s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (61, "1m"),
        (7200, "2h"),
        (86400, "24h"),
        (172800, "2d"),
        (-3, "-3s"),
    ],
)
def test_an_age_has_one_unit(seconds, text):
    assert age(seconds) == text


COLUMNS = (
    Column("ID"),
    Column("TYPE", cut=True),
    Column("AGE", right=True, drop=1),
    Column("DETAIL", cut=True, drop=2),
)
ROWS = [[Cell("x" * 10), Cell("email"), Cell("5s"), Cell("字" * 50)]]


@given(st.integers(1, 200))
def test_a_table_never_exceeds_the_width(width):
    kept, widths, _ = fit(COLUMNS, ROWS, width)
    assert sum(widths) + 2 * (len(widths) - 1) <= max(width, len(widths) + 2 * (len(widths) - 1))
    assert kept == sorted(kept)


def test_columns_are_cut_first_and_then_left_out():
    assert fit(COLUMNS, ROWS, None) == ([0, 1, 2, 3], [10, 5, 3, 100], True)
    assert fit(COLUMNS, ROWS, 60) == ([0, 1, 2, 3], [10, 5, 3, 36], True)
    assert fit(COLUMNS, ROWS, 24) == ([0, 1, 2], [10, 5, 3], True)
    assert fit(COLUMNS, ROWS, 17) == ([0, 1], [10, 5], True)
    assert fit(COLUMNS, ROWS, 12)[2] is False


def test_an_empty_column_that_may_be_left_out_is_left_out():
    rows = [[Cell("x"), Cell("email"), Cell(""), Cell("y")]]
    assert fit(COLUMNS, rows, None)[0] == [0, 1, 3]


def test_only_the_first_rows_of_a_long_table_are_held_in_memory():
    made = 0

    def rows():
        nonlocal made
        for number in range(10_000):
            made += 1
            yield (str(number), "email", "5s", "")

    lines = Output().table_lines(COLUMNS, rows())
    next(lines)
    assert made < 1_000
    assert sum(1 for _ in lines) == 10_000


# A real terminal


def in_terminal(columns: int, *args: str, **env: str) -> str:
    """Run ``python -m taskx`` in a terminal of a width; return what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = {
        k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    }
    program = subprocess.Popen(
        [sys.executable, "-m", "taskx", *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**settings, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **env},
    )
    os.close(theirs)
    written = b""
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
    finally:
        os.close(ours)
    assert program.wait(PATIENCE) == 0
    return written.decode().replace("\r\n", "\n")


@pytest.fixture
def url(tmp_path):
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    queue.declare("email")
    queue.submit_many(
        [Task(type="email", params={"to": "字" * 60, "x": "\x1b[2J"}) for _ in range(3)]
    )
    queue.close()
    return f"sqlite:///{tmp_path}/tasks.db"


_COLOUR = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.process
@pytest.mark.parametrize("columns", [100, 40])
def test_a_table_fits_the_terminal_and_has_colours(url, columns):
    written = in_terminal(columns, "list", "--repository", url)
    assert "\x1b[33mpending" in written
    plain = _COLOUR.sub("", written)
    assert "\x1b" not in plain  # nothing of the params
    assert all(width_of(line) <= columns for line in plain.splitlines())
    assert len(plain.splitlines()) == 4 * (1 if columns == 100 else 2)


@pytest.mark.process
def test_no_color_is_respected(url):
    written = in_terminal(100, "list", "--repository", url, NO_COLOR="1")
    assert "\x1b[33m" not in written
