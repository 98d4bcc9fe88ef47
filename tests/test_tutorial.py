"""The tutorial, followed word by word. ``make build`` follows a part of it with the wheel."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT

tool = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "follow_tutorial.py")))


# A slow machine may not even start a program in the seconds after which the page presses Ctrl-C.
TIMEOUT = """#!{python}
import signal, subprocess, sys

_, option, name, seconds, *command = sys.argv
assert (option, name) == ("--signal", "INT")
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    print(process.stdout.readline(), end="", flush=True)
    process.send_signal(signal.SIGINT)
    print(process.stdout.read(), end="")
"""


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """Return a PATH whose ``timeout`` presses Ctrl-C as soon as the program has printed a line."""
    ours = tmp_path / "bin"
    ours.mkdir()
    program = ours / "timeout"
    program.write_text(TIMEOUT.format(python=sys.executable))
    program.chmod(0o755)
    return os.pathsep.join([str(ours), str(Path(sys.executable).parent), "/usr/bin", "/bin"])


@pytest.mark.process
def test_a_reader_who_follows_the_tutorial_sees_what_it_shows(tmp_path, programs):
    folder = tmp_path / "tutorial"
    folder.mkdir()
    environment = {"PATH": programs, "PYTHONPATH": str(ROOT)}
    assert tool.follow(Path(sys.executable).parent, folder, tool.steps(), **environment) == []


def test_every_file_that_the_tutorial_runs_is_on_the_page():
    commands = [command for command, _ in tool.steps()]
    assert len(commands) > 10
    named = {name for command in commands for name in re.findall(r"\b\w+\.py\b", command)}
    assert named <= tool.files().keys()


def test_another_output_is_noticed():
    assert tool.shows("3 words", "17 words\n")
    assert not tool.shows("3 words", "17 lines\n")
    assert tool.shows("...\n1 passed in ...", ".\n1 passed in 0.01s\n")
    assert not tool.shows("...\n1 passed in ...", "F\n1 failed in 0.01s\n")
