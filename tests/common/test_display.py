"""The live display of a map and of ``follow``: a bar with rich in a terminal, else lines."""

from __future__ import annotations

import sys
import threading

import pytest

from taskx.tasks.display import Display
from taskx.tasks.timing import Timing


@pytest.fixture
def terminal(monkeypatch):
    """Make rich treat the captured output as a terminal."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_pipe_gets_the_last_state_as_a_line(capsys):
    with Display("digest", 5) as shown:
        shown.add(done=1)
        shown.add(done=2, failed=1)
        assert capsys.readouterr() == ("", "")
    assert capsys.readouterr() == ("", "digest: 4 of 5 (80%), 1 failed\n")


def test_a_display_ends_when_all_is_done(capsys):
    shown = Display("digest", 2)
    shown.add(done=1)
    assert capsys.readouterr() == ("", "")
    shown.add(failed=1)
    assert capsys.readouterr() == ("", "digest: 2 of 2 (100%), 1 failed\n")
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_a_line_every_few_seconds(capsys):
    with Display("digest", timing=Timing(line_every=0.0)) as shown:
        shown.update(1, "opened")
        assert capsys.readouterr().err == "digest: 1, opened\n"
        shown.update(2, "read", total=3)
        assert capsys.readouterr().err == "digest: 2 of 3 (67%), read\n"
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, terminal):
    with Display("digest [4]", 4) as shown:
        shown.add(done=3)
        shown.add(failed=1)
    text = capsys.readouterr().err
    assert "digest [4]" in text
    assert "━━━━" in text
    assert "4/4" in text
    assert "1 failed" in text


def test_a_bar_needs_no_thread(capsys, terminal):
    """An interrupt while the thread starts or stops would leave it behind, and it would go on drawing."""
    before = set(threading.enumerate())
    with Display("digest", 4) as shown:
        shown.add(done=1)
        assert set(threading.enumerate()) <= before
        assert "1/4" in capsys.readouterr().err
        shown.add(done=3)  # too soon to draw it
    assert "4/4" in capsys.readouterr().err


def test_a_notebook_gets_lines_if_ipywidgets_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with Display("digest", 2) as shown:
        shown.add(done=2)
    assert capsys.readouterr() == ("", "digest: 2 of 2 (100%)\n")


def test_a_terminal_gets_lines_if_rich_is_not_installed(capsys, terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with Display("digest", 1) as shown:
        shown.add(done=1)
    assert capsys.readouterr().err == "digest: 1 of 1 (100%)\n"


def test_a_terminal_that_cannot_redraw_gets_lines(capsys, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Display("digest", 2, timing=Timing(line_every=0.0)) as shown:
        shown.add(done=1)
        assert capsys.readouterr().err == "digest: 1 of 2 (50%)\n"


def test_a_display_without_updates_shows_nothing(capsys):
    with Display("digest", 4):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_display_works_without_stderr(monkeypatch):
    """``pythonw`` has no stderr."""
    monkeypatch.setattr(sys, "stderr", None)
    with Display("digest", 4) as shown:
        shown.add(done=1)


def test_what_the_program_prints_below_a_bar_stays_on_stdout(capsys, terminal):
    with Display("digest", 4) as shown:
        shown.add(done=1)
        print("a result")
    assert capsys.readouterr().out == "a result\n"


LEFT_OPEN = """
import sys
from taskx.tasks.display import Display

sys.shown = Display("digest", 4)  # it lives longer than the modules
sys.shown.add(done=1)
"""


@pytest.mark.parametrize("bar", [True, False])
def test_a_display_is_closed_when_the_program_ends(spawn, request, bar):
    if bar:
        request.getfixturevalue("terminal")
    out, err = spawn(LEFT_OPEN).ends()
    assert out == ""
    assert "Exception" not in err
    # The bar shows the cursor again.
    assert err.endswith("\x1b[?25h" if bar else "digest: 1 of 4 (25%)\n")


@pytest.mark.parametrize("on", ["pipe", "terminal"])
def test_a_message_cannot_control_the_terminal(capsys, request, on):
    if on == "terminal":
        request.getfixturevalue("terminal")
    with Display("digest\x07", 5) as shown:
        shown.update(3, "half \x1b[2J\u202e way\r\n")
    written = capsys.readouterr().err
    assert "half \\x1b[2J\\u202e way\\r\\n" in written
    assert "\x1b[2J" not in written
    assert "\x07" not in written
